//! A CRI client in the words of a test: pods and containers by name, the public k8s-cri crate underneath.

use std::{collections::HashMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use k8s_cri::v1::{
    self as cri, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{eventually, host::Host};

/// Longest wait for a container's state to change: emulated guests are slow.
pub const STATE_LIMIT: Duration = Duration::from_secs(60);

/// Both services of one runtime.
#[derive(Debug, Clone)]
pub struct Cri {
    /// For calls that have no word here.
    pub runtime: RuntimeServiceClient<Channel>,
    /// For calls that have no word here.
    pub images: ImageServiceClient<Channel>,
}

/// A pod to run.
#[must_use]
pub fn pod(host: &Host, name: &str) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        log_directory: host
            .log_dir(name)
            .map(|dir| dir.display().to_string())
            .unwrap_or_default(),
        dns_config: Some(cri::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc".into()],
            options: vec![],
        }),
        labels: HashMap::from([("app".into(), name.into())]),
        linux: Some(cri::LinuxPodSandboxConfig::default()),
        ..Default::default()
    }
}

/// A container to create: `image` must have been pulled.
#[must_use]
pub fn container(name: &str, image: &str, command: &[&str]) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: image.into(),
            user_specified_image: image.into(),
            ..Default::default()
        }),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..Default::default()
    }
}

/// The security context of a container to create, made when there is none.
pub fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
}

impl Cri {
    /// Connects to a socket; fails when nobody listens.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let channel = Endpoint::try_from(format!("unix://{}", socket.display()))?
            .connect()
            .await?;
        // As kubelet: 16 MiB messages.
        let limit = 16 << 20;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel).max_decoding_message_size(limit),
        })
    }

    /// Version.
    pub async fn version(&mut self) -> Result<cri::VersionResponse, Status> {
        Ok(self
            .runtime
            .version(cri::VersionRequest { version: "v1".into() })
            .await?
            .into_inner())
    }

    /// Pulls without credentials; answers image_ref.
    pub async fn pull(&mut self, image: &str) -> Result<String, Status> {
        let request = cri::PullImageRequest {
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(self.images.pull_image(request).await?.into_inner().image_ref)
    }

    /// ImageStatus; `None` for an unknown image.
    pub async fn image(&mut self, image: &str) -> Result<Option<cri::Image>, Status> {
        let request = cri::ImageStatusRequest {
            image: Some(cri::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            verbose: false,
        };
        Ok(self.images.image_status(request).await?.into_inner().image)
    }

    /// RemoveImage.
    pub async fn remove_image(&mut self, image: &str) -> Result<(), Status> {
        let image = Some(cri::ImageSpec {
            image: image.into(),
            ..Default::default()
        });
        self.images
            .remove_image(cri::RemoveImageRequest { image })
            .await?;
        Ok(())
    }

    /// RunPodSandbox; answers the id.
    pub async fn run_pod(&mut self, config: &cri::PodSandboxConfig) -> Result<String, Status> {
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        Ok(self
            .runtime
            .run_pod_sandbox(request)
            .await?
            .into_inner()
            .pod_sandbox_id)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&mut self, id: &str) -> Result<(), Status> {
        self.runtime
            .stop_pod_sandbox(cri::StopPodSandboxRequest {
                pod_sandbox_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&mut self, id: &str) -> Result<(), Status> {
        self.runtime
            .remove_pod_sandbox(cri::RemovePodSandboxRequest {
                pod_sandbox_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// PodSandboxStatus with verbose information.
    pub async fn pod_status(
        &mut self,
        id: &str,
    ) -> Result<(cri::PodSandboxStatus, HashMap<String, String>), Status> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: id.into(),
            verbose: true,
        };
        let answer = self.runtime.pod_sandbox_status(request).await?.into_inner();
        Ok((
            answer
                .status
                .ok_or_else(|| Status::internal("no status in the answer"))?,
            answer.info,
        ))
    }

    /// Every pod.
    pub async fn pods(&mut self) -> Result<Vec<cri::PodSandbox>, Status> {
        Ok(self
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest { filter: None })
            .await?
            .into_inner()
            .items)
    }

    /// Addresses of a pod, the primary one first.
    pub async fn pod_ips(&mut self, id: &str) -> Result<Vec<String>> {
        let (status, _) = self.pod_status(id).await?;
        let network = status.network.context("no network in the pod's status")?;
        Ok(std::iter::once(network.ip)
            .chain(network.additional_ips.into_iter().map(|ip| ip.ip))
            .collect())
    }

    /// CreateContainer; answers the id.
    pub async fn create(
        &mut self,
        pod_id: &str,
        config: &cri::ContainerConfig,
        pod: &cri::PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod_id.into(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.clone()),
        };
        Ok(self
            .runtime
            .create_container(request)
            .await?
            .into_inner()
            .container_id)
    }

    /// StartContainer.
    pub async fn start(&mut self, id: &str) -> Result<(), Status> {
        self.runtime
            .start_container(cri::StartContainerRequest {
                container_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// Create and start.
    pub async fn run(
        &mut self,
        pod_id: &str,
        config: &cri::ContainerConfig,
        pod: &cri::PodSandboxConfig,
    ) -> Result<String, Status> {
        let id = self.create(pod_id, config, pod).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// StopContainer with a grace period in seconds.
    pub async fn stop(&mut self, id: &str, timeout: i64) -> Result<(), Status> {
        self.runtime
            .stop_container(cri::StopContainerRequest {
                container_id: id.into(),
                timeout,
            })
            .await?;
        Ok(())
    }

    /// RemoveContainer.
    pub async fn remove(&mut self, id: &str) -> Result<(), Status> {
        self.runtime
            .remove_container(cri::RemoveContainerRequest {
                container_id: id.into(),
            })
            .await?;
        Ok(())
    }

    /// ContainerStatus.
    pub async fn status(&mut self, id: &str) -> Result<cri::ContainerStatus, Status> {
        let request = cri::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self.runtime.container_status(request).await?.into_inner();
        answer
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// Waits until the container has exited; answers its last status.
    pub async fn exited(&mut self, id: &str) -> Result<cri::ContainerStatus> {
        eventually(&format!("the exit of container {id}"), STATE_LIMIT, async || {
            let status = self.status(id).await.ok()?;
            (status.state() == cri::ContainerState::ContainerExited).then_some(status)
        })
        .await
    }

    /// ExecSync: exit code, stdout, stderr.
    pub async fn exec(&mut self, id: &str, command: &[&str]) -> Result<(i32, String, String), Status> {
        self.exec_within(id, command, 30).await
    }

    /// ExecSync with a timeout in seconds.
    pub async fn exec_within(
        &mut self,
        id: &str,
        command: &[&str],
        timeout: i64,
    ) -> Result<(i32, String, String), Status> {
        let request = cri::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout,
        };
        let answer = self.runtime.exec_sync(request).await?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((answer.exit_code, text(&answer.stdout), text(&answer.stderr)))
    }
}

/// The content of a log in the CRI format, without time stamps: (stream, tag, text) of each record.
pub fn records(log: &str) -> Result<Vec<(String, String, String)>> {
    log.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let mut part = || {
                parts
                    .next()
                    .with_context(|| format!("log line {line:?} is not in the CRI format"))
            };
            let (time, stream, tag, text) = (part()?, part()?, part()?, part()?);
            anyhow::ensure!(
                time.len() >= 20 && time.contains('T'),
                "log line {line:?} does not begin with a time"
            );
            Ok((stream.into(), tag.into(), text.into()))
        })
        .collect()
}
