//! Joins the handlers to the generated servers, each call under its name and span.

use caisson_cri_api::v1::{self, image_service_server::ImageService, runtime_service_server::RuntimeService};
use tonic::{Request, Response, Status, async_trait};

use super::{
    attach, checkpoint_container, container_stats, container_status, create_container, exec, exec_sync,
    get_container_events, image_fs_info, image_status, list_container_stats, list_containers, list_images,
    list_metric_descriptors, list_pod_sandbox, list_pod_sandbox_metrics, list_pod_sandbox_stats,
    pod_sandbox_stats, pod_sandbox_status, port_forward, pull_image, remove_container, remove_image,
    remove_pod_sandbox, reopen_container_log, run_pod_sandbox, runtime_config, start_container, status,
    stop_container, stop_pod_sandbox,
    stream_lists::{self, Chunks},
    update_container_resources, update_pod_sandbox_resources, update_runtime_config, version,
};
use crate::{
    outcome::{Effect, observe},
    runtime::Runtime,
    translate::Refusals,
};

/// The CRI as this daemon serves it.
#[derive(Clone)]
pub struct Cri {
    runtime: Runtime,
}

impl Cri {
    /// Serves what this runtime has.
    #[must_use]
    pub fn new(runtime: Runtime) -> Self {
        Self { runtime }
    }

    /// What the handlers work with.
    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }
}

/// An id as the request gives it; absent ones are refused, since the empty prefix fits everything.
pub(super) fn id<'a>(field: &str, id: &'a str) -> Result<&'a str, Refusals> {
    if id.is_empty() {
        Err(Refusals::one(field, "is missing"))
    } else {
        Ok(id)
    }
}

/// The name of an image as the request gives it.
pub(super) fn image_name(spec: Option<&v1::ImageSpec>) -> Result<String, Refusals> {
    match spec {
        Some(spec) if !spec.image.is_empty() => Ok(spec.image.clone()),
        _ => Err(Refusals::one("image.image", "is missing")),
    }
}

#[async_trait]
impl RuntimeService for Cri {
    async fn version(
        &self,
        request: Request<v1::VersionRequest>,
    ) -> Result<Response<v1::VersionResponse>, Status> {
        observe(
            "Version",
            Effect::Read,
            version::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        observe(
            "Status",
            Effect::Read,
            status::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn runtime_config(
        &self,
        request: Request<v1::RuntimeConfigRequest>,
    ) -> Result<Response<v1::RuntimeConfigResponse>, Status> {
        observe(
            "RuntimeConfig",
            Effect::Read,
            runtime_config::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Result<Response<v1::RunPodSandboxResponse>, Status> {
        observe(
            "RunPodSandbox",
            Effect::Change,
            run_pod_sandbox::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Result<Response<v1::StopPodSandboxResponse>, Status> {
        observe(
            "StopPodSandbox",
            Effect::Change,
            stop_pod_sandbox::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Result<Response<v1::RemovePodSandboxResponse>, Status> {
        observe(
            "RemovePodSandbox",
            Effect::Change,
            remove_pod_sandbox::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Result<Response<v1::PodSandboxStatusResponse>, Status> {
        observe(
            "PodSandboxStatus",
            Effect::Read,
            pod_sandbox_status::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Result<Response<v1::ListPodSandboxResponse>, Status> {
        observe(
            "ListPodSandbox",
            Effect::Read,
            list_pod_sandbox::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Result<Response<v1::CreateContainerResponse>, Status> {
        observe(
            "CreateContainer",
            Effect::Change,
            create_container::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Result<Response<v1::StartContainerResponse>, Status> {
        observe(
            "StartContainer",
            Effect::Change,
            start_container::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Result<Response<v1::StopContainerResponse>, Status> {
        observe(
            "StopContainer",
            Effect::Change,
            stop_container::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Result<Response<v1::RemoveContainerResponse>, Status> {
        observe(
            "RemoveContainer",
            Effect::Change,
            remove_container::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Result<Response<v1::ContainerStatusResponse>, Status> {
        observe(
            "ContainerStatus",
            Effect::Read,
            container_status::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        observe(
            "ListContainers",
            Effect::Read,
            list_containers::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Result<Response<v1::ExecSyncResponse>, Status> {
        observe(
            "ExecSync",
            Effect::Change,
            exec_sync::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Result<Response<v1::ReopenContainerLogResponse>, Status> {
        observe(
            "ReopenContainerLog",
            Effect::Change,
            reopen_container_log::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Result<Response<v1::UpdateContainerResourcesResponse>, Status> {
        observe(
            "UpdateContainerResources",
            Effect::Change,
            update_container_resources::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Result<Response<v1::ExecResponse>, Status> {
        observe(
            "Exec",
            Effect::Change,
            exec::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn attach(
        &self,
        request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        observe(
            "Attach",
            Effect::Change,
            attach::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Result<Response<v1::PortForwardResponse>, Status> {
        observe(
            "PortForward",
            Effect::Change,
            port_forward::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Result<Response<v1::ContainerStatsResponse>, Status> {
        observe(
            "ContainerStats",
            Effect::Read,
            container_stats::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Result<Response<v1::ListContainerStatsResponse>, Status> {
        observe(
            "ListContainerStats",
            Effect::Read,
            list_container_stats::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Result<Response<v1::PodSandboxStatsResponse>, Status> {
        observe(
            "PodSandboxStats",
            Effect::Read,
            pod_sandbox_stats::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Result<Response<v1::ListPodSandboxStatsResponse>, Status> {
        observe(
            "ListPodSandboxStats",
            Effect::Read,
            list_pod_sandbox_stats::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<v1::UpdateRuntimeConfigResponse>, Status> {
        observe(
            "UpdateRuntimeConfig",
            Effect::Change,
            update_runtime_config::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn checkpoint_container(
        &self,
        request: Request<v1::CheckpointContainerRequest>,
    ) -> Result<Response<v1::CheckpointContainerResponse>, Status> {
        observe(
            "CheckpointContainer",
            Effect::Change,
            checkpoint_container::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_metric_descriptors(
        &self,
        request: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Result<Response<v1::ListMetricDescriptorsResponse>, Status> {
        observe(
            "ListMetricDescriptors",
            Effect::Read,
            list_metric_descriptors::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        request: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<v1::ListPodSandboxMetricsResponse>, Status> {
        observe(
            "ListPodSandboxMetrics",
            Effect::Read,
            list_pod_sandbox_metrics::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<v1::UpdatePodSandboxResourcesResponse>, Status> {
        observe(
            "UpdatePodSandboxResources",
            Effect::Change,
            update_pod_sandbox_resources::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamPodSandboxesStream = Chunks<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        observe(
            "StreamPodSandboxes",
            Effect::Read,
            stream_lists::pod_sandboxes(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamContainersStream = Chunks<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        observe(
            "StreamContainers",
            Effect::Read,
            stream_lists::containers(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamContainerStatsStream = Chunks<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        observe(
            "StreamContainerStats",
            Effect::Read,
            stream_lists::container_stats(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamPodSandboxStatsStream = Chunks<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        observe(
            "StreamPodSandboxStats",
            Effect::Read,
            stream_lists::pod_sandbox_stats(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamPodSandboxMetricsStream = Chunks<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        request: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        observe(
            "StreamPodSandboxMetrics",
            Effect::Read,
            stream_lists::pod_sandbox_metrics(&self.runtime, request.into_inner()),
        )
        .await
    }

    type GetContainerEventsStream = get_container_events::Events;

    async fn get_container_events(
        &self,
        request: Request<v1::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        observe(
            "GetContainerEvents",
            Effect::Read,
            get_container_events::handle(&self.runtime, request.into_inner()),
        )
        .await
    }
}

#[async_trait]
impl ImageService for Cri {
    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        observe(
            "ListImages",
            Effect::Read,
            list_images::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn image_status(
        &self,
        request: Request<v1::ImageStatusRequest>,
    ) -> Result<Response<v1::ImageStatusResponse>, Status> {
        observe(
            "ImageStatus",
            Effect::Read,
            image_status::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<v1::PullImageResponse>, Status> {
        observe(
            "PullImage",
            Effect::Change,
            pull_image::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn remove_image(
        &self,
        request: Request<v1::RemoveImageRequest>,
    ) -> Result<Response<v1::RemoveImageResponse>, Status> {
        observe(
            "RemoveImage",
            Effect::Change,
            remove_image::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    async fn image_fs_info(
        &self,
        request: Request<v1::ImageFsInfoRequest>,
    ) -> Result<Response<v1::ImageFsInfoResponse>, Status> {
        observe(
            "ImageFsInfo",
            Effect::Read,
            image_fs_info::handle(&self.runtime, request.into_inner()),
        )
        .await
    }

    type StreamImagesStream = Chunks<v1::StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<v1::StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        observe(
            "StreamImages",
            Effect::Read,
            stream_lists::images(&self.runtime, request.into_inner()),
        )
        .await
    }
}
