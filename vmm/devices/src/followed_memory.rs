//! Memory that comes and goes, and those in the host's kernel that must know of it before the guest may use it: vhost.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::ports::{GuestRam, MemoryControl};

/// Must know where the guest's memory is mapped.
pub trait FollowsMemory: Send + Sync {
    /// This is all of it from now on. On an error, the change that led to it is taken back.
    fn follow(&self, memory: &GuestMemoryMmap) -> io::Result<()>;
}

/// A [`MemoryControl`] that tells of its changes: of new memory before its user hears that it is there, of memory that goes before it is
/// unmapped.
pub struct FollowedMemory {
    control: Arc<dyn MemoryControl>,
    ram: GuestRam,
    followers: Mutex<Vec<Weak<dyn FollowsMemory>>>,
}

impl fmt::Debug for FollowedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FollowedMemory").finish_non_exhaustive()
    }
}

impl FollowedMemory {
    /// Around the machine's control of `ram`.
    #[must_use]
    pub fn new(control: Arc<dyn MemoryControl>, ram: GuestRam) -> Self {
        Self {
            control,
            ram,
            followers: Mutex::default(),
        }
    }

    /// Tells of the memory that there is, and of every change as long as the follower lives.
    pub fn add_follower(&self, follower: &Arc<dyn FollowsMemory>) -> io::Result<()> {
        let mut followers = self.lock();
        follower.follow(&self.ram.memory())?;
        let follower = Arc::downgrade(follower);
        // A driver may start its device as often as it likes.
        followers.retain(|known| known.strong_count() > 0 && !known.ptr_eq(&follower));
        followers.push(follower);
        Ok(())
    }

    /// Held during a change: one at a time.
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<dyn FollowsMemory>>> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn added(
        &self,
        followers: &[Weak<dyn FollowsMemory>],
        start: GuestAddress,
        bytes: u64,
    ) -> io::Result<()> {
        tell(followers, &self.ram.memory()).or_else(|e| {
            let memory = self.without(start, bytes)?;
            tell(followers, &memory)?;
            self.control.unmap(start, bytes)?;
            Err(e)
        })
    }

    fn without(&self, start: GuestAddress, bytes: u64) -> io::Result<GuestMemoryMmap> {
        let memory = self.ram.memory();
        let (memory, _) = memory.remove_region(start, bytes).map_err(io::Error::other)?;
        Ok(memory)
    }
}

fn tell(followers: &[Weak<dyn FollowsMemory>], memory: &GuestMemoryMmap) -> io::Result<()> {
    let living = followers.iter().filter_map(Weak::upgrade);
    living
        .into_iter()
        .try_for_each(|follower| follower.follow(memory))
}

impl MemoryControl for FollowedMemory {
    fn map(&self, region: GuestRegionMmap, read_only: bool) -> io::Result<()> {
        let (start, bytes) = (region.start_addr(), region.len());
        let followers = self.lock();
        self.control.map(region, read_only)?;
        self.added(&followers, start, bytes)
    }

    fn add_ram(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let followers = self.lock();
        self.control.add_ram(start, bytes)?;
        self.added(&followers, start, bytes)
    }

    fn unmap(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        let followers = self.lock();
        let memory = self.without(start, bytes)?;
        tell(&followers, &memory)?;
        self.control.unmap(start, bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend};

    use super::*;

    struct Machine(GuestRam);

    impl MemoryControl for Machine {
        fn map(&self, region: GuestRegionMmap, _read_only: bool) -> io::Result<()> {
            let lock = self.0.lock().unwrap();
            let memory = self.0.memory().insert_region(Arc::new(region)).unwrap();
            lock.replace(memory);
            Ok(())
        }
        fn add_ram(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
            let region = GuestRegionMmap::from_range(start, bytes as usize, None);
            self.map(region.unwrap(), false)
        }
        fn unmap(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
            let lock = self.0.lock().unwrap();
            let (memory, _) = self.0.memory().remove_region(start, bytes).unwrap();
            lock.replace(memory);
            Ok(())
        }
    }

    /// Takes note, and refuses more than three regions.
    #[derive(Default)]
    struct Follower(Mutex<Vec<usize>>);

    impl FollowsMemory for Follower {
        fn follow(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
            self.0.lock().unwrap().push(memory.num_regions());
            if memory.num_regions() > 3 {
                return Err(io::ErrorKind::ArgumentListTooLong.into());
            }
            Ok(())
        }
    }

    #[test]
    fn followers_know_each_change_and_can_refuse_it() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let ram = GuestMemoryAtomic::new(memory);
        let followed = FollowedMemory::new(Arc::new(Machine(ram.clone())), ram.clone());
        let follower = Arc::new(Follower::default());
        let seen = || std::mem::take(&mut *follower.0.lock().unwrap());
        let port: Arc<dyn FollowsMemory> = follower.clone();
        followed.add_follower(&port).unwrap();
        followed.add_follower(&port).unwrap();
        assert_eq!(seen(), [1, 1], "once more, and still one follower");
        for place in [0x1000, 0x2000] {
            followed.add_ram(GuestAddress(place), 0x1000).unwrap();
        }
        assert_eq!(seen(), [2, 3]);
        assert!(followed.add_ram(GuestAddress(0x3000), 0x1000).is_err());
        assert_eq!((seen(), ram.memory().num_regions()), (vec![4, 3], 3));
        followed.unmap(GuestAddress(0x1000), 0x1000).unwrap();
        assert_eq!((seen(), ram.memory().num_regions()), (vec![2], 2));
        assert!(followed.unmap(GuestAddress(0x1000), 0x1000).is_err());
        drop(port);
    }
}
