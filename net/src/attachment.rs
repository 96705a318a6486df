//! A pod's attachment from beginning to end: [`Network`]'s verbs.
//!
//! An undo exists before what it undoes: the cache entry is written before ADD, and everything is found again by the pod's id.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    Network, PodNetwork, PodNetworkSpec,
    cni::{
        cache::{Cache, Entry},
        conflist::{self, ConfList, Loaded, Version, is_name},
        execute::{self, Environment, quote},
        network::Capabilities,
        result::AddResult,
        strays,
    },
    error::{Execution, NetError},
    namespace,
    plan::{self, DEFAULT_INTERFACE},
    tap::TUN_DEVICE,
    wiring,
};

/// The first whose DEL reads the result of ADD.
const WITH_RESULT_ON_DEL: Version = Version(0, 4, 0);
/// Like other CRI runtimes, and under their name for it: brings `lo` up in the namespace.
const LOOPBACK: &str = r#"{"cniVersion":"0.4.0","name":"cni-loopback","plugins":[{"type":"loopback"}]}"#;
const LOOPBACK_INTERFACE: &str = "lo";
/// The bandwidth plugin wants a bucket, nothing in Kubernetes names its size (bits), and it takes at most this.
const BURST_BITS: u64 = u32::MAX as u64;

impl Network {
    pub(crate) async fn check(&self) -> Result<(), NetError> {
        let Loaded { conflist, skipped } = self.load().await?;
        if !skipped.is_empty() {
            tracing::debug!(network = conflist.name, ?skipped, "CNI configurations skipped");
        }
        tokio::fs::metadata(TUN_DEVICE)
            .await
            .map_err(NetError::file("find the device of taps", TUN_DEVICE))?;
        let environment = self.environment("", PathBuf::new(), "", String::new());
        conflist.status(&environment).await
    }

    pub(crate) async fn attach(&self, id: &str, spec: &PodNetworkSpec) -> Result<PodNetwork, NetError> {
        validate_id(id)?;
        let args = CniArgs::of(spec)?;
        let Loaded { conflist, .. } = self.load().await?;
        // Before there is anything to undo.
        conflist.executables(&self.config.plugin_dirs)?;
        let netns = self.netns(id);
        namespace::create(&netns)
            .await
            .map_err(NetError::file("make the network namespace", &netns))?;
        match self.fill(id, &netns, &conflist, spec, args).await {
            Ok(network) => Ok(network),
            Err(error) => {
                if let Err(left) = self.detach(id, spec).await {
                    tracing::warn!(sandbox.id = id, error = %left, "network only partly undone after a failure");
                }
                Err(error)
            }
        }
    }

    async fn fill(
        &self,
        id: &str,
        netns: &Path,
        conflist: &ConfList,
        spec: &PodNetworkSpec,
        args: CniArgs,
    ) -> Result<PodNetwork, NetError> {
        let capabilities = capabilities(spec);
        let environment = self.environment(id, netns.to_owned(), DEFAULT_INTERFACE, args.to_string());
        let mut entry = Entry::new(conflist, id, DEFAULT_INTERFACE);
        entry.netns = netns.to_string_lossy().into_owned();
        entry.cni_args = Some(args.0);
        entry.capability_args = Some(capabilities.clone());
        let (added, ()) = tokio::join!(
            self.add(conflist, entry, &environment, &capabilities),
            self.add_loopback(&environment)
        );
        let value = added?;
        let result = AddResult::read(&value).map_err(|error| NetError::PluginBroken {
            execution: Execution {
                plugin: conflist
                    .plugins
                    .last()
                    .map(|plugin| plugin.kind.clone())
                    .unwrap_or_default(),
                command: "ADD",
                network: conflist.name.clone(),
            },
            problem: format!(
                "succeeded, but its result cannot be used ({error}): {}",
                quote(value.to_string().as_bytes())
            ),
        })?;
        let dns = plan::dns(&result);
        let wired = wiring::wire(netns, result).await?;
        Ok(PodNetwork {
            netns: netns.to_owned(),
            interfaces: wired.interfaces,
            routes: wired.plan.routes,
            neighbours: wired.plan.neighbours,
            dns,
            ips: wired.plan.ips,
        })
    }

    async fn add(
        &self,
        conflist: &ConfList,
        mut entry: Entry,
        environment: &Environment,
        capabilities: &Capabilities,
    ) -> Result<Value, NetError> {
        self.remember(entry.clone()).await?;
        let result = conflist.add(environment, capabilities).await?;
        entry.result = Some(result.clone());
        self.remember(entry).await?;
        Ok(result)
    }

    /// Nothing in the namespace uses loopback, the guest has its own: so a failure, or a node without the plugin, is no reason to
    /// refuse a pod.
    async fn add_loopback(&self, environment: &Environment) {
        let Some(conflist) = self.loopback() else { return };
        let entry = Entry::new(&conflist, &environment.container_id, LOOPBACK_INTERFACE);
        let environment = Environment {
            interface: LOOPBACK_INTERFACE.to_owned(),
            ..environment.clone()
        };
        if let Err(error) = self
            .add(&conflist, entry, &environment, &Capabilities::new())
            .await
        {
            tracing::warn!(sandbox.id = environment.container_id, %error, "no loopback in the pod's network namespace");
        }
    }

    fn loopback(&self) -> Option<ConfList> {
        let conflist = conflist::parse(LOOPBACK).ok()?;
        execute::find(&self.config.plugin_dirs, &conflist.plugins.first()?.kind)?;
        Some(conflist)
    }

    pub(crate) async fn detach(&self, id: &str, spec: &PodNetworkSpec) -> Result<(), NetError> {
        validate_id(id)?;
        let netns = self.netns(id);
        let is_pinned = namespace::is_pinned(&netns);
        let mut failures = Vec::new();
        let cache = self.cache();
        let container = id.to_owned();
        let entries = blocking(move || cache.of(&container))
            .await
            .unwrap_or_else(|error| {
                failures.push(error);
                Vec::new()
            });
        // Without a result an ADD has not come to its end; its plugin may still run when it was another daemon's.
        if entries.iter().any(|entry| entry.result.is_none()) {
            let (container, netns) = (id.to_owned(), netns.clone());
            let killed = blocking(move || {
                strays::kill(&container, &netns).map_err(NetError::file("kill CNI plugins found in", "/proc"))
            });
            failures.extend(killed.await.err());
        }
        if entries.is_empty() {
            let result = self.delete_uncached(id, &netns, is_pinned, spec).await;
            // Without namespace and cache nobody knows whether there ever was a network.
            failures.extend(result.into_iter().filter(|_| is_pinned));
        }
        for entry in entries {
            failures.extend(self.delete_cached(entry, &netns, is_pinned, spec).await);
        }
        let (cache, container) = (self.cache(), id.to_owned());
        failures.extend(blocking(move || cache.sweep(&container)).await.err());
        if let Err(error) = namespace::remove(&netns).await {
            failures.push(NetError::file("unpin the network namespace", &netns)(error));
        }
        if failures.is_empty() {
            Ok(())
        } else {
            Err(NetError::Teardown(failures))
        }
    }

    /// DEL with all that ADD has had. The entry stays until all plugins have agreed.
    async fn delete_cached(
        &self,
        entry: Entry,
        netns: &Path,
        is_pinned: bool,
        spec: &PodNetworkSpec,
    ) -> Vec<NetError> {
        let conflist = match entry.conflist() {
            Some(conflist) => conflist,
            None => match self.load().await {
                Ok(loaded) => loaded.conflist,
                Err(error) => return vec![error],
            },
        };
        if is_pinned
            && let Some(result) = entry
                .result
                .as_ref()
                .and_then(|value| AddResult::read(value).ok())
            && let Err(error) = wiring::unsilence(netns, result).await
        {
            // Plugins may still manage without.
            tracing::warn!(sandbox.id = entry.container_id, %error, "addresses not restored before DEL");
        }
        let args = match &entry.cni_args {
            Some(args) => CniArgs(args.clone()).to_string(),
            None => CniArgs::of(spec).map(|args| args.to_string()).unwrap_or_default(),
        };
        let capabilities = entry
            .capability_args
            .clone()
            .unwrap_or_else(|| capabilities(spec));
        let netns = if is_pinned {
            netns.to_owned()
        } else {
            PathBuf::new()
        };
        let environment = self.environment(&entry.container_id, netns, &entry.if_name, args);
        let result = entry
            .result
            .as_ref()
            .filter(|_| conflist.version >= WITH_RESULT_ON_DEL);
        let mut failures = conflist.del(&environment, &capabilities, result).await;
        if failures.is_empty() {
            let cache = self.cache();
            failures.extend(blocking(move || cache.remove(&entry)).await.err());
        }
        failures
    }

    /// DEL with the node's present configuration: the best that is known when the cache is gone.
    async fn delete_uncached(
        &self,
        id: &str,
        netns: &Path,
        is_pinned: bool,
        spec: &PodNetworkSpec,
    ) -> Vec<NetError> {
        let conflist = match self.load().await {
            Ok(loaded) => loaded.conflist,
            Err(error) => return vec![error],
        };
        let args = CniArgs::of(spec).map(|args| args.to_string()).unwrap_or_default();
        let netns = if is_pinned {
            netns.to_owned()
        } else {
            PathBuf::new()
        };
        let environment = self.environment(id, netns, DEFAULT_INTERFACE, args);
        conflist.del(&environment, &capabilities(spec), None).await
    }

    fn environment(&self, id: &str, netns: PathBuf, interface: &str, args: String) -> Environment {
        Environment {
            container_id: id.to_owned(),
            netns,
            interface: interface.to_owned(),
            args,
            plugin_dirs: self.config.plugin_dirs.clone(),
            deadline: self.config.plugin_deadline,
        }
    }

    fn netns(&self, id: &str) -> PathBuf {
        self.config.netns_dir.join(id)
    }

    fn cache(&self) -> Cache {
        Cache::new(&self.config.cache_dir)
    }

    async fn load(&self) -> Result<Loaded, NetError> {
        let directory = self.config.conf_dir.clone();
        blocking(move || conflist::load(&directory)).await
    }

    async fn remember(&self, entry: Entry) -> Result<(), NetError> {
        let cache = self.cache();
        blocking(move || cache.put(&entry)).await
    }
}

/// Runs file system work where it may block.
async fn blocking<T, F>(work: F) -> Result<T, NetError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, NetError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(NetError::file("use a thread for", "files of CNI")(
                std::io::Error::other(error),
            )),
        },
    }
}

/// The id names files, too.
fn validate_id(id: &str) -> Result<(), NetError> {
    if is_name(id) {
        Ok(())
    } else {
        Err(NetError::InvalidArgument(format!("{id:?} is no container id")))
    }
}

/// CNI_ARGS.
#[derive(Debug, Clone, PartialEq)]
struct CniArgs(Vec<(String, String)>);

impl CniArgs {
    fn of(spec: &PodNetworkSpec) -> Result<Self, NetError> {
        // Without it plugins refuse arguments that they don't know.
        let mut all = vec![("IgnoreUnknown".to_owned(), "1".to_owned())];
        for (key, value) in spec.args.iter().filter(|(key, _)| *key != "IgnoreUnknown") {
            if key.is_empty() || [key, value].iter().any(|text| text.contains([';', '=', '\0'])) {
                return Err(NetError::InvalidArgument(format!(
                    "{key:?} = {value:?} cannot stand in CNI_ARGS"
                )));
            }
            all.push((key.clone(), value.clone()));
        }
        Ok(Self(all))
    }
}

impl std::fmt::Display for CniArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, (key, value)) in self.0.iter().enumerate() {
            let separator = if number == 0 { "" } else { ";" };
            write!(f, "{separator}{key}={value}")?;
        }
        Ok(())
    }
}

/// Runtime configuration in the words of CNI's conventions.
fn capabilities(spec: &PodNetworkSpec) -> Capabilities {
    let mut all = Map::new();
    let ports: Vec<Value> = spec
        .port_mappings
        .iter()
        .filter(|mapping| mapping.host_port != 0)
        .map(|mapping| {
            let mut port = json!({
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": mapping.protocol.to_lowercase(),
            });
            if let Some(ip) = mapping.host_ip {
                port["hostIP"] = ip.to_string().into();
            }
            port
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), ports.into());
    }
    let mut bandwidth = Map::new();
    for (direction, rate) in [("ingress", spec.ingress_rate), ("egress", spec.egress_rate)] {
        if let Some(rate) = rate.filter(|rate| *rate > 0) {
            bandwidth.insert(format!("{direction}Rate"), rate.into());
            bandwidth.insert(format!("{direction}Burst"), BURST_BITS.into());
        }
    }
    if !bandwidth.is_empty() {
        all.insert("bandwidth".to_owned(), bandwidth.into());
    }
    if let Some(path) = &spec.cgroup_path {
        all.insert("cgroupPath".to_owned(), path.clone().into());
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PortMapping;

    #[test]
    fn a_spec_becomes_capabilities_and_arguments() {
        let spec = PodNetworkSpec {
            port_mappings: vec![
                PortMapping {
                    host_port: 8080,
                    container_port: 80,
                    protocol: "TCP".into(),
                    host_ip: None,
                },
                PortMapping {
                    host_port: 0,
                    container_port: 81,
                    protocol: "tcp".into(),
                    host_ip: None,
                },
                PortMapping {
                    host_port: 53,
                    container_port: 53,
                    protocol: "udp".into(),
                    host_ip: Some("127.0.0.1".parse().unwrap()),
                },
            ],
            egress_rate: Some(1000),
            args: [("K8S_POD_NAME".to_owned(), "web".to_owned())].into(),
            ..PodNetworkSpec::default()
        };
        assert_eq!(
            Value::Object(capabilities(&spec)),
            json!({
                "portMappings": [
                    { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
                    { "hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1" }
                ],
                "bandwidth": { "egressRate": 1000, "egressBurst": 4_294_967_295_u64 }
            })
        );
        assert_eq!(
            CniArgs::of(&spec).unwrap().to_string(),
            "IgnoreUnknown=1;K8S_POD_NAME=web"
        );
        assert!(capabilities(&PodNetworkSpec::default()).is_empty());
    }

    #[test]
    fn ids_and_arguments_that_would_mean_something_else_are_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a b", "-a"] {
            assert!(validate_id(id).is_err(), "{id:?}");
        }
        assert!(validate_id("0a_b.c-d").is_ok());
        let spec = PodNetworkSpec {
            args: [("A".into(), "x;B=y".into())].into(),
            ..PodNetworkSpec::default()
        };
        assert!(matches!(CniArgs::of(&spec), Err(NetError::InvalidArgument(_))));
    }
}
