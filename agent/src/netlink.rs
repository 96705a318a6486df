//! The few rtnetlink messages that a guest's network needs, as typed verbs over one socket. Blocking.
//!
//! Must not know the guest protocol: addresses and indexes come in, kernel errors go out. (rtnetlink(7), linux/rtnetlink.h)

use std::{io, net::IpAddr, os::fd::OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
    send, socket_with,
};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;

const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_PERMANENT: u32 = 0x80;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTAX_MTU: u16 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
/// Reachable through a gateway.
pub(crate) const SCOPE_UNIVERSE: u8 = 0;
/// On the link itself.
pub(crate) const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) destination: Network,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) interface: u32,
    /// 0: the interface's.
    pub(crate) mtu: u32,
    /// 0: the kernel's choice.
    pub(crate) priority: u32,
    /// RT_SCOPE_*.
    pub(crate) scope: u8,
}

/// A message that is being built.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16, header: &[&[u8]]) -> Self {
        Self {
            kind,
            flags,
            body: header.concat(),
        }
    }

    /// Appends an attribute: length, type, value, padding to four bytes.
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.body.extend(length.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(self.body.len().next_multiple_of(4), 0);
        self
    }

    fn encode(&self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.body.len() + 16).unwrap_or(u32::MAX);
        let flags = self.flags | NLM_F_REQUEST | NLM_F_ACK;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        bytes
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(four) => four.octets().to_vec(),
        IpAddr::V6(six) => six.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    u8::try_from(family.as_raw()).unwrap_or(0)
}

/// Header of a link message: family, padding, type, index, flags, change mask.
fn link(index: u32, flags: u32, mask: u32) -> Message {
    let header = [
        0u32.to_ne_bytes(),
        index.to_ne_bytes(),
        flags.to_ne_bytes(),
        mask.to_ne_bytes(),
    ]
    .concat();
    Message::new(RTM_NEWLINK, 0, &[&header])
}

fn address_message(index: u32, network: Network) -> Message {
    // The old flags byte has room for NODAD too; PERMANENT is the kernel's to set.
    let flags = u8::try_from(IFA_F_NODAD | IFA_F_PERMANENT).unwrap_or(0);
    let scope = if network.address.is_loopback() {
        SCOPE_HOST
    } else {
        SCOPE_UNIVERSE
    };
    let header = [family(network.address), network.prefix, flags, scope];
    let bytes = octets(network.address);
    let message = Message::new(
        RTM_NEWADDR,
        NLM_F_CREATE | NLM_F_REPLACE,
        &[&header, &index.to_ne_bytes()],
    )
    .attribute(IFA_LOCAL, &bytes)
    .attribute(IFA_ADDRESS, &bytes)
    .attribute(IFA_FLAGS, &(IFA_F_NODAD | IFA_F_PERMANENT).to_ne_bytes());
    match network.address {
        IpAddr::V4(four) if network.prefix < 31 => {
            let hosts = u32::MAX.checked_shr(u32::from(network.prefix)).unwrap_or(0);
            let broadcast = u32::from(four) | hosts;
            message.attribute(IFA_BROADCAST, &broadcast.to_be_bytes())
        }
        _ => message,
    }
}

fn route_message(route: &Route) -> Message {
    let destination = route.destination;
    let header = [
        family(destination.address),
        destination.prefix,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_BOOT,
        route.scope,
        RTN_UNICAST,
    ];
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &[&header, &[0; 4]])
        .attribute(RTA_OIF, &route.interface.to_ne_bytes());
    if destination.prefix > 0 {
        message = message.attribute(RTA_DST, &octets(destination.address));
    }
    if let Some(gateway) = route.gateway {
        message = message.attribute(RTA_GATEWAY, &octets(gateway));
    }
    if route.priority > 0 {
        message = message.attribute(RTA_PRIORITY, &route.priority.to_ne_bytes());
    }
    if route.mtu > 0 {
        let metric = Message::new(0, 0, &[]).attribute(RTAX_MTU, &route.mtu.to_ne_bytes());
        message = message.attribute(RTA_METRICS, &metric.body);
    }
    message
}

fn neighbour_message(index: u32, address: IpAddr, mac: &[u8]) -> Message {
    let header = [
        [family(address), 0, 0, 0].as_slice(),
        &index.to_ne_bytes(),
        &NUD_PERMANENT.to_ne_bytes(),
        &[0, RTN_UNICAST],
    ]
    .concat();
    Message::new(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &[&header])
        .attribute(NDA_DST, &octets(address))
        .attribute(NDA_LLADDR, mac)
}

/// A connection to the kernel's routing tables.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    fn request(&mut self, message: &Message) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        send(&self.socket, &message.encode(self.sequence), SendFlags::empty())?;
        let mut buffer = [0u8; 8192];
        loop {
            let (count, _) = match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            if let Some(code) = acknowledgement(buffer.get(..count).unwrap_or_default(), self.sequence) {
                return if code == 0 {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(-code))
                };
            }
        }
    }

    /// Brings an interface up.
    pub(crate) fn up(&mut self, index: u32) -> io::Result<()> {
        self.request(&link(index, IFF_UP, IFF_UP))
    }

    /// Takes an interface down.
    pub(crate) fn down(&mut self, index: u32) -> io::Result<()> {
        self.request(&link(index, 0, IFF_UP))
    }

    /// Renames an interface, which has to be down.
    pub(crate) fn rename(&mut self, index: u32, name: &str) -> io::Result<()> {
        let name = [name.as_bytes(), &[0]].concat();
        self.request(&link(index, 0, 0).attribute(IFLA_IFNAME, &name))
    }

    /// Sets the largest packet, in bytes.
    pub(crate) fn mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.request(&link(index, 0, 0).attribute(IFLA_MTU, &mtu.to_ne_bytes()))
    }

    /// Adds an address that is usable at once: no duplicate detection.
    pub(crate) fn address(&mut self, index: u32, network: Network) -> io::Result<()> {
        self.request(&address_message(index, network))
    }

    /// Adds a route.
    pub(crate) fn route(&mut self, route: &Route) -> io::Result<()> {
        self.request(&route_message(route))
    }

    /// Adds a permanent neighbour.
    pub(crate) fn neighbour(&mut self, index: u32, address: IpAddr, mac: &[u8]) -> io::Result<()> {
        self.request(&neighbour_message(index, address, mac))
    }
}

/// The kernel's answer to the request of this number, if it is in the buffer: 0 or a negative errno.
fn acknowledgement(mut bytes: &[u8], sequence: u32) -> Option<i32> {
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    loop {
        let length = usize::try_from(word(bytes, 0)?).ok()?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        if kind == NLMSG_ERROR && word(bytes, 8)? == sequence {
            return Some(word(bytes, 16)?.cast_signed());
        }
        bytes = bytes.get(length.max(16).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_encoded_as_the_kernel_reads_it() {
        let network = Network {
            address: "10.88.0.5".parse().unwrap(),
            prefix: 16,
        };
        let bytes = address_message(7, network).encode(3);
        assert_eq!(
            usize::try_from(u32::from_ne_bytes(bytes[..4].try_into().unwrap())).unwrap(),
            bytes.len()
        );
        assert_eq!(&bytes[16..20], &[2, 16, 0x82, 0]);
        assert_eq!(&bytes[20..24], &7u32.to_ne_bytes());
        assert_eq!(&bytes[24..32], &[8, 0, 2, 0, 10, 88, 0, 5]);
        assert_eq!(&bytes[bytes.len() - 4..], &[10, 88, 255, 255]);
    }

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let message = Message::new(0, 0, &[]).attribute(3, b"eth0\0").attribute(4, &[1]);
        assert_eq!(message.body.len(), 12 + 8);
        assert_eq!(&message.body[..4], &[9, 0, 3, 0]);
    }

    #[test]
    fn a_default_route_has_no_destination_attribute() {
        let route = Route {
            destination: Network {
                address: "::".parse().unwrap(),
                prefix: 0,
            },
            gateway: Some("fd00::1".parse().unwrap()),
            interface: 2,
            mtu: 1400,
            priority: 0,
            scope: SCOPE_UNIVERSE,
        };
        let body = route_message(&route).body;
        assert_eq!(&body[..8], &[10, 0, 0, 0, 254, 3, 0, 1]);
        assert_eq!(&body[12..20], &[8, 0, 4, 0, 2, 0, 0, 0]);
        assert_eq!(&body[20..24], &[20, 0, 5, 0]);
        assert_eq!(&body[40..], &[12, 0, 8, 0, 8, 0, 2, 0, 120, 5, 0, 0]);
    }

    #[test]
    fn an_answer_is_matched_by_its_number() {
        let answer = |sequence: u32, code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(code.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        let both = [answer(1, -17), answer(2, 0)].concat();
        assert_eq!(acknowledgement(&both, 2), Some(0));
        assert_eq!(acknowledgement(&both, 1), Some(-17));
        assert_eq!(acknowledgement(&both, 3), None);
        assert_eq!(acknowledgement(&[0; 40], 3), None);
        assert_eq!(acknowledgement(&[], 3), None);
    }
}
