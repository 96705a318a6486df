//! Seccomp profiles, compiled on the host to the classic BPF that the guest loads (seccomp(2), `struct seccomp_data`).
//!
//! Owns the profile format (OCI runtime specification, "Seccomp", with Docker's `archMap`, `includes` and `excludes`), the default
//! profile, and the generator. Pure: no files, no processes, no CRI. A profile that cannot be enforced as it is written is an error,
//! never a weaker filter.
//!
//! What libseccomp-based runtimes do is kept where profiles rely on it: x86_64 is always covered, whatever `architectures` says; names
//! that a kernel does not have are skipped; conditions on one argument that repeat are alternatives; a rule without conditions
//! replaces those with conditions for its call; a call newer than any that the profile names answers ENOSYS instead of the default's
//! EPERM, so that a libc falls back. The x32 ABI is closed (ENOSYS), and so is every architecture that is not listed (the process is
//! killed).

mod emit;
mod error;
mod policy;
mod profile;
mod syscalls;

pub use emit::{Instruction, Program};
pub use error::SeccompError;

/// The default profile: what containers may call that ask for RuntimeDefault.
const DEFAULT: &str = include_str!("../profiles/default.json");

/// Longest profile that is read, in bytes.
pub const MAX_PROFILE_BYTES: u64 = 1 << 20;

/// The filter of a container that asks for the default profile and has `capabilities` (`CAP_...`) in its bounding set.
pub fn default_profile(capabilities: &[String]) -> Result<Program, SeccompError> {
    compile(DEFAULT, capabilities)
}

/// The filter that `profile`, in JSON, describes for a container with `capabilities` (`CAP_...`) in its bounding set.
pub fn compile(profile: &str, capabilities: &[String]) -> Result<Program, SeccompError> {
    let profile = profile::parse(profile)?;
    let policy = policy::resolve(&profile, capabilities)?;
    emit::program(&policy)
}
