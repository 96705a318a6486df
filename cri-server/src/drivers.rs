//! Which drivers there are on this host, and which of them runs new VMs.
//!
//! A VM outlives the daemon, and so may outlive the choice: whichever driver runs new VMs, every driver that is there takes over its own.

use std::sync::Arc;

use anyhow::Context;
use async_trait::async_trait;
use caisson_builtin::{Builtin, BuiltinConfig};
use caisson_hypervisor::{Hypervisor, HypervisorError, Vm, VmRecord, VmSpec, user::Users};
use caisson_qemu::{Accelerator, Qemu, QemuConfig};

use crate::config::{Config, Driver, HypervisorChoice};

/// The driver that was configured, or the best one for this host; the others stand by.
pub(crate) async fn choose(config: &Config) -> anyhow::Result<Arc<dyn Hypervisor>> {
    let choice = &config.hypervisor;
    let users =
        Users::new(choice.user).map_err(|reason| anyhow::anyhow!("cannot give VMs their users: {reason}"))?;
    let builtin = Builtin::detect(builtin_config(choice, &users))
        .await
        .map(Arc::new);
    let qemu = Qemu::detect(qemu_config(choice))
        .await
        .map(|qemu| Arc::new(qemu.sharing_users(&users)));
    let (mut because, mut standing_by) = (String::new(), Vec::<Arc<dyn Hypervisor>>::new());
    let first: Arc<dyn Hypervisor> = match (choice.driver, builtin, qemu) {
        (Driver::Builtin, Err(error), _) => {
            return Err(error).context("cannot use the built-in VMM");
        }
        (Driver::Qemu, _, Err(error)) => return Err(error).context("cannot use QEMU"),
        (Driver::Auto, Err(why), Err(error)) => {
            return Err(error).with_context(|| format!("cannot use the built-in VMM ({why}) nor QEMU"));
        }
        (Driver::Auto, Ok(builtin), qemu) if choice.accelerator != Accelerator::Tcg => {
            standing_by.extend(qemu.ok().map(|qemu| qemu as _));
            builtin
        }
        (Driver::Builtin, Ok(builtin), qemu) => {
            standing_by.extend(qemu.ok().map(|qemu| qemu as _));
            builtin
        }
        // The configuration asks for software emulation, and there is nothing to do it.
        (Driver::Auto, Ok(_), Err(error)) => return Err(error).context("cannot use QEMU"),
        (driver, builtin, Ok(qemu)) => {
            match builtin {
                Ok(builtin) => standing_by.push(builtin),
                Err(why) if driver == Driver::Auto => {
                    because = format!("; the built-in VMM is not used: {why}")
                }
                Err(_) => {}
            }
            qemu
        }
    };
    Ok(Arc::new(Drivers {
        first,
        standing_by,
        because,
    }))
}

fn builtin_config(choice: &HypervisorChoice, users: &Users) -> BuiltinConfig {
    BuiltinConfig {
        vmm: choice.vmm.clone(),
        kvm: "/dev/kvm".into(),
        users: users.clone(),
        huge_pages: choice.huge_pages,
    }
}

fn qemu_config(choice: &HypervisorChoice) -> QemuConfig {
    QemuConfig {
        binary: choice.qemu.clone(),
        vsock_backend: choice.vsock_backend.clone(),
        accelerator: choice.accelerator,
        user: choice.user,
    }
}

/// One driver for new VMs, and others for those that they have.
struct Drivers {
    first: Arc<dyn Hypervisor>,
    standing_by: Vec<Arc<dyn Hypervisor>>,
    /// Why not a better one, if there is one.
    because: String,
}

#[async_trait]
impl Hypervisor for Drivers {
    fn name(&self) -> &'static str {
        self.first.name()
    }

    fn describe(&self) -> String {
        format!("{}{}", self.first.describe(), self.because)
    }

    fn can_grow(&self) -> bool {
        self.first.can_grow()
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
        self.first.launch(spec).await
    }

    async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
        let all = std::iter::once(&self.first).chain(&self.standing_by);
        let own = all.into_iter().find(|driver| driver.name() == record.driver);
        // The first one's refusal names the driver that it would take.
        own.unwrap_or(&self.first).adopt(record).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes over what is its own.
    struct Only(&'static str);

    #[async_trait]
    impl Hypervisor for Only {
        fn name(&self) -> &'static str {
            self.0
        }

        fn describe(&self) -> String {
            self.0.to_owned()
        }

        async fn launch(&self, _spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
            Err(HypervisorError::Spec(format!("launched by {}", self.0)))
        }

        async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
            if record.driver == self.0 {
                Ok(None)
            } else {
                Err(HypervisorError::Spec(format!(
                    "{} belongs to {}",
                    record.id, record.driver
                )))
            }
        }
    }

    #[tokio::test]
    async fn a_vm_is_taken_over_by_the_driver_that_started_it_whichever_runs_new_ones() {
        let drivers = Drivers {
            first: Arc::new(Only("builtin")),
            standing_by: vec![Arc::new(Only("qemu"))],
            because: "; and more".into(),
        };
        let record = |driver: &str| VmRecord {
            driver: driver.into(),
            id: "0a".into(),
            dir: "/".into(),
            processes: Vec::new(),
            slots: Vec::new(),
        };
        assert!(
            drivers
                .adopt(record("builtin"))
                .await
                .is_ok_and(|vm| vm.is_none())
        );
        assert!(drivers.adopt(record("qemu")).await.is_ok_and(|vm| vm.is_none()));
        let error = drivers.adopt(record("other")).await.err().unwrap();
        assert!(error.to_string().contains("belongs to other"), "{error}");
        assert_eq!(
            (drivers.name(), drivers.describe().as_str()),
            ("builtin", "builtin; and more")
        );
    }
}
