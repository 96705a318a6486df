//! `caissond status`: asks the daemon that runs now, as any CRI client would.

use std::path::Path;

use anyhow::Context;
use caisson_cri_api::v1::{self, runtime_service_client::RuntimeServiceClient};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// What the daemon answered.
#[derive(Debug)]
pub struct Answer {
    version: v1::VersionResponse,
    status: v1::StatusResponse,
    pods: Vec<v1::PodSandbox>,
    containers: Vec<v1::Container>,
}

/// A channel to the CRI socket.
pub async fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let path = socket.to_owned();
    Endpoint::from_static("http://caisson.invalid")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
        .await
        .with_context(|| format!("no caissond answers on {}", socket.display()))
}

/// Asks what there is to know.
pub async fn ask(socket: &Path) -> anyhow::Result<Answer> {
    let mut client = RuntimeServiceClient::new(connect(socket).await?);
    Ok(Answer {
        version: client.version(v1::VersionRequest::default()).await?.into_inner(),
        status: client
            .status(v1::StatusRequest { verbose: true })
            .await?
            .into_inner(),
        pods: client
            .list_pod_sandbox(v1::ListPodSandboxRequest::default())
            .await?
            .into_inner()
            .items,
        containers: client
            .list_containers(v1::ListContainersRequest::default())
            .await?
            .into_inner()
            .containers,
    })
}

impl Answer {
    fn conditions(&self) -> &[v1::RuntimeCondition] {
        self.status
            .status
            .as_ref()
            .map_or(&[], |status| status.conditions.as_slice())
    }

    fn ready_pods(&self) -> usize {
        self.pods
            .iter()
            .filter(|pod| pod.state == v1::PodSandboxState::SandboxReady as i32)
            .count()
    }

    fn running_containers(&self) -> usize {
        self.containers
            .iter()
            .filter(|container| container.state == v1::ContainerState::ContainerRunning as i32)
            .count()
    }

    fn hypervisor(&self) -> serde_json::Value {
        self.status
            .info
            .get("hypervisor")
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default()
    }

    /// Lines for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{} {}\n", self.version.runtime_name, self.version.runtime_version);
        for condition in self.conditions() {
            let mark = if condition.status { '✔' } else { '✘' };
            text.push_str(&format!("{mark} {} {}\n", condition.r#type, condition.message));
        }
        if let Some(description) = self.hypervisor()["description"].as_str() {
            text.push_str(&format!("hypervisor  {description}\n"));
        }
        text.push_str(&format!(
            "pods        {} ready of {}\ncontainers  {} running of {}\n",
            self.ready_pods(),
            self.pods.len(),
            self.running_containers(),
            self.containers.len()
        ));
        text
    }

    /// One JSON document.
    #[must_use]
    pub fn json(&self) -> String {
        let conditions: serde_json::Map<_, _> = self
            .conditions()
            .iter()
            .map(|condition| {
                let value = json!({
                    "status": condition.status,
                    "reason": condition.reason,
                    "message": condition.message,
                });
                (condition.r#type.clone(), value)
            })
            .collect();
        let document = json!({
            "version": self.version.runtime_version,
            "conditions": conditions,
            "hypervisor": self.hypervisor(),
            "pods": { "ready": self.ready_pods(), "all": self.pods.len() },
            "containers": { "running": self.running_containers(), "all": self.containers.len() },
        });
        format!("{document:#}\n")
    }
}
