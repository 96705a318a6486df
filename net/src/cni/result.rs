//! What a network has answered to ADD, read tolerantly.
//!
//! The JSON itself is what goes back to plugins; this view only takes from it what the pod needs. One view serves all versions from
//! 0.3.0 on: they differ in fields that may be absent here. Go writes absent lists as null.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct AddResult {
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) interfaces: Vec<ResultInterface>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) ips: Vec<ResultIp>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) routes: Vec<ResultRoute>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) dns: ResultDns,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct ResultInterface {
    pub(crate) name: String,
    /// Path of the namespace; empty or absent for interfaces of the host.
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) sandbox: String,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct ResultIp {
    pub(crate) address: IpNet,
    #[serde(default, deserialize_with = "address_or_none")]
    pub(crate) gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default)]
    pub(crate) interface: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct ResultRoute {
    pub(crate) dst: IpNet,
    #[serde(default, deserialize_with = "address_or_none")]
    pub(crate) gw: Option<IpAddr>,
    #[serde(default)]
    pub(crate) mtu: Option<u32>,
    #[serde(default)]
    pub(crate) priority: Option<u32>,
    #[serde(default)]
    pub(crate) scope: Option<u8>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct ResultDns {
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) nameservers: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) domain: String,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) search: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(crate) options: Vec<String>,
}

impl AddResult {
    pub(crate) fn read(value: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(value)
    }

    /// The interfaces in the pod's namespace, each with its index in the result. Loopback is not among them.
    pub(crate) fn in_sandbox(&self) -> impl Iterator<Item = (usize, &ResultInterface)> {
        self.interfaces
            .iter()
            .enumerate()
            .filter(|(_, interface)| !interface.sandbox.is_empty() && interface.name != "lo")
    }

    /// Addresses of the interface with this index; `first` tells whether those without an index are its own.
    pub(crate) fn addresses_of(&self, index: usize, first: bool) -> impl Iterator<Item = &ResultIp> {
        self.ips
            .iter()
            .filter(move |ip| match ip.interface.map(usize::try_from) {
                Some(Ok(of)) => of == index,
                _ => first,
            })
    }
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// Some plugins write "" for an absent gateway.
fn address_or_none<'de, D: Deserializer<'de>>(from: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(from)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_of_the_bridge_plugin_without_sandbox_and_dns_is_read() {
        let result = AddResult::read(&json!({
            "cniVersion": "0.4.0",
            "interfaces": [
                { "name": "cni0", "mac": "be:00:00:00:00:01" },
                { "name": "veth1", "mac": "be:00:00:00:00:02" },
                { "name": "eth0", "mac": "be:00:00:00:00:03", "sandbox": "/n/x" }
            ],
            "ips": [
                { "version": "4", "interface": 2, "address": "10.1.0.5/16", "gateway": "10.1.0.1" },
                { "version": "6", "interface": 2, "address": "fd00::5/64", "gateway": "" }
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0", "gw": "fd00::1" }]
        }))
        .unwrap();
        let inside: Vec<_> = result
            .in_sandbox()
            .map(|(index, interface)| (index, interface.name.as_str()))
            .collect();
        assert_eq!(inside, [(2, "eth0")]);
        assert_eq!(result.addresses_of(2, true).count(), 2);
        assert_eq!(result.addresses_of(1, false).count(), 0);
        assert_eq!(result.ips[1].gateway, None);
        assert_eq!(result.dns, ResultDns::default());
    }

    #[test]
    fn nulls_and_a_result_of_version_1_1_are_read() {
        let result = AddResult::read(&json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "net1", "mtu": 9000, "sandbox": "/n/x", "socketPath": "/s", "pciID": "p" }],
            "ips": [{ "address": "10.1.0.5/32" }],
            "routes": [{ "dst": "10.2.0.0/16", "mtu": 1400, "priority": 50, "table": 254, "scope": 253, "advmss": 1 }],
            "dns": { "nameservers": null, "search": ["a"] }
        }))
        .unwrap();
        assert_eq!(result.routes[0].priority, Some(50));
        assert_eq!(result.addresses_of(0, true).count(), 1);
        assert_eq!(result.dns.search, ["a"]);
        assert!(
            AddResult::read(&json!({ "ips": null, "routes": null }))
                .unwrap()
                .ips
                .is_empty()
        );
        assert!(AddResult::read(&json!({ "ips": [{ "address": "10.1.0.5" }] })).is_err());
    }
}
