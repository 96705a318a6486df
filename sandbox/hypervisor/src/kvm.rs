//! What this host's KVM can do for a stock guest kernel.
//!
//! A `/dev/kvm` that opens is not enough: where KVM is PVM (pagetable virtual machine, KVM on a host without hardware
//! virtualization), VMs can be created, but an unmodified kernel crawls through the instruction emulator and never boots. Such a
//! host shows neither `vmx` nor `svm` among its CPU flags. Must not know any driver.

#![expect(unsafe_code, reason = "KVM is asked by ioctl")]

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// KVM_GET_API_VERSION of linux/kvm.h: `_IO(0xAE, 0x00)`.
const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00 as libc::Ioctl;
/// KVM_CREATE_VM of linux/kvm.h: `_IO(0xAE, 0x01)`.
const KVM_CREATE_VM: libc::Ioctl = 0xAE01 as libc::Ioctl;
/// The only version there has been since Linux 2.6.22; programs shall refuse any other (Documentation/virt/kvm/api.rst, 4.1).
const KVM_API_VERSION: i32 = 12;

/// Whose hardware virtualization KVM stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// VT-x: flag `vmx`.
    Intel,
    /// AMD-V: flag `svm`.
    Amd,
}

/// What the host's KVM can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// Runs unmodified guest kernels.
    Usable {
        /// Kind of hardware.
        vendor: Vendor,
    },
    /// The device works, the CPU has no hardware virtualization: PVM, which boots no stock kernel.
    Paravirtual,
    /// There is no device.
    NoDevice,
    /// The device may not be opened by this process.
    Denied(String),
    /// The device is there and does not do its work.
    Unusable(String),
}

impl Kvm {
    /// Whether an unmodified guest kernel boots on it.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable { .. })
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable { vendor: Vendor::Intel } => f.write_str("KVM is usable (Intel VT-x)"),
            Self::Usable { vendor: Vendor::Amd } => f.write_str("KVM is usable (AMD-V)"),
            Self::Paravirtual => f.write_str(
                "KVM opens, but the CPU shows neither vmx nor svm: this is PVM, under which a stock guest kernel does not boot",
            ),
            Self::NoDevice => f.write_str("this host has no KVM device"),
            Self::Denied(reason) => write!(f, "the KVM device may not be opened: {reason}"),
            Self::Unusable(reason) => write!(f, "the KVM device does not work: {reason}"),
        }
    }
}

/// Why the device could not be used.
#[derive(Debug)]
pub enum DeviceFailure {
    /// Opening it failed.
    Open(io::Error),
    /// It answered another version of the interface.
    Version(i32),
    /// A VM could not be created.
    CreateVm(io::Error),
}

/// Asks the KVM device at `path` (normally `/dev/kvm`) and this host's `/proc/cpuinfo`. Creates a VM and closes it at once.
#[must_use]
pub fn probe(path: &Path) -> Kvm {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    judge(&cpuinfo, try_device(path))
}

/// Draws the conclusion from the text of `/proc/cpuinfo` and what the device answered.
#[must_use]
pub fn judge(cpuinfo: &str, device: Result<(), DeviceFailure>) -> Kvm {
    match device {
        Err(DeviceFailure::Open(e)) => match e.kind() {
            io::ErrorKind::NotFound => Kvm::NoDevice,
            io::ErrorKind::PermissionDenied => Kvm::Denied(e.to_string()),
            // ENODEV, ENXIO: the node exists and no module stands behind it.
            _ if matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => Kvm::NoDevice,
            _ => Kvm::Unusable(format!("open: {e}")),
        },
        Err(DeviceFailure::Version(n)) => {
            Kvm::Unusable(format!("its API version is {n}, expected {KVM_API_VERSION}"))
        }
        Err(DeviceFailure::CreateVm(e)) => Kvm::Unusable(format!("creating a VM: {e}")),
        Ok(()) => match hardware(cpuinfo) {
            Some(vendor) => Kvm::Usable { vendor },
            None => Kvm::Paravirtual,
        },
    }
}

fn hardware(cpuinfo: &str) -> Option<Vendor> {
    let flags = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "flags").then_some(value)
    })?;
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "vmx" => Some(Vendor::Intel),
        "svm" => Some(Vendor::Amd),
        _ => None,
    })
}

fn try_device(path: &Path) -> Result<(), DeviceFailure> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(DeviceFailure::Open)?;
    let version = api_version(&device).map_err(DeviceFailure::CreateVm)?;
    if version != KVM_API_VERSION {
        return Err(DeviceFailure::Version(version));
    }
    create_vm(&device).map(drop).map_err(DeviceFailure::CreateVm)
}

fn api_version(device: &File) -> io::Result<i32> {
    // SAFETY: KVM_GET_API_VERSION takes no pointer, and the descriptor is open for the whole call.
    match unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) } {
        -1 => Err(io::Error::last_os_error()),
        version => Ok(version),
    }
}

fn create_vm(device: &File) -> io::Result<OwnedFd> {
    loop {
        // SAFETY: KVM_CREATE_VM takes the machine type by value (0: default), no pointer; the descriptor is open.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), KVM_CREATE_VM, 0) };
        if fd >= 0 {
            // SAFETY: a descriptor that the kernel has just made for this call, and nobody else knows.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuinfo(flags: &str) -> String {
        format!("processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: {flags}\nbugs\t\t: x\n\n")
    }

    #[test]
    fn hardware_flags_and_a_working_device_are_usable() {
        assert_eq!(
            judge(&cpuinfo("fpu vmx sse"), Ok(())),
            Kvm::Usable {
                vendor: Vendor::Intel
            }
        );
        assert_eq!(
            judge(&cpuinfo("fpu svm sse"), Ok(())),
            Kvm::Usable { vendor: Vendor::Amd }
        );
    }

    #[test]
    fn a_working_device_without_hardware_flags_is_pvm() {
        assert_eq!(
            judge(&cpuinfo("fpu vmmcall hypervisor"), Ok(())),
            Kvm::Paravirtual
        );
        assert_eq!(judge("", Ok(())), Kvm::Paravirtual);
    }

    #[test]
    fn a_flag_must_match_as_a_whole_word_on_the_flags_line() {
        let text = "model name\t: svm vmx\nflags\t\t: svm_lock vmxnet\n";
        assert_eq!(judge(text, Ok(())), Kvm::Paravirtual);
    }

    #[test]
    fn failures_keep_their_kind_and_their_words() {
        let open = |errno| Err(DeviceFailure::Open(io::Error::from_raw_os_error(errno)));
        let svm = cpuinfo("svm");
        assert_eq!(judge(&svm, open(libc::ENOENT)), Kvm::NoDevice);
        assert_eq!(judge(&svm, open(libc::ENODEV)), Kvm::NoDevice);
        assert!(matches!(judge(&svm, open(libc::EACCES)), Kvm::Denied(_)));
        assert!(matches!(judge(&svm, open(libc::EIO)), Kvm::Unusable(_)));
        let version = judge(&svm, Err(DeviceFailure::Version(11)));
        assert_eq!(
            version.to_string(),
            "the KVM device does not work: its API version is 11, expected 12"
        );
        let busy = Err(DeviceFailure::CreateVm(io::Error::from_raw_os_error(libc::EBUSY)));
        assert!(judge(&svm, busy).to_string().contains("creating a VM"));
    }

    #[test]
    fn a_missing_device_and_a_file_of_another_kind_are_told_apart() {
        assert_eq!(probe(Path::new("/nonexistent/kvm")), Kvm::NoDevice);
        assert!(matches!(probe(Path::new("/dev/null")), Kvm::Unusable(_)));
    }
}
