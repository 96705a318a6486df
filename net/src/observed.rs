//! What CNI plugins have left in a network namespace, read from the kernel: links, addresses, routes, permanent neighbours.
//!
//! A result of CNI says less than plugins do (Calico's on-link gateway, static neighbours, MTUs, ptp's removed subnet route), so the
//! kernel is the truth and the result the fallback. Only reads. Must not know taps.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
            RouteVia,
        },
    },
};

use crate::{GuestNeighbour, GuestRoute};

/// RT_SCOPE_LINK.
pub(crate) const SCOPE_LINK: u8 = 253;

/// A link of the namespace.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) mac: [u8; 6],
    pub(crate) mtu: u32,
    pub(crate) is_ethernet: bool,
    pub(crate) is_up: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Route {
    pub(crate) route: GuestRoute,
    /// The kernel made it with an address; the guest's kernel will, too.
    pub(crate) is_connected: bool,
}

/// A namespace, as the kernel describes it.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// By name.
    pub(crate) links: BTreeMap<String, Link>,
    /// Name of the interface and address, in the kernel's order; none that the guest would make itself (link-local, from RAs).
    pub(crate) addresses: Vec<(String, IpNet)>,
    pub(crate) routes: Vec<Route>,
    pub(crate) neighbours: Vec<GuestNeighbour>,
}

impl Observed {
    /// Reads the namespace of the handle's socket.
    pub(crate) async fn read(handle: &Handle) -> Result<Self, rtnetlink::Error> {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        let links: BTreeMap<String, Link> = links.iter().filter_map(link).collect();
        let names: BTreeMap<u32, &str> = links
            .iter()
            .map(|(name, link)| (link.index, name.as_str()))
            .collect();

        let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
        let addresses = addresses
            .iter()
            .filter_map(|message| address(message, &names))
            .collect();

        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut routes: Vec<RouteMessage> = handle.route().get(v4).execute().try_collect().await?;
        routes.extend(handle.route().get(v6).execute().try_collect::<Vec<_>>().await?);
        let routes = routes
            .iter()
            .filter_map(|message| route(message, &names))
            .collect();

        let mut neighbours = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let found: Vec<NeighbourMessage> = handle
                .neighbours()
                .get()
                .set_address_family(family)
                .execute()
                .try_collect()
                .await?;
            neighbours.extend(found.iter().filter_map(|message| neighbour(message, &names)));
        }
        Ok(Self {
            addresses,
            routes,
            neighbours,
            links,
        })
    }

    /// Whether the kernel has the subnet route of this address. Plugins may remove it, or add addresses without one.
    pub(crate) fn has_connected_route(&self, interface: &str, address: &IpNet) -> bool {
        self.routes.iter().any(|route| {
            route.is_connected
                && route.route.interface == interface
                && route.route.destination == address.trunc()
        })
    }
}

fn link(message: &LinkMessage) -> Option<(String, Link)> {
    let mut name = None;
    let mut link = Link {
        index: message.header.index,
        mac: [0; 6],
        mtu: 0,
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        is_up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().unwrap_or_default(),
            _ => {}
        }
    }
    Some((name?, link))
}

fn address(message: &AddressMessage, names: &BTreeMap<u32, &str>) -> Option<(String, IpNet)> {
    let name = *names.get(&message.header.index)?;
    let is_dynamic = !message.header.flags.contains(AddressHeaderFlags::Permanent);
    if is_dynamic || message.header.scope != AddressScope::Universe {
        return None;
    }
    // On a point-to-point link `Address` is the peer's.
    let find = |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    Some((name.to_owned(), IpNet::new(ip, message.header.prefix_len).ok()?))
}

fn route(message: &RouteMessage, names: &BTreeMap<u32, &str>) -> Option<Route> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    // The guest hears routers itself.
    if matches!(header.protocol, RouteProtocol::Ra | RouteProtocol::IcmpRedirect) {
        return None;
    }
    let is_v6 = header.address_family == AddressFamily::Inet6;
    let mut destination = if is_v6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    };
    let (mut hop, mut mtu, mut priority) = (Hop::default(), None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = ip_of(to)?,
            RouteAttribute::Priority(value) => priority = Some(*value),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(value) => Some(*value),
                    _ => None,
                });
            }
            // A guest route has one next hop; of several equal ones the first serves.
            RouteAttribute::MultiPath(hops) => {
                if let Some(first) = hops.first() {
                    first.attributes.iter().for_each(|attribute| hop.take(attribute));
                    hop.interface = Some(first.interface_index);
                }
            }
            other => hop.take(other),
        }
    }
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    let route = GuestRoute {
        destination,
        gateway: hop.gateway,
        interface: (*names.get(&hop.interface?)?).to_owned(),
        mtu,
        priority,
        scope: (!is_v6).then(|| header.scope.into()),
    };
    Some(Route {
        route,
        is_connected: header.protocol == RouteProtocol::Kernel,
    })
}

#[derive(Default)]
struct Hop {
    interface: Option<u32>,
    gateway: Option<IpAddr>,
}

impl Hop {
    fn take(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Oif(index) => self.interface = Some(*index),
            RouteAttribute::Gateway(to) => self.gateway = ip_of(to),
            RouteAttribute::Via(RouteVia::Inet(ip)) => self.gateway = Some((*ip).into()),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => self.gateway = Some((*ip).into()),
            _ => {}
        }
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage, names: &BTreeMap<u32, &str>) -> Option<GuestNeighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = (*names.get(&message.header.ifindex)?).to_owned();
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some((*ip).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(GuestNeighbour {
        address: address?,
        mac: mac?,
        interface,
    })
}
