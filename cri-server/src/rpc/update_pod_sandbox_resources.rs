//! UpdatePodSandboxResources: the sum of a pod's limits has changed. kubelet has changed the pod's cgroup on the host itself; here it is
//! seen to that the VM can hold the new sum.

use caisson_cri_api::v1;
use caisson_sandbox::limits::PodLimitChange;

use super::service::id;
use crate::{
    outcome::{note, unbroken},
    runtime::Runtime,
    status::RpcError,
    translate::{self, Refusals},
};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::UpdatePodSandboxResourcesRequest,
) -> Result<v1::UpdatePodSandboxResourcesResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    let mut refusals = Refusals::default();
    let change = PodLimitChange {
        limits: translate::pod_limits(request.resources.as_ref()),
        overhead: translate::pod_limits(request.overhead.as_ref()),
        cpuset: translate::cpuset(request.resources.as_ref(), "resources", &mut refusals),
    };
    let overhead = translate::cpuset(request.overhead.as_ref(), "overhead", &mut refusals);
    refusals.add_if(
        !overhead.is_empty(),
        "overhead",
        "cpusets are those of the pod: the VM has none of its own",
    );
    let change = refusals.settle(change)?;
    let (runtime, sandbox) = (runtime.clone(), sandbox.to_owned());
    let update = async move {
        if let Some(nri) = &runtime.nri {
            nri.update_pod(&runtime.sandboxes, &request).await?;
        }
        runtime.sandboxes.resize(&sandbox, change).await?;
        if let Some(nri) = &runtime.nri {
            nri.pod_updated(&runtime.sandboxes, &sandbox).await;
        }
        Ok::<_, RpcError>(())
    };
    unbroken("update a pod sandbox", update).await??;
    Ok(v1::UpdatePodSandboxResourcesResponse {})
}
