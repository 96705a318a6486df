//! Takes over what was inherited: the numbers of the specification become owned descriptors, each once.

#![expect(
    unsafe_code,
    reason = "descriptors that were passed in are taken over by number"
)]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
};

use caisson_vmm_api::{
    DecodeError,
    spec::{Descriptor, SPEC_BYTES_MAX, VmSpec},
};

/// What is wrong with what was inherited.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritanceError {
    #[error("descriptor {} is not open", .0.0)]
    Closed(Descriptor, #[source] rustix::io::Errno),
    #[error("descriptor {} was not passed, or is used twice", .0.0)]
    Missing(Descriptor),
    #[error("cannot read the VM's specification")]
    Read(#[source] io::Error),
    #[error(transparent)]
    Spec(#[from] DecodeError),
}

/// Inherited descriptors that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Inherited(BTreeMap<i32, OwnedFd>);

impl Inherited {
    /// Reads the specification from the descriptor of this number, and takes over all that it names. Called once, before anything else is opened.
    pub(crate) fn take(number: i32) -> Result<(VmSpec, Self), InheritanceError> {
        let mut file = File::from(own(Descriptor(number))?);
        let mut bytes = Vec::new();
        // Written, and not rewound, by whoever made it.
        io::Seek::rewind(&mut file).map_err(InheritanceError::Read)?;
        (&file)
            .take(SPEC_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(InheritanceError::Read)?;
        let spec = VmSpec::decode(&bytes)?;
        let mut all = BTreeMap::new();
        // Decoding has made sure that none is named twice.
        for descriptor in spec.descriptors() {
            if descriptor.0 == number {
                return Err(InheritanceError::Missing(descriptor));
            }
            all.insert(descriptor.0, own(descriptor)?);
        }
        Ok((spec, Self(all)))
    }

    /// Gives one away.
    pub(crate) fn give(&mut self, descriptor: Descriptor) -> Result<OwnedFd, InheritanceError> {
        self.0
            .remove(&descriptor.0)
            .ok_or(InheritanceError::Missing(descriptor))
    }

    /// Gives some away, in order.
    pub(crate) fn give_all(&mut self, descriptors: &[Descriptor]) -> Result<Vec<OwnedFd>, InheritanceError> {
        descriptors.iter().map(|each| self.give(*each)).collect()
    }
}

fn own(descriptor: Descriptor) -> Result<OwnedFd, InheritanceError> {
    if descriptor.0 < 3 {
        return Err(InheritanceError::Missing(descriptor));
    }
    // SAFETY: not -1 (checked above), and used only to ask whether it is open at all, which is fine for one that is not.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor.0) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)
        .map_err(|e| InheritanceError::Closed(descriptor, e))?;
    // SAFETY: it is open, was passed to this process for it to own, and nothing has been opened before that could have this number.
    // Each is owned once: a specification that names one twice is refused, and so is one that names its own.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor.0) })
}
