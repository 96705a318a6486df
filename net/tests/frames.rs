//! Pods on networks of the reference plugins: real frames between the host and the guest's taps, and nothing left afterwards.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod node;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::OwnedFd,
};

use caisson_net::{PodNetworkSpec, PortMapping};
use node::{PATIENCE, on_a_node, run, run_in, until};
use serde_json::{Value, json};

const VNET_HEADER: usize = 10;

/// The guest's end of a tap.
struct Guest(File);

impl Guest {
    fn new(tap: OwnedFd) -> Self {
        Self(tap.into())
    }

    /// The next frame for which `wanted` holds; others are dropped.
    async fn receive(&mut self, what: &str, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut buffer = [0; 9000];
        let mut found = Vec::new();
        until(what, || match self.0.read(&mut buffer) {
            Ok(length) => {
                found = buffer[VNET_HEADER..length].to_vec();
                wanted(&found)
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
                false
            }
        })
        .await;
        found
    }

    fn send(&mut self, frame: &[u8]) {
        let bytes = [&[0; VNET_HEADER], frame].concat();
        assert_eq!(self.0.write(&bytes).unwrap(), bytes.len());
    }
}

fn has(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

fn mac_of(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn udp_frame(macs: ([u8; 6], [u8; 6]), ips: (Ipv4Addr, Ipv4Addr), port: u16, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = macs;
    let length = u16::try_from(payload.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((28 + length).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(ips.0.octets());
    ip.extend(ips.1.octets());
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [
        9999_u16.to_be_bytes(),
        port.to_be_bytes(),
        (8 + length).to_be_bytes(),
        [0, 0],
    ]
    .concat();
    [&destination[..], &source, &[8, 0], &ip, &udp, payload].concat()
}

fn link(netns: &std::path::Path, name: &str) -> Value {
    let all: Value =
        serde_json::from_str(&run_in(netns, &["ip", "-j", "-s", "-d", "link", "show", name])).unwrap();
    all[0].clone()
}

#[test]
fn a_pod_on_a_dual_stack_bridge_exchanges_frames_with_the_host_and_leaves_nothing() {
    on_a_node(async |node| {
        node.write_conflist(
            "1.0.0",
            &[
                node.bridge(),
                json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
            ],
        );
        node.network.status().await.unwrap();
        let port = PortMapping {
            host_port: 18080,
            container_port: 8080,
            protocol: "udp".into(),
            host_ip: None,
        };
        let spec = PodNetworkSpec {
            port_mappings: vec![port],
            ..PodNetworkSpec::default()
        };
        node.warm_up(&spec).await;
        let before = node.inventory();
        assert!(before["links"].contains("cni0"));

        let mut network = node.network.setup("pod-1", &spec).await.unwrap();
        assert_ne!(node.inventory(), before);

        // What the guest is told.
        assert_eq!(network.netns, node.config.netns_dir.join("pod-1"));
        let interface = network.interfaces.remove(0);
        assert!(network.interfaces.is_empty());
        assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1420));
        let (IpAddr::V4(pod4), IpAddr::V6(pod6)) = (network.ips[0], network.ips[1]) else {
            panic!("{:?}", network.ips)
        };
        assert_eq!(
            interface.addresses,
            [
                format!("{pod4}/16").parse().unwrap(),
                format!("{pod6}/64").parse().unwrap()
            ]
        );
        let routes: Vec<_> = network
            .routes
            .iter()
            .map(|r| (r.destination.to_string(), r.gateway.unwrap().to_string()))
            .collect();
        let expected = [("0.0.0.0/0", "10.88.0.1"), ("::/0", "fd00:88::1")];
        assert_eq!(routes, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let eth = link(&network.netns, "eth0");
        assert_eq!(eth["address"], text_of(interface.mac));
        let tap = link(&network.netns, "tap0");
        assert_eq!(
            (&tap["mtu"], &tap["linkinfo"]["info_kind"]),
            (&json!(1420), &json!("tun"))
        );
        for name in ["eth0", "tap0"] {
            let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
            assert_eq!(run_in(&network.netns, &["cat", &path]).trim(), "1", "{name}");
        }
        assert!(run_in(&network.netns, &["ip", "-o", "link", "show", "lo"]).contains("UP"));

        // ARP reaches the guest, and the namespace's own stack does not answer beside it.
        let mut guest = Guest::new(interface.tap.into_iter().next().unwrap());
        let sent = link(&network.netns, "eth0")["stats64"]["tx"]["packets"].clone();
        let host = UdpSocket::bind("10.88.0.1:0").unwrap();
        host.send_to(b"unresolved", (pod4, 7)).unwrap();
        guest
            .receive("an ARP request", |frame| {
                frame[12..14] == [8, 6] && has(frame, &pod4.octets())
            })
            .await;
        assert_eq!(link(&network.netns, "eth0")["stats64"]["tx"]["packets"], sent);

        // Host to guest.
        let mac = text_of(interface.mac);
        run(
            "ip",
            &[
                "neigh",
                "replace",
                &pod4.to_string(),
                "lladdr",
                &mac,
                "dev",
                "cni0",
            ],
        );
        run(
            "ip",
            &[
                "neigh",
                "replace",
                &pod6.to_string(),
                "lladdr",
                &mac,
                "dev",
                "cni0",
            ],
        );
        host.send_to(b"over IPv4", (pod4, 7)).unwrap();
        let frame = guest
            .receive("UDP over IPv4", |frame| has(frame, b"over IPv4"))
            .await;
        assert_eq!(frame[..6], interface.mac);
        // The bridge plugin leaves the bridge's own address to duplicate address detection.
        until("the bridge's IPv6 address is usable", || {
            UdpSocket::bind("[fd00:88::1]:0").is_ok()
        })
        .await;
        let host6 = UdpSocket::bind("[fd00:88::1]:0").unwrap();
        host6.send_to(b"over IPv6", (pod6, 7)).unwrap();
        guest
            .receive("UDP over IPv6", |frame| has(frame, b"over IPv6"))
            .await;

        // The host's port leads to the guest's.
        host.send_to(b"to the host port", ("10.88.0.1", 18080)).unwrap();
        let frame = guest
            .receive("UDP to the host port", |frame| has(frame, b"to the host port"))
            .await;
        assert_eq!(frame[36..38], 8080_u16.to_be_bytes());
        assert_eq!(frame[30..34], pod4.octets());

        // Guest to host.
        let bridge: Value = serde_json::from_str(&run("ip", &["-j", "link", "show", "cni0"])).unwrap();
        let macs = (interface.mac, mac_of(bridge[0]["address"].as_str().unwrap()));
        let ips = (pod4, "10.88.0.1".parse().unwrap());
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.send(&udp_frame(
            macs,
            ips,
            host.local_addr().unwrap().port(),
            b"from the guest",
        ));
        let mut buffer = [0; 100];
        let (length, from) = host.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], from.ip()),
            (&b"from the guest"[..], IpAddr::V4(pod4))
        );

        drop(guest);
        run("ip", &["neigh", "flush", "dev", "cni0", "nud", "permanent"]);
        node.network.teardown("pod-1", &spec).await.unwrap();
        assert_eq!(node.inventory(), before);
    });
}

#[test]
fn two_pods_reach_each_other_through_their_taps() {
    on_a_node(async |node| {
        node.write_conflist("0.4.0", &[node.bridge()]);
        let spec = PodNetworkSpec::default();
        let (a, b) = tokio::join!(node.network.setup("a", &spec), node.network.setup("b", &spec));
        let (a, b) = (a.unwrap(), b.unwrap());
        let (IpAddr::V4(ip_a), IpAddr::V4(ip_b)) = (a.ips[0], b.ips[0]) else {
            panic!("{:?} {:?}", a.ips, b.ips)
        };
        let (a, b) = (
            a.interfaces.into_iter().next().unwrap(),
            b.interfaces.into_iter().next().unwrap(),
        );
        let (mut guest_a, mut guest_b) = (
            Guest::new(a.tap.into_iter().next().unwrap()),
            Guest::new(b.tap.into_iter().next().unwrap()),
        );
        guest_a.send(&udp_frame((a.mac, b.mac), (ip_a, ip_b), 7, b"there"));
        guest_b.receive("from a", |frame| has(frame, b"there")).await;
        guest_b.send(&udp_frame((b.mac, a.mac), (ip_b, ip_a), 7, b"and back"));
        guest_a.receive("from b", |frame| has(frame, b"and back")).await;
        for id in ["a", "b"] {
            node.network.teardown(id, &spec).await.unwrap();
        }
    });
}

#[test]
fn a_guest_on_a_ptp_network_gets_the_kernels_routes_and_leaves_nothing() {
    on_a_node(async |node| {
        node.write_conflist(
            "0.3.1",
            &[json!({ "type": "ptp", "ipMasq": true, "mtu": 1400, "ipam": node.ipam() })],
        );
        node.warm_up(&PodNetworkSpec::default()).await;
        let before = node.inventory();
        let spec = PodNetworkSpec::default();
        let network = node.network.setup("pod", &spec).await.unwrap();
        let v4: Vec<_> = network
            .routes
            .iter()
            .filter(|route| route.destination.addr().is_ipv4())
            .collect();
        let shape: Vec<_> = v4
            .iter()
            .map(|route| {
                (
                    route.destination.to_string(),
                    route.gateway.map(|g| g.to_string()),
                )
            })
            .collect();
        assert_eq!(shape[0], ("10.88.0.1/32".to_owned(), None), "{shape:?}");
        let rest: std::collections::BTreeSet<_> = shape[1..].iter().cloned().collect();
        let gateway = Some("10.88.0.1".to_owned());
        assert_eq!(
            rest,
            [
                ("0.0.0.0/0".to_owned(), gateway.clone()),
                ("10.88.0.0/16".to_owned(), gateway)
            ]
            .into()
        );
        // The subnet is behind the gateway, so the guest's kernel must not make a route for it.
        assert_eq!(network.interfaces[0].addresses[0].prefix_len(), 32);
        assert_eq!(network.interfaces[0].mtu, 1400);
        drop(network);
        node.network.teardown("pod", &spec).await.unwrap();
        until("everything is gone", || node.inventory() == before).await;
    });
}
