//! Whether there is a VMM, and a KVM for it. Must not start VMs.

use std::{path::Path, process::Stdio, time::Duration};

use caisson_hypervisor::{
    HypervisorError,
    kvm::{self, Kvm},
};

use crate::{Builtin, BuiltinConfig};

const VERSION_DEADLINE: Duration = Duration::from_secs(20);

pub(crate) async fn detect(config: BuiltinConfig) -> Result<Builtin, HypervisorError> {
    let kvm = kvm::probe(&config.kvm);
    detect_on(config, &kvm).await
}

pub(crate) async fn detect_on(config: BuiltinConfig, kvm: &Kvm) -> Result<Builtin, HypervisorError> {
    let start = |reason: String| HypervisorError::Start {
        program: config.vmm.clone(),
        reason,
    };
    if !kvm.is_usable() {
        return Err(start(format!("it needs KVM, and {kvm}")));
    }
    if !config.vmm.is_file() {
        return Err(start("no such file".into()));
    }
    let version = ask_version(&config.vmm).await.map_err(start)?;
    Ok(Builtin {
        version,
        because: kvm.to_string(),
        vmm: config.vmm.clone(),
        kvm: config.kvm.clone(),
        users: config.users,
        huge_pages: config.huge_pages,
    })
}

async fn ask_version(vmm: &Path) -> Result<String, String> {
    let run = tokio::process::Command::new(vmm)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(VERSION_DEADLINE, run).await {
        Ok(Ok(output)) => output,
        Ok(Err(e)) => return Err(e.to_string()),
        Err(_) => return Err(format!("`--version` did not answer within {VERSION_DEADLINE:?}")),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim() {
        version if version.starts_with("caisson-vmm ") && version.len() < 100 => Ok(version.to_owned()),
        other => {
            let heard: String = other.chars().take(200).collect();
            Err(format!("`--version` said {heard:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use caisson_hypervisor::{VmUser, kvm::Vendor, user::Users};

    use super::*;

    fn config(vmm: &str) -> BuiltinConfig {
        BuiltinConfig {
            vmm: vmm.into(),
            kvm: "/dev/kvm".into(),
            users: Users::new(VmUser::Daemon).unwrap(),
            huge_pages: false,
        }
    }

    #[tokio::test]
    async fn a_host_without_usable_kvm_is_refused_with_the_reason() {
        for kvm in [Kvm::NoDevice, Kvm::Paravirtual, Kvm::Denied("x".into())] {
            let error = detect_on(config("/bin/true"), &kvm)
                .await
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("it needs KVM") && error.contains(&kvm.to_string()),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_missing_program_and_another_program_are_told_apart() {
        let usable = Kvm::Usable { vendor: Vendor::Amd };
        let error = detect_on(config("/nonexistent/vmm"), &usable).await.unwrap_err();
        assert!(error.to_string().contains("no such file"), "{error}");
        let error = detect_on(config("/bin/true"), &usable).await.unwrap_err();
        assert!(
            error.to_string().contains("`--version` said \"true (GNU"),
            "{error}"
        );
    }
}
