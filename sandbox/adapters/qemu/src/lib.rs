//! The QEMU driver: runs each VM as one `qemu-system-x86_64` process with one vhost-user vsock backend beside it, under KVM where
//! KVM is usable and in software (TCG) elsewhere.
//!
//! Owns the choice of the accelerator ([`Qemu::detect`]), QEMU's command line, QMP, and the PCI bridges that make hotplug
//! possible (QEMU refuses it on `pcie.0` itself). Both processes open no path of the host but QEMU's own program files: kernel,
//! initramfs, disks, taps, sockets and the console are opened here and passed. Must not know any Pod, image or the agent.

mod arguments;
mod detect;
mod disks;
mod handover;
mod launch;
mod machine;
mod qmp;
mod space;

use std::path::PathBuf;

use async_trait::async_trait;
use caisson_hypervisor::{Hypervisor, HypervisorError, Vm, VmRecord, VmSpec, VmUser, user::Users};

pub use detect::Version;

/// What an admin may say about QEMU.
#[derive(Debug, Clone, Default)]
pub struct QemuConfig {
    /// `qemu-system-x86_64`; absent: the one found in PATH.
    pub binary: Option<PathBuf>,
    /// `caisson-vhost-vsock`.
    pub vsock_backend: PathBuf,
    /// How guest code is executed.
    pub accelerator: Accelerator,
    /// Whom both processes of a VM run as. Only QEMU's own program files need be readable by them.
    pub user: VmUser,
}

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accelerator {
    /// KVM where it is usable, else software.
    #[default]
    Auto,
    /// By the hardware; an error where that is impossible.
    Kvm,
    /// In software.
    Tcg,
}

/// What was chosen for guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    Kvm,
    Tcg,
}

/// The driver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Qemu {
    pub(crate) binary: PathBuf,
    pub(crate) version: Version,
    pub(crate) vsock_backend: PathBuf,
    pub(crate) engine: Engine,
    /// Why that engine, as half a sentence.
    pub(crate) because: String,
    pub(crate) users: Users,
}

/// [`Hypervisor::name`] of this driver.
pub const NAME: &str = "qemu";

impl Qemu {
    /// Finds the binaries, asks QEMU for its version and the host for its KVM, and decides.
    pub async fn detect(config: QemuConfig) -> Result<Self, HypervisorError> {
        detect::detect(config).await
    }

    /// Gives users out of the same set as another driver of this daemon.
    #[must_use]
    pub fn sharing_users(mut self, users: &Users) -> Self {
        self.users = users.clone();
        self
    }

    /// Whether guest code is executed in software.
    #[must_use]
    pub fn is_emulated(&self) -> bool {
        self.engine == Engine::Tcg
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> String {
        let engine = match self.engine {
            Engine::Kvm => "KVM",
            Engine::Tcg => "TCG software emulation",
        };
        let Self { version, because, .. } = self;
        format!(
            "QEMU {version} ({}) with {engine}: {because}; {}",
            self.binary.display(),
            self.users.who()
        )
    }

    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
        Ok(Box::new(launch::launch(self, spec).await?))
    }

    async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
        let adopted = machine::QemuVm::adopt(record, &self.users).await?;
        Ok(adopted.map(|vm| Box::new(vm) as Box<dyn Vm>))
    }
}
