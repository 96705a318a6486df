//! Guest memory: where it comes from, and the slots by which KVM knows it.

#![expect(
    unsafe_code,
    reason = "gives KVM the addresses of mappings, and replaces mappings by those of files"
)]

use std::{
    collections::BTreeMap,
    ffi::c_void,
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_devices::ports::{GuestRam, MemoryControl};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, mmap::MmapRegionBuilder,
};

use crate::{Error, layout::PAGE};

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Private anonymous memory. The kernel's pages can be those of its file, shared with all who use it.
    #[default]
    Anonymous,
    /// A memfd, for a device in another process that must see the guest's memory (vhost-user).
    Shared,
}

/// How guest memory is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ram {
    /// What it is made of.
    pub backing: Backing,
    /// Ask for transparent huge pages: a guest boots with less CPU, and takes some MiB more. If not, there are none, whatever the
    /// host's default is, so that a guest takes what it has touched.
    pub huge_pages: bool,
}

impl Ram {
    /// Zeroed memory at a guest-physical address. It takes nothing until it is touched.
    pub(crate) fn region(self, start: GuestAddress, bytes: u64) -> io::Result<GuestRegionMmap> {
        let size = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let builder = MmapRegionBuilder::new(size).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match self.backing {
            Backing::Anonymous => {
                builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            }
            Backing::Shared => {
                use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
                let memory = memfd_create("caisson-guest", MemfdFlags::CLOEXEC)?;
                ftruncate(&memory, bytes)?;
                builder
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::new(File::from(memory), 0))
            }
        };
        let mapping = builder.build().map_err(io::Error::other)?;
        self.advise(mapping.as_ptr().cast(), size)?;
        GuestRegionMmap::new(mapping, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn advise(self, start: *mut c_void, size: usize) -> io::Result<()> {
        let huge = if self.huge_pages {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        for advice in [huge, Advice::LinuxDontDump] {
            // SAFETY: the range is one mapping that was just made; this advice changes no content.
            let advised = unsafe { rustix::mm::madvise(start, size, advice) };
            match advised {
                // A host without transparent huge pages has no such advice, and needs none.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The slots of a machine: which memory KVM shows to the guest where. The same regions are in [`GuestRam`].
#[derive(Debug)]
pub(crate) struct Slots {
    vm: Arc<VmFd>,
    kind: Ram,
    read_only: bool,
    limit: u32,
    ram: GuestRam,
    /// By start: number of the slot, and size. Also what orders changes.
    taken: Mutex<BTreeMap<u64, (u32, u64)>>,
    /// What is in a slot and not in `ram`.
    kept: Mutex<Vec<Arc<GuestRegionMmap>>>,
}

impl Slots {
    /// Makes memory at `ranges` of (start, bytes).
    pub(crate) fn new(
        vm: Arc<VmFd>,
        ranges: &[(u64, u64)],
        kind: Ram,
        read_only: bool,
        limit: u32,
    ) -> Result<Self, Error> {
        let mut regions = Vec::new();
        for &(start, bytes) in ranges {
            let region = kind
                .region(GuestAddress(start), bytes)
                .map_err(|source| Error::Memory { bytes, source })?;
            regions.push(region);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| Error::Memory {
            bytes: ranges.iter().map(|(_, bytes)| bytes).sum(),
            source: io::Error::other(e),
        })?;
        let slots = Self {
            vm,
            kind,
            read_only,
            limit,
            ram: GuestRam::new(memory),
            taken: Mutex::default(),
            kept: Mutex::default(),
        };
        let memory = slots.ram.memory();
        let mut taken = slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        for region in memory.iter() {
            slots
                .show(&mut taken, region, false)
                .map_err(|source| Error::Kvm {
                    what: "give KVM the guest's memory",
                    source,
                })?;
        }
        drop(taken);
        drop(memory);
        Ok(slots)
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(crate) fn backing(&self) -> Backing {
        self.kind.backing
    }

    /// Shows a mapping to the guest, read-only, without making it memory that devices reach. It stays for as long as the VM.
    pub(crate) fn show_for_ever(&self, region: Arc<GuestRegionMmap>) -> io::Result<()> {
        if !self.read_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        self.show(&mut taken, &region, true)?;
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(region);
        Ok(())
    }

    /// Gives KVM a region.
    fn show(
        &self,
        taken: &mut BTreeMap<u64, (u32, u64)>,
        region: &GuestRegionMmap,
        read_only: bool,
    ) -> io::Result<()> {
        let numbers: std::collections::BTreeSet<u32> = taken.values().map(|(number, _)| *number).collect();
        let slot = (0..self.limit)
            .find(|number| !numbers.contains(number))
            .ok_or(io::ErrorKind::StorageFull)?;
        let start = region.start_addr().0;
        let slot_region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: start,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a live mapping of that size. It goes into `ram` or `kept` (or is there), which keeps it mapped; `unmap`
        // takes the slot away before the region is let go, and no vCPU runs any more when these are dropped.
        unsafe { self.vm.set_user_memory_region(slot_region) }?;
        taken.insert(start, (slot, region.len()));
        Ok(())
    }

    /// Takes a region away from KVM.
    fn hide(&self, slot: u32, start: u64) -> io::Result<()> {
        let none = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: start,
            ..Default::default()
        };
        // SAFETY: a slot without size is deleted; no memory is referred to.
        unsafe { self.vm.set_user_memory_region(none) }?;
        Ok(())
    }

    /// Makes [`GuestRam`] be what `change` makes of it.
    fn replace(
        &self,
        change: impl FnOnce(&GuestMemoryMmap) -> io::Result<GuestMemoryMmap>,
    ) -> io::Result<()> {
        let guard = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.ram.memory())?;
        guard.replace(changed);
        Ok(())
    }
}

impl MemoryControl for Slots {
    fn map(&self, region: GuestRegionMmap, read_only: bool) -> io::Result<()> {
        if read_only && !self.read_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let region = Arc::new(region);
        let start = region.start_addr().0;
        self.replace(|memory| {
            memory
                .insert_region(Arc::clone(&region))
                .map_err(io::Error::other)
        })?;
        if let Err(error) = self.show(&mut taken, &region, read_only) {
            let len = region.len();
            self.replace(|memory| {
                let (without, _) = memory
                    .remove_region(GuestAddress(start), len)
                    .map_err(io::Error::other)?;
                Ok(without)
            })?;
            return Err(error);
        }
        Ok(())
    }

    fn add_ram(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        self.map(self.kind.region(start, bytes)?, false)
    }

    fn unmap(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = match taken.get(&start.0) {
            Some(&(slot, size)) if size == bytes => slot,
            _ => return Err(io::ErrorKind::NotFound.into()),
        };
        self.hide(slot, start.0)?;
        taken.remove(&start.0);
        self.replace(|memory| {
            let (without, _) = memory.remove_region(start, bytes).map_err(io::Error::other)?;
            Ok(without)
        })
    }
}

/// Puts `bytes` of a file from `offset` on at a guest-physical address. Whole pages of it become private mappings of the file, so that
/// all guests share what none of them has changed; the rest is copied. Nothing is read that the guest does not touch.
///
/// The file must not shrink while the guest runs, or the process dies of SIGBUS.
pub(crate) fn map_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    start: GuestAddress,
    bytes: u64,
) -> io::Result<()> {
    let aligned = offset.is_multiple_of(PAGE) && start.0.is_multiple_of(PAGE);
    let mapped = if aligned { bytes - bytes % PAGE } else { 0 };
    if mapped > 0 {
        let size = usize::try_from(mapped).map_err(|_| io::ErrorKind::InvalidInput)?;
        let place = memory.get_slice(start, size).map_err(io::Error::other)?;
        // SAFETY: the range lies within one region of guest memory, as `get_slice` has checked, and begins on a page, as the region
        // does. What is replaced is mapped memory of the guest, which nobody holds references into (only raw accesses), by memory of
        // the same size and rights that stays mapped until the region as a whole is unmapped.
        unsafe {
            rustix::mm::mmap(
                place.ptr_guard_mut().as_ptr().cast(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                offset,
            )
        }?;
    }
    copy_file(
        memory,
        file,
        offset + mapped,
        GuestAddress(start.0 + mapped),
        bytes - mapped,
    )
}

/// Copies `bytes` of a file from `offset` on to a guest-physical address, where there are zeros so far: pages of zeros stay untouched.
pub(crate) fn copy_file(
    memory: &GuestMemoryMmap,
    file: &File,
    offset: u64,
    start: GuestAddress,
    bytes: u64,
) -> io::Result<()> {
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;
    const PIECE: u64 = 64 << 10;
    static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    let mut buffer = vec![0; usize::try_from(bytes.min(PIECE)).map_err(io::Error::other)?];
    let mut done = 0;
    while done < bytes {
        let piece = &mut buffer[..usize::try_from((bytes - done).min(PIECE)).map_err(io::Error::other)?];
        file.read_exact_at(piece, offset + done)?;
        for page in piece.chunks(PAGE as usize) {
            if page != &ZEROS[..page.len()] {
                memory
                    .write_slice(page, GuestAddress(start.0 + done))
                    .map_err(io::Error::other)?;
            }
            done += page.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        let region = Ram::default().region(GuestAddress(0), 1 << 20).unwrap();
        GuestMemoryMmap::from_regions(vec![region]).unwrap()
    }

    fn file(bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8).collect();
        file.write_all(&content).unwrap();
        file
    }

    #[test]
    fn a_file_in_guest_memory_ends_with_its_last_byte() {
        for (offset, start) in [(0, 0x10000), (0x1000, 0x20000), (5, 0x10000), (0, 0x10005)] {
            let memory = memory();
            memory
                .write_slice(&[0xaa; 16], GuestAddress(start + 9001))
                .unwrap();
            map_file(&memory, &file(20_000), offset, GuestAddress(start), 9001).unwrap();
            let mut seen = vec![0; 9002];
            memory.read_slice(&mut seen, GuestAddress(start)).unwrap();
            let expected: Vec<u8> = (0..9001).map(|i| ((i + offset) / 7) as u8).collect();
            assert_eq!(seen[..9001], expected);
            assert_eq!(seen[9001], 0xaa, "nothing beyond the end is touched");
        }
    }

    #[test]
    fn what_the_guest_writes_does_not_reach_the_file() {
        let (memory, file) = (memory(), file(8192));
        map_file(&memory, &file, 0, GuestAddress(0x10000), 8192).unwrap();
        memory.write_slice(&[0xff; 8192], GuestAddress(0x10000)).unwrap();
        let mut first = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!(first, [0; 4]);
    }

    #[test]
    fn a_file_that_does_not_fit_is_refused() {
        assert!(map_file(&memory(), &file(8192), 0, GuestAddress((1 << 20) - 4096), 8192).is_err());
        assert!(map_file(&memory(), &file(10), 0, GuestAddress(0), 100).is_err());
    }
}
