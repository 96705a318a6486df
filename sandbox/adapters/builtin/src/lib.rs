//! The driver of Caisson's own VMM: runs each VM as one `caisson-vmm` process on KVM.
//!
//! Owns the host's side of such a VM: opens every file, device and socket and passes descriptors; writes the specification
//! (`caisson_vmm_api::spec`); hears of the start; speaks the control protocol; adopts. Must not know any Pod, image or the agent, nor what the
//! VMM does with what it gets.

mod client;
mod cmdline;
mod detect;
mod disks;
mod growth;
mod launch;
mod machine;
mod space;

use std::path::PathBuf;

use async_trait::async_trait;
use caisson_hypervisor::{Hypervisor, HypervisorError, Vm, VmRecord, VmSpec, kvm::Kvm, user::Users};

/// What the driver needs to know.
#[derive(Debug, Clone)]
pub struct BuiltinConfig {
    /// `caisson-vmm`.
    pub vmm: PathBuf,
    /// `/dev/kvm`.
    pub kvm: PathBuf,
    /// Gives each VM its user; shared with other drivers of the same daemon.
    pub users: Users,
    /// Guests' memory of transparent huge pages where the host has them: less CPU for more memory.
    pub huge_pages: bool,
}

/// The driver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Builtin {
    pub(crate) vmm: PathBuf,
    pub(crate) version: String,
    pub(crate) kvm: PathBuf,
    /// What the host's KVM is, as half a sentence.
    pub(crate) because: String,
    pub(crate) users: Users,
    pub(crate) huge_pages: bool,
}

/// [`Hypervisor::name`] of this driver.
pub const NAME: &str = "builtin";

impl Builtin {
    /// Asks the VMM for its version and the host for its KVM; an error where either cannot run a VM.
    pub async fn detect(config: BuiltinConfig) -> Result<Self, HypervisorError> {
        detect::detect(config).await
    }

    /// The same where somebody knows already what the host's KVM is.
    pub async fn detect_on(config: BuiltinConfig, kvm: &Kvm) -> Result<Self, HypervisorError> {
        detect::detect_on(config, kvm).await
    }
}

#[async_trait]
impl Hypervisor for Builtin {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        format!(
            "{} ({}): {}; {}",
            self.version,
            self.vmm.display(),
            self.because,
            self.users.who()
        )
    }

    fn can_grow(&self) -> bool {
        true
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
        Ok(Box::new(launch::launch(self, spec).await?))
    }

    async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
        let adopted = machine::BuiltinVm::adopt(record, &self.users).await?;
        Ok(adopted.map(|vm| Box::new(vm) as Box<dyn Vm>))
    }
}
