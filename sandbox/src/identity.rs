//! What makes a booted VM this pod: its identity in the words of the guest protocol, translated from the pod's specification and its
//! network.

use std::{collections::HashMap, fs, time::SystemTime};

use caisson_net::PodNetwork;

use crate::{SandboxError, guest, journal::PodRecord, scratch};

/// /dev/shm of a pod without a limit.
const USUAL_SHM_BYTES: u64 = 64 << 20;

/// Bytes of entropy for the guest's random pool.
const ENTROPY_BYTES: usize = 64;

/// The request that configures a pod's VM.
pub(crate) fn request(
    record: &PodRecord,
    network: &PodNetwork,
    now: SystemTime,
) -> Result<guest::ConfigureSandboxRequest, SandboxError> {
    let spec = &record.spec;
    let realtime = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    Ok(guest::ConfigureSandboxRequest {
        sandbox_id: record.id.0.clone(),
        hostname: spec.hostname.clone(),
        dns: Some(dns(record, network)),
        interfaces: network.interfaces.iter().map(interface).collect(),
        routes: network.routes.iter().map(route).collect(),
        neighbours: network
            .neighbours
            .iter()
            .map(|neighbour| guest::Neighbour {
                address: neighbour.address.to_string(),
                mac: neighbour.mac.to_vec(),
                interface: neighbour.interface.clone(),
            })
            .collect(),
        sysctls: spec
            .sysctls
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect::<HashMap<_, _>>(),
        share_pid_namespace: spec.share_pid_namespace,
        scratch_serial: scratch::SERIAL.into(),
        realtime_nanos: u64::try_from(realtime).unwrap_or(0),
        entropy: entropy()?,
        shm_bytes: shm_bytes(spec.limits.memory_bytes),
        user_namespace: spec.user_namespace.clone(),
    })
}

/// Bytes of the pod's /dev/shm: what programs expect of any runtime, and as much as the pod's limit where that is more. What is written
/// there is charged to the container that writes, so its own limit holds all the same.
fn shm_bytes(limit: Option<u64>) -> u64 {
    limit.unwrap_or(0).max(USUAL_SHM_BYTES)
}

fn interface(interface: &caisson_net::GuestInterface) -> guest::Interface {
    guest::Interface {
        name: interface.name.clone(),
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface.addresses.iter().map(ToString::to_string).collect(),
    }
}

fn route(route: &caisson_net::GuestRoute) -> guest::Route {
    guest::Route {
        destination: route.destination.to_string(),
        gateway: route
            .gateway
            .map(|gateway| gateway.to_string())
            .unwrap_or_default(),
        interface: route.interface.clone(),
        mtu: route.mtu.unwrap_or(0),
        priority: route.priority.unwrap_or(0),
        scope: route.scope.map_or(0, u32::from),
    }
}

fn entropy() -> Result<Vec<u8>, SandboxError> {
    let mut bytes = [0_u8; ENTROPY_BYTES];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| SandboxError::io("read the host's random pool")(errno.into()))?;
    }
    Ok(bytes.to_vec())
}

/// What the pod asked for, else what the CNI plugins said, else what the host has.
fn dns(record: &PodRecord, network: &PodNetwork) -> guest::DnsConfig {
    if let Some(dns) = &record.spec.dns {
        return dns.clone();
    }
    let cni = &network.dns;
    if !cni.servers.is_empty() {
        return guest::DnsConfig {
            servers: cni.servers.clone(),
            searches: cni.searches.clone(),
            options: cni.options.clone(),
        };
    }
    parse_resolv_conf(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

/// resolv.conf(5): the last `search` or `domain` wins, `options` add up.
fn parse_resolv_conf(text: &str) -> guest::DnsConfig {
    let mut dns = guest::DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let values = words
            .take_while(|word| !word.starts_with(['#', ';']))
            .map(str::to_owned);
        match key {
            "nameserver" => dns.servers.extend(values.take(1)),
            "search" | "domain" => dns.searches = values.collect(),
            "options" => dns.options.extend(values),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_as_its_manual_says() {
        let dns = parse_resolv_conf(
            "# comment\nnameserver 10.0.0.1\nnameserver fd00::1 # second\ndomain a\nsearch b c\noptions ndots:5\noptions edns0\n",
        );
        assert_eq!(dns.servers, ["10.0.0.1", "fd00::1"]);
        assert_eq!(dns.searches, ["b", "c"]);
        assert_eq!(dns.options, ["ndots:5", "edns0"]);
    }

    #[test]
    fn every_vm_gets_other_entropy() {
        let (a, b) = (entropy().unwrap(), entropy().unwrap());
        assert_eq!(a.len(), ENTROPY_BYTES);
        assert_ne!(a, b);
    }
}
