//! What the guest shall have, decided from a CNI result and what the kernel says. Pure.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    Dns, GuestNeighbour, GuestRoute,
    cni::result::AddResult,
    observed::{Link, Observed, SCOPE_LINK},
};

/// CNI_IFNAME of the pod's network.
pub(crate) const DEFAULT_INTERFACE: &str = "eth0";

/// An interface of the guest, before it has a tap.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlannedInterface {
    pub(crate) name: String,
    pub(crate) link: Link,
    pub(crate) addresses: Vec<IpNet>,
}

/// All that the guest shall have.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) interfaces: Vec<PlannedInterface>,
    pub(crate) routes: Vec<GuestRoute>,
    pub(crate) neighbours: Vec<GuestNeighbour>,
    pub(crate) ips: Vec<IpAddr>,
}

/// The result names an interface that is not there, or that frames cannot be redirected from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("the CNI result names an interface that is not in the pod's network namespace")]
    Missing(String),
    #[error("it is no Ethernet device")]
    NotEthernet(String),
}

impl PlanError {
    pub(crate) fn interface(&self) -> &str {
        match self {
            Self::Missing(name) | Self::NotEthernet(name) => name,
        }
    }
}

/// Decides.
pub(crate) fn plan(result: &AddResult, observed: &Observed) -> Result<Plan, PlanError> {
    let mut named: Vec<(Option<usize>, &str)> = result
        .in_sandbox()
        .map(|(index, interface)| (Some(index), interface.name.as_str()))
        .collect();
    if named.is_empty() {
        // Some plugins answer addresses only.
        named.push((None, DEFAULT_INTERFACE));
    }
    let mut interfaces: Vec<PlannedInterface> = Vec::new();
    for (index, name) in named {
        if interfaces.iter().any(|interface| interface.name == name) {
            continue;
        }
        let link = observed
            .links
            .get(name)
            .ok_or_else(|| PlanError::Missing(name.to_owned()))?;
        if !link.is_ethernet {
            return Err(PlanError::NotEthernet(name.to_owned()));
        }
        let addresses = addresses(result, observed, index, name, link, interfaces.is_empty());
        interfaces.push(PlannedInterface {
            name: name.to_owned(),
            link: link.clone(),
            addresses,
        });
    }
    let is_ours = |name: &str| interfaces.iter().any(|interface| interface.name == name);
    let mut routes: Vec<GuestRoute> = observed
        .routes
        .iter()
        .filter(|route| !route.is_connected && is_ours(&route.route.interface))
        .map(|route| route.route.clone())
        .collect();
    if routes.is_empty() {
        routes = routes_of_result(result, &interfaces);
    }
    reach_gateways(&mut routes, &interfaces);
    let neighbours = observed
        .neighbours
        .iter()
        .filter(|neighbour| is_ours(&neighbour.interface))
        .cloned()
        .collect();
    let mut ips: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
    if ips.is_empty() {
        ips = interfaces
            .iter()
            .flat_map(|interface| &interface.addresses)
            .map(IpNet::addr)
            .collect();
    }
    Ok(Plan {
        interfaces,
        routes,
        neighbours,
        ips,
    })
}

/// First the result's, in its order; then those that only the kernel knows.
fn addresses(
    result: &AddResult,
    observed: &Observed,
    index: Option<usize>,
    name: &str,
    link: &Link,
    is_first: bool,
) -> Vec<IpNet> {
    let of_kernel = || {
        observed
            .addresses
            .iter()
            .filter(|(of, _)| of == name)
            .map(|(_, address)| *address)
    };
    let stated = match index {
        Some(index) => result
            .addresses_of(index, is_first)
            .map(|ip| ip.address)
            .collect(),
        None => result.ips.iter().map(|ip| ip.address).collect::<Vec<_>>(),
    };
    let mut addresses: Vec<IpNet> = Vec::new();
    for address in stated.into_iter().chain(of_kernel()) {
        if addresses.iter().all(|known| known.addr() != address.addr()) {
            addresses.push(address);
        }
    }
    for address in &mut addresses {
        let is_set = of_kernel().any(|set| set == *address);
        // ptp and others take the subnet route away; the guest's kernel would make it again.
        if is_set && link.is_up && !observed.has_connected_route(name, address) {
            *address = IpNet::from(address.addr());
        }
    }
    addresses
}

fn routes_of_result(result: &AddResult, interfaces: &[PlannedInterface]) -> Vec<GuestRoute> {
    let Some(first) = interfaces.first() else {
        return Vec::new();
    };
    let is_v4 = |address: &IpAddr| address.is_ipv4();
    result
        .routes
        .iter()
        .map(|route| {
            let family = is_v4(&route.dst.addr());
            let default = || {
                result
                    .ips
                    .iter()
                    .filter_map(|ip| ip.gateway)
                    .find(|gateway| is_v4(gateway) == family)
            };
            // A route on link says so by its scope; without gateway and scope, the address' gateway serves.
            let gateway = match route.scope {
                Some(SCOPE_LINK) => route.gw,
                _ => route.gw.or_else(default),
            };
            let interface = gateway
                .and_then(|gateway| {
                    interfaces.iter().find(|interface| {
                        interface
                            .addresses
                            .iter()
                            .any(|address| address.contains(&gateway))
                    })
                })
                .unwrap_or(first);
            GuestRoute {
                destination: route.dst.trunc(),
                gateway,
                interface: interface.name.clone(),
                mtu: route.mtu.filter(|mtu| *mtu > 0),
                priority: route.priority,
                scope: route.scope,
            }
        })
        .collect()
}

/// Puts routes on link first, and adds one for each gateway that would not be reachable.
fn reach_gateways(routes: &mut Vec<GuestRoute>, interfaces: &[PlannedInterface]) {
    routes.sort_by_key(|route| route.gateway.is_some());
    let mut added: Vec<GuestRoute> = Vec::new();
    for route in routes.iter() {
        let Some(gateway) = route.gateway else { continue };
        let is_link_local = matches!(gateway, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let in_subnet = interfaces
            .iter()
            .filter(|interface| interface.name == route.interface)
            .flat_map(|interface| &interface.addresses)
            .any(|address| address.contains(&gateway));
        let on_link = routes.iter().chain(&added).any(|other| {
            other.gateway.is_none()
                && other.interface == route.interface
                && other.destination.contains(&gateway)
        });
        if !is_link_local && !in_subnet && !on_link {
            added.push(GuestRoute {
                destination: IpNet::from(gateway),
                gateway: None,
                interface: route.interface.clone(),
                mtu: None,
                priority: None,
                scope: gateway.is_ipv4().then_some(SCOPE_LINK),
            });
        }
    }
    routes.splice(0..0, added);
}

/// DNS of the result. `domain` is the local one: first in the search list, unless that has it.
pub(crate) fn dns(result: &AddResult) -> Dns {
    let dns = &result.dns;
    let mut searches = dns.search.clone();
    if !dns.domain.is_empty() && !searches.contains(&dns.domain) {
        searches.insert(0, dns.domain.clone());
    }
    Dns {
        servers: dns.nameservers.clone(),
        searches,
        options: dns.options.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::observed::Route;

    fn link() -> Link {
        Link {
            index: 2,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1450,
            is_ethernet: true,
            is_up: true,
        }
    }

    fn route(destination: &str, gateway: Option<&str>, is_connected: bool) -> Route {
        let route = GuestRoute {
            destination: destination.parse().unwrap(),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            interface: "eth0".into(),
            mtu: None,
            priority: None,
            scope: None,
        };
        Route { route, is_connected }
    }

    fn observed(addresses: &[&str], routes: Vec<Route>) -> Observed {
        Observed {
            links: [("eth0".to_owned(), link())].into(),
            addresses: addresses
                .iter()
                .map(|text| ("eth0".to_owned(), text.parse().unwrap()))
                .collect(),
            routes,
            neighbours: Vec::new(),
        }
    }

    fn result(value: serde_json::Value) -> AddResult {
        AddResult::read(&value).unwrap()
    }

    fn shape(plan: &Plan) -> Vec<String> {
        plan.routes
            .iter()
            .map(|route| match route.gateway {
                Some(gateway) => format!("{} via {gateway}", route.destination),
                None => route.destination.to_string(),
            })
            .collect()
    }

    #[test]
    fn a_bridge_network_gets_the_kernels_routes_without_the_connected_ones() {
        let result = result(json!({
            "interfaces": [{ "name": "cni0" }, { "name": "eth0", "sandbox": "/n" }],
            "ips": [{ "address": "10.1.0.5/16", "interface": 1, "gateway": "10.1.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0" }]
        }));
        let routes = vec![
            route("0.0.0.0/0", Some("10.1.0.1"), false),
            route("10.1.0.0/16", None, true),
        ];
        let plan = plan(&result, &observed(&["10.1.0.5/16"], routes)).unwrap();
        assert_eq!(plan.interfaces[0].addresses, ["10.1.0.5/16".parse().unwrap()]);
        assert_eq!(shape(&plan), ["0.0.0.0/0 via 10.1.0.1"]);
        assert_eq!(plan.ips, ["10.1.0.5".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_gateway_outside_of_every_subnet_gets_a_route_on_link_before_its_own() {
        let result = result(json!({ "ips": [{ "address": "10.1.0.5/32" }] }));
        let with = vec![
            route("0.0.0.0/0", Some("169.254.1.1"), false),
            route("169.254.1.1/32", None, false),
        ];
        let without = vec![
            route("0.0.0.0/0", Some("169.254.1.1"), false),
            route("::/0", Some("fe80::1"), false),
        ];
        let plan_with = plan(&result, &observed(&["10.1.0.5/32"], with)).unwrap();
        assert_eq!(shape(&plan_with), ["169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1"]);
        let plan_without = plan(&result, &observed(&["10.1.0.5/32"], without)).unwrap();
        assert_eq!(
            shape(&plan_without),
            ["169.254.1.1/32", "0.0.0.0/0 via 169.254.1.1", "::/0 via fe80::1"]
        );
    }

    #[test]
    fn an_address_whose_subnet_route_was_taken_away_becomes_a_host_address() {
        let result = result(json!({ "ips": [{ "address": "10.1.0.5/24" }] }));
        let routes = vec![
            route("10.1.0.0/24", Some("10.1.0.1"), false),
            route("10.1.0.1/32", None, false),
        ];
        let plan = plan(&result, &observed(&["10.1.0.5/24"], routes)).unwrap();
        assert_eq!(plan.interfaces[0].addresses, ["10.1.0.5/32".parse().unwrap()]);
        assert_eq!(shape(&plan), ["10.1.0.1/32", "10.1.0.0/24 via 10.1.0.1"]);
    }

    #[test]
    fn a_kernel_without_routes_leaves_those_of_the_result() {
        let result = result(json!({
            "ips": [{ "address": "10.1.0.5/24", "gateway": "10.1.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "10.9.0.0/16", "scope": 253 }]
        }));
        let plan = plan(&result, &observed(&[], Vec::new())).unwrap();
        assert_eq!(plan.interfaces[0].addresses, ["10.1.0.5/24".parse().unwrap()]);
        assert_eq!(shape(&plan), ["10.9.0.0/16", "0.0.0.0/0 via 10.1.0.1"]);
    }

    #[test]
    fn an_interface_that_is_missing_or_not_ethernet_is_refused_by_name() {
        let named = result(json!({ "interfaces": [{ "name": "net1", "sandbox": "/n" }] }));
        assert_eq!(
            plan(&named, &observed(&[], Vec::new())),
            Err(PlanError::Missing("net1".into()))
        );
        let mut other = observed(&[], Vec::new());
        other.links.get_mut("eth0").unwrap().is_ethernet = false;
        assert_eq!(
            plan(&AddResult::default(), &other),
            Err(PlanError::NotEthernet("eth0".into()))
        );
    }
}
