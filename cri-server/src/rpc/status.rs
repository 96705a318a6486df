//! Status: whether pods can run and have a network, with the reason when not.

use std::{collections::HashMap, path::Path};

use caisson_cri_api::v1;
use serde_json::json;

use crate::{
    runtime::{Runtime, VERSION},
    status::{RpcError, chain},
    translate::HANDLERS,
};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::StatusRequest,
) -> Result<v1::StatusResponse, RpcError> {
    let network = runtime.network.status().await.map_err(|error| chain(&error));
    let conditions = vec![
        condition(
            "RuntimeReady",
            "GuestFilesMissing",
            guest_files(&runtime.settings.kernel, &runtime.settings.initramfs),
        ),
        condition("NetworkReady", "NetworkPluginNotReady", network),
    ];
    Ok(v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions }),
        info: if request.verbose {
            info(runtime)
        } else {
            HashMap::new()
        },
        runtime_handlers: HANDLERS.into_iter().map(handler).collect(),
        features: Some(v1::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: false,
        }),
    })
}

fn condition(kind: &str, reason: &str, state: Result<(), String>) -> v1::RuntimeCondition {
    let status = state.is_ok();
    v1::RuntimeCondition {
        r#type: kind.into(),
        status,
        reason: if status { String::new() } else { reason.into() },
        message: state.err().unwrap_or_default(),
    }
}

/// A pod needs both files at its start; the daemon works without them, so that running pods can still be served.
fn guest_files(kernel: &Path, initramfs: &Path) -> Result<(), String> {
    for (what, path) in [("guest kernel", kernel), ("guest initramfs", initramfs)] {
        std::fs::File::open(path)
            .map_err(|error| format!("cannot open the {what} {}: {error}", path.display()))?;
    }
    Ok(())
}

/// User namespaces are made in the guest.
fn handler(name: &str) -> v1::RuntimeHandler {
    v1::RuntimeHandler {
        name: name.into(),
        features: Some(v1::RuntimeHandlerFeatures {
            recursive_read_only_mounts: true,
            user_namespaces: true,
        }),
    }
}

fn info(runtime: &Runtime) -> HashMap<String, String> {
    let hypervisor = json!({
        "name": runtime.hypervisor.name(),
        "description": runtime.hypervisor.describe(),
    });
    let mut info = HashMap::from([
        ("version".to_owned(), json!(VERSION).to_string()),
        ("hypervisor".to_owned(), hypervisor.to_string()),
        ("config".to_owned(), runtime.settings.config.to_string()),
    ]);
    // crictl shows a JSON null as the word "null".
    if let Some(cidr) = runtime.pod_cidr.get() {
        info.insert("podCIDR".to_owned(), json!(cidr.as_str()).to_string());
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_guest_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinuz");
        let told = guest_files(&kernel, &kernel).unwrap_err();
        assert!(
            told.contains("guest kernel") && told.contains("vmlinuz"),
            "{told}"
        );
        std::fs::write(&kernel, "k").unwrap();
        assert_eq!(guest_files(&kernel, &kernel), Ok(()));
    }
}
