//! A pod's network wishes: DNS, host ports, bandwidth annotations, and the words that go to CNI plugins.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use caisson_cri_api::v1;
use caisson_net::{PodNetworkSpec, PortMapping};
use caisson_sandbox::{guest, spec::PodIdentity};

use super::Refusals;

/// Bits per second towards the pod, as kubelet and the bandwidth plugin know it.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Bits per second from the pod.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// What CNI is told. The sandbox adds K8S_POD_INFRA_CONTAINER_ID when the pod has its id.
pub(super) fn network(
    identity: &PodIdentity,
    ports: &[v1::PortMapping],
    annotations: &HashMap<String, String>,
    cgroup_parent: Option<&str>,
    refusals: &mut Refusals,
) -> PodNetworkSpec {
    let mut rate = |name: &str| {
        let text = annotations.get(name)?;
        match bits_per_second(text) {
            Ok(rate) => Some(rate),
            Err(reason) => {
                refusals.add(format!("config.annotations[{name:?}]"), reason);
                None
            }
        }
    };
    let (ingress_rate, egress_rate) = (rate(INGRESS), rate(EGRESS));
    PodNetworkSpec {
        port_mappings: port_mappings(ports, refusals),
        ingress_rate,
        egress_rate,
        args: BTreeMap::from(
            [
                ("IgnoreUnknown", "1"),
                ("K8S_POD_NAME", identity.name.as_str()),
                ("K8S_POD_NAMESPACE", identity.namespace.as_str()),
                ("K8S_POD_UID", identity.uid.as_str()),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        ),
        cgroup_path: cgroup_parent.map(str::to_owned),
    }
}

/// Ports without a host port need nothing: the pod is reached by its address.
fn port_mappings(ports: &[v1::PortMapping], refusals: &mut Refusals) -> Vec<PortMapping> {
    let mut mappings = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let field = format!("config.port_mappings[{index}]");
        if port.host_port == 0 {
            continue;
        }
        let mut number = |name: &str, value: i32| {
            u16::try_from(value)
                .ok()
                .filter(|port| *port > 0)
                .unwrap_or_else(|| {
                    refusals.add(format!("{field}.{name}"), format!("{value} is not a port"));
                    0
                })
        };
        let (host_port, container_port) = (
            number("host_port", port.host_port),
            number("container_port", port.container_port),
        );
        let protocol = match v1::Protocol::try_from(port.protocol) {
            Ok(protocol) => protocol.as_str_name().to_ascii_lowercase(),
            Err(_) => {
                refusals.add(
                    format!("{field}.protocol"),
                    format!("unknown protocol {}", port.protocol),
                );
                continue;
            }
        };
        let host_ip = match port.host_ip.as_str() {
            "" => None,
            text => match text.parse::<IpAddr>() {
                Ok(address) => Some(address),
                Err(_) => {
                    refusals.add(
                        format!("{field}.host_ip"),
                        format!("{text:?} is not an IP address"),
                    );
                    None
                }
            },
        };
        mappings.push(PortMapping {
            host_port,
            container_port,
            protocol,
            host_ip,
        });
    }
    mappings
}

/// resolv.conf of the pod; `None` when the request says nothing about it.
pub(super) fn dns(config: Option<&v1::DnsConfig>, refusals: &mut Refusals) -> Option<guest::DnsConfig> {
    let config = config?;
    if config.servers.is_empty() && config.searches.is_empty() && config.options.is_empty() {
        return None;
    }
    for (index, server) in config.servers.iter().enumerate() {
        // A zone is legal in resolv.conf (fe80::1%eth0).
        let address = server
            .split_once('%')
            .map_or(server.as_str(), |(address, _)| address);
        if address.parse::<IpAddr>().is_err() {
            refusals.add(
                format!("config.dns_config.servers[{index}]"),
                format!("{server:?} is not an IP address"),
            );
        }
    }
    for (name, words) in [("searches", &config.searches), ("options", &config.options)] {
        for (index, word) in words.iter().enumerate() {
            if word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control()) {
                refusals.add(
                    format!("config.dns_config.{name}[{index}]"),
                    format!("{word:?} is not one word"),
                );
            }
        }
    }
    Some(guest::DnsConfig {
        servers: config.servers.clone(),
        searches: config.searches.clone(),
        options: config.options.clone(),
    })
}

/// A bandwidth as a Kubernetes quantity, within the bounds that kubelet keeps (1k to 1P).
fn bits_per_second(text: &str) -> Result<u64, String> {
    let value = quantity(text).ok_or_else(|| format!("{text:?} is not a quantity"))?;
    if (1_000..=1_000_000_000_000_000).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{text:?} is not between 1k and 1P bits per second"))
    }
}

/// A whole number out of a Kubernetes quantity: decimal digits with an optional fraction, then a suffix or exponent; rounded up.
fn quantity(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || fraction.contains('.') {
        return None;
    }
    let mantissa: u128 = digits.parse().ok().filter(|value| *value < 1 << 80)?;
    let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let (times, by): (u128, u128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => exponent_factor(exponent)?,
    };
    let value = mantissa.checked_mul(times)?.div_ceil(scale.checked_mul(by)?);
    u64::try_from(value).ok()
}

fn exponent_factor(text: &str) -> Option<(u128, u128)> {
    let exponent: i32 = text.strip_prefix(['e', 'E'])?.parse().ok()?;
    let factor = 10u128.checked_pow(exponent.unsigned_abs().min(40))?;
    Some(if exponent < 0 { (1, factor) } else { (factor, 1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        let cases = [
            ("10M", Some(10_000_000)),
            ("1Gi", Some(1 << 30)),
            ("1.5k", Some(1_500)),
            (".5M", Some(500_000)),
            ("1e6", Some(1_000_000)),
            ("2E3", Some(2_000)),
            ("1500m", Some(2)),
            ("100", Some(100)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("", None),
            ("M", None),
            ("1..2", None),
            ("-1M", None),
            ("1Zi", None),
            ("99999999999999999999999999E", None),
        ];
        for (text, value) in cases {
            assert_eq!(quantity(text), value, "{text}");
        }
        assert!(bits_per_second("100").is_err() && bits_per_second("2P").is_err());
    }

    #[test]
    fn only_ports_with_a_host_port_are_mapped_and_wrong_ones_named() {
        let port = |host_port, container_port, protocol, host_ip: &str| v1::PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: host_ip.into(),
        };
        let mut refusals = Refusals::default();
        let mapped = port_mappings(
            &[
                port(0, 80, 0, ""),
                port(8080, 80, 1, "127.0.0.1"),
                port(53, 53, 2, "::1"),
            ],
            &mut refusals,
        );
        refusals.settle(()).unwrap();
        assert_eq!(mapped.len(), 2);
        assert_eq!((mapped[0].host_port, mapped[0].protocol.as_str()), (8080, "udp"));
        assert_eq!(mapped[1].protocol, "sctp");

        let mut refusals = Refusals::default();
        port_mappings(
            &[port(-1, 80, 0, ""), port(1, 70_000, 0, "here"), port(1, 1, 9, "")],
            &mut refusals,
        );
        let fields: Vec<&str> = refusals.list().iter().map(|r| r.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "config.port_mappings[0].host_port",
                "config.port_mappings[1].container_port",
                "config.port_mappings[1].host_ip",
                "config.port_mappings[2].protocol"
            ]
        );
    }

    #[test]
    fn dns_that_could_inject_a_line_is_refused() {
        let config = v1::DnsConfig {
            servers: vec!["10.0.0.10".into(), "fe80::1%eth0".into(), "nameserver".into()],
            searches: vec!["a.b".into(), "x\nnameserver 6.6.6.6".into()],
            options: vec!["ndots:5".into(), String::new()],
        };
        let mut refusals = Refusals::default();
        dns(Some(&config), &mut refusals);
        let fields: Vec<&str> = refusals.list().iter().map(|r| r.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "config.dns_config.servers[2]",
                "config.dns_config.searches[1]",
                "config.dns_config.options[1]"
            ]
        );
        assert_eq!(
            dns(Some(&v1::DnsConfig::default()), &mut Refusals::default()),
            None
        );
    }
}
