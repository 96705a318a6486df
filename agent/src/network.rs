//! Gives the guest's interfaces their names, addresses, routes and neighbours, as the request says. Everything is checked before
//! anything is changed; doing it twice changes nothing.

use std::{collections::HashMap, net::IpAddr};

use caisson_agent_api::v1;

use crate::{
    devices,
    error::{AgentError, At},
    netlink::{Netlink, Network, Route, SCOPE_LINK, SCOPE_UNIVERSE},
};

/// Longest interface name in bytes.
const MAX_NAME: usize = 15;

/// A request whose every part has been understood.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    interfaces: Vec<Interface>,
    /// With the interface's name; what a gateway is reached by comes before the gateway.
    routes: Vec<(String, Route)>,
    neighbours: Vec<(String, IpAddr, Vec<u8>)>,
}

#[derive(Debug, PartialEq, Eq)]
struct Interface {
    name: String,
    mac: Vec<u8>,
    mtu: u32,
    addresses: Vec<Network>,
}

/// Checks everything. Pure.
pub(crate) fn plan(request: &v1::ConfigureSandboxRequest) -> Result<Plan, AgentError> {
    let mut plan = Plan::default();
    for wanted in &request.interfaces {
        check_name("interfaces.name", &wanted.name)?;
        plan.interfaces.push(Interface {
            name: wanted.name.clone(),
            mac: check_mac("interfaces.mac", &wanted.mac)?,
            mtu: wanted.mtu,
            addresses: wanted
                .addresses
                .iter()
                .map(|address| network("interfaces.addresses", address))
                .collect::<Result<_, _>>()?,
        });
    }
    for wanted in &request.routes {
        check_name("routes.interface", &wanted.interface)?;
        let gateway = Some(wanted.gateway.as_str()).filter(|gateway| !gateway.is_empty());
        let gateway = gateway
            .map(|gateway| address("routes.gateway", gateway))
            .transpose()?;
        let scope = match (wanted.scope, gateway) {
            (0, None) => SCOPE_LINK,
            (0, Some(_)) => SCOPE_UNIVERSE,
            (scope, _) => u8::try_from(scope)
                .map_err(|_| AgentError::invalid("routes.scope", format!("{scope} is over 255")))?,
        };
        let route = Route {
            destination: network("routes.destination", &wanted.destination)?,
            gateway,
            interface: 0,
            mtu: wanted.mtu,
            priority: wanted.priority,
            scope,
        };
        plan.routes.push((wanted.interface.clone(), route));
    }
    plan.routes.sort_by_key(|(_, route)| route.gateway.is_some());
    for wanted in &request.neighbours {
        check_name("neighbours.interface", &wanted.interface)?;
        let address = address("neighbours.address", &wanted.address)?;
        let mac = check_mac("neighbours.mac", &wanted.mac)?;
        plan.neighbours.push((wanted.interface.clone(), address, mac));
    }
    Ok(plan)
}

fn check_name(field: &'static str, name: &str) -> Result<(), AgentError> {
    let word = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if !name.is_empty() && name.len() <= MAX_NAME && name != "." && name != ".." && name.bytes().all(word) {
        return Ok(());
    }
    Err(AgentError::invalid(
        field,
        format!("{name:?} is not an interface name"),
    ))
}

fn check_mac(field: &'static str, mac: &[u8]) -> Result<Vec<u8>, AgentError> {
    if mac.len() == 6 {
        return Ok(mac.to_vec());
    }
    Err(AgentError::invalid(
        field,
        format!("a MAC has 6 bytes, not {}", mac.len()),
    ))
}

fn address(field: &'static str, text: &str) -> Result<IpAddr, AgentError> {
    text.parse()
        .map_err(|_| AgentError::invalid(field, format!("{text:?} is not an IP address")))
}

fn network(field: &'static str, text: &str) -> Result<Network, AgentError> {
    let bad = || AgentError::invalid(field, format!("{text:?} is not an address with a prefix length"));
    let (left, right) = text.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = left.parse().map_err(|_| bad())?;
    let prefix: u8 = right.parse().map_err(|_| bad())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix > longest {
        return Err(bad());
    }
    Ok(Network { address, prefix })
}

/// Applies a plan, and brings loopback up. Blocking.
pub(crate) fn apply(plan: &Plan) -> Result<(), AgentError> {
    let mut netlink = Netlink::open().at(|| "opening a netlink socket")?;
    let mut indexes = HashMap::new();
    if let Some(lo) = devices::interface_index("lo") {
        netlink.up(lo).at(|| "bringing lo up")?;
        indexes.insert("lo".to_owned(), lo);
    }
    for wanted in &plan.interfaces {
        let name = &wanted.name;
        let index = named(&mut netlink, wanted)?;
        if wanted.mtu > 0 {
            netlink
                .mtu(index, wanted.mtu)
                .at(|| format!("setting the MTU of {name} to {}", wanted.mtu))?;
        }
        for network in &wanted.addresses {
            netlink
                .address(index, *network)
                .at(|| format!("adding {}/{} to {name}", network.address, network.prefix))?;
        }
        netlink.up(index).at(|| format!("bringing {name} up"))?;
        indexes.insert(name.clone(), index);
    }
    let find = |name: &str| {
        let missing = || AgentError::invalid("interface", format!("there is no {name}"));
        indexes.get(name).copied().ok_or_else(missing)
    };
    for (name, route) in &plan.routes {
        let route = Route {
            interface: find(name)?,
            ..*route
        };
        let to = route.destination;
        netlink.route(&route).at(|| match route.gateway {
            Some(gateway) => format!(
                "adding the route to {}/{} by {gateway} on {name}",
                to.address, to.prefix
            ),
            None => format!("adding the route to {}/{} on {name}", to.address, to.prefix),
        })?;
    }
    for (name, address, mac) in &plan.neighbours {
        netlink
            .neighbour(find(name)?, *address, mac)
            .at(|| format!("adding the neighbour {address} on {name}"))?;
    }
    Ok(())
}

/// Finds the interface by its MAC and gives it its name, moving another one out of the way.
fn named(netlink: &mut Netlink, wanted: &Interface) -> Result<u32, AgentError> {
    let (current, index) = devices::interface(&wanted.mac)?;
    if current == wanted.name {
        return Ok(index);
    }
    if let Some(other) = devices::interface_index(&wanted.name) {
        netlink
            .down(other)
            .at(|| format!("taking {} down", wanted.name))?;
        netlink
            .rename(other, &format!("moved{other}"))
            .at(|| format!("moving {} away", wanted.name))?;
    }
    netlink.down(index).at(|| format!("taking {current} down"))?;
    netlink
        .rename(index, &wanted.name)
        .at(|| format!("renaming {current} to {}", wanted.name))?;
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> v1::ConfigureSandboxRequest {
        v1::ConfigureSandboxRequest {
            interfaces: vec![v1::Interface {
                name: "eth0".into(),
                mac: vec![2, 0, 0, 0, 0, 1],
                mtu: 1500,
                addresses: vec!["10.88.0.5/16".into(), "fd00::5/64".into()],
            }],
            routes: vec![
                v1::Route {
                    destination: "0.0.0.0/0".into(),
                    gateway: "10.88.0.1".into(),
                    interface: "eth0".into(),
                    ..v1::Route::default()
                },
                v1::Route {
                    destination: "10.88.0.1/32".into(),
                    interface: "eth0".into(),
                    ..v1::Route::default()
                },
            ],
            ..v1::ConfigureSandboxRequest::default()
        }
    }

    #[test]
    fn what_a_gateway_is_reached_by_comes_first() {
        let plan = plan(&request()).unwrap();
        let scopes: Vec<_> = plan
            .routes
            .iter()
            .map(|(_, route)| (route.gateway.is_some(), route.scope))
            .collect();
        assert_eq!(scopes, [(false, SCOPE_LINK), (true, SCOPE_UNIVERSE)]);
    }

    #[test]
    fn malformed_parts_are_named_by_field() {
        type Break = fn(&mut v1::ConfigureSandboxRequest);
        let breaks: [(&str, Break); 6] = [
            ("interfaces.name", |r| r.interfaces[0].name = "a/b".into()),
            ("interfaces.mac", |r| r.interfaces[0].mac = vec![1; 5]),
            ("interfaces.addresses", |r| {
                r.interfaces[0].addresses = vec!["10.0.0.1/33".into()]
            }),
            ("routes.gateway", |r| r.routes[0].gateway = "nowhere".into()),
            ("routes.destination", |r| {
                r.routes[0].destination = "default".into()
            }),
            ("routes.scope", |r| r.routes[0].scope = 256),
        ];
        for (field, damage) in breaks {
            let mut request = request();
            damage(&mut request);
            assert!(
                plan(&request).unwrap_err().to_string().starts_with(field),
                "{field}"
            );
        }
    }
}
