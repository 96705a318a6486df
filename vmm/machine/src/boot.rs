//! Puts a kernel into guest memory, with everything that firmware would have told it.
//!
//! Two images (an ELF `vmlinux`, a bzImage) and two ways in: PVH (Xen's, 32-bit, the kernel makes its own page tables) and the 64-bit
//! entry of the Linux boot protocol (Documentation/arch/x86/boot.rst in the kernel's tree).

mod bzimage;
mod elf;
mod pvh;
mod registers;
mod zero_page;

use std::{fs::File, io, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) use registers::Start;

use crate::{
    acpi::Described,
    layout::{ACPI, COMMAND_LINE, COMMAND_LINE_BYTES, HIGH_MEMORY, Layout, PAGE},
    memory::{self, Backing},
};

/// Which way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Entry {
    /// What the image offers, the 64-bit entry first.
    #[default]
    Any,
    /// The 64-bit entry.
    Linux64,
    /// PVH; only ELF images have it.
    Pvh,
}

/// What to boot.
#[derive(Debug)]
pub struct Kernel {
    /// An ELF `vmlinux` or a bzImage. It must not change while the guest runs.
    pub image: File,
    /// Its initramfs. It must not change while the guest runs.
    pub initramfs: Option<File>,
    /// Its command line, without a terminating zero.
    pub command_line: String,
    /// Which way in.
    pub entry: Entry,
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file could not be read, or does not fit into memory.
    #[error("cannot load the {what}")]
    Load {
        /// Which file, or which part of it.
        what: &'static str,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("the kernel is no 64-bit ELF image for x86 and no bzImage: {0}")]
    Image(&'static str),
    /// The kernel does not have the way in that was asked for.
    #[error("the kernel has no {0} entry")]
    NoEntry(&'static str),
    /// The kernel cannot be put where it wants to be.
    #[error("the kernel wants {start:#x} to {end:#x}, which is not free RAM")]
    Place {
        /// First address.
        start: u64,
        /// End.
        end: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error("an initramfs of {0} bytes does not fit beside the kernel")]
    Initramfs(u64),
    /// The command line is too long, or holds a zero byte.
    #[error("a command line of {0} bytes: must be shorter than 2048 and hold no zero byte")]
    CommandLine(usize),
}

/// What was loaded: where it can be entered, and the end of what it takes.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    entry64: Option<u64>,
    pvh: Option<u64>,
    /// End of all that the kernel uses before it knows its memory.
    end: u64,
    /// The highest address that an initramfs may reach to.
    initramfs_limit: u64,
    /// The header of a bzImage, to be handed back to it.
    header: Option<linux_loader::bootparam::setup_header>,
}

/// Where the initramfs is; 0 bytes if there is none.
#[derive(Debug, Clone, Copy, Default)]
struct Initramfs {
    start: u64,
    bytes: u64,
}

/// Puts everything into memory: how the first vCPU has to start.
pub(crate) fn load(
    memory: &GuestMemoryMmap,
    backing: Backing,
    layout: &Layout,
    kernel: &Kernel,
    described: Described,
) -> Result<Start, crate::Error> {
    let loaded = load_image(memory, backing, layout, &kernel.image)?;
    let initramfs = match &kernel.initramfs {
        Some(file) => load_initramfs(memory, layout, file, &loaded)?,
        None => Initramfs::default(),
    };
    write_command_line(memory, &kernel.command_line)?;
    let tables = crate::acpi::tables(described)?;
    write(memory, "ACPI tables", &tables, ACPI.start)?;
    Ok(match (kernel.entry, loaded.entry64, loaded.pvh) {
        (Entry::Any | Entry::Linux64, Some(entry), _) => {
            zero_page::write(memory, layout, &loaded, initramfs, kernel.command_line.len())?;
            registers::prepare_64(memory, entry)?
        }
        (Entry::Any | Entry::Pvh, _, Some(entry)) => {
            pvh::write(memory, layout, initramfs)?;
            registers::prepare_pvh(memory, entry)?
        }
        (Entry::Pvh, _, None) => return Err(KernelError::NoEntry("PVH").into()),
        (Entry::Any | Entry::Linux64, None, _) => return Err(KernelError::NoEntry("64-bit").into()),
    })
}

fn load_image(
    memory: &GuestMemoryMmap,
    backing: Backing,
    layout: &Layout,
    image: &File,
) -> Result<Loaded, KernelError> {
    let mut magic = [0; 4];
    image
        .read_exact_at(&mut magic, 0)
        .map_err(|source| KernelError::Load {
            what: "kernel",
            source,
        })?;
    if magic == elf::MAGIC {
        elf::load(memory, backing, layout, image)
    } else {
        bzimage::load(memory, layout, image)
    }
}

/// As high as it may be, so that the kernel can unpack itself below it.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    file: &File,
    loaded: &Loaded,
) -> Result<Initramfs, KernelError> {
    let failed = |source| KernelError::Load {
        what: "initramfs",
        source,
    };
    let bytes = file.metadata().map_err(failed)?.len();
    let limit = layout.low.min(loaded.initramfs_limit);
    let start = limit
        .checked_sub(bytes)
        .map(|start| start - start % PAGE)
        .filter(|start| *start >= loaded.end)
        .ok_or(KernelError::Initramfs(bytes))?;
    // Copied, not mapped: the kernel unpacks it at once and then uses its memory for something else.
    memory::copy_file(memory, file, 0, GuestAddress(start), bytes).map_err(failed)?;
    Ok(Initramfs { start, bytes })
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(), KernelError> {
    if line.len() >= COMMAND_LINE_BYTES || line.contains('\0') {
        return Err(KernelError::CommandLine(line.len()));
    }
    let bytes = [line.as_bytes(), &[0]].concat();
    write(memory, "command line", &bytes, COMMAND_LINE)
}

fn write(memory: &GuestMemoryMmap, what: &'static str, bytes: &[u8], start: u64) -> Result<(), KernelError> {
    memory
        .write_slice(bytes, GuestAddress(start))
        .map_err(|e| KernelError::Load {
            what,
            source: io::Error::other(e),
        })
}

/// Checks that `start..end` is RAM where nothing else is put.
fn check_place(layout: &Layout, start: u64, end: u64) -> Result<(), KernelError> {
    if start < HIGH_MEMORY || end < start || end > layout.low {
        return Err(KernelError::Place { start, end });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
