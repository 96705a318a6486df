//! Guests made of a few instructions, and the driver with the room's own vsock backend.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use caisson_hypervisor::{Vm, VmSpec, VmUser};
use caisson_qemu::{Accelerator, Qemu, QemuConfig};

pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// A driver that emulates, or `None` (said aloud) where there is no QEMU.
pub(crate) async fn driver() -> Option<Qemu> {
    driver_as(VmUser::default()).await
}

pub(crate) async fn driver_as(user: VmUser) -> Option<Qemu> {
    let config = QemuConfig {
        vsock_backend: backend(),
        accelerator: Accelerator::Tcg,
        user,
        binary: None,
    };
    match Qemu::detect(config).await {
        Ok(driver) => Some(driver),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Cargo builds examples along with tests, in a directory beside theirs.
pub(crate) fn backend() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples/fake_vsock_backend");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

/// A VM's directory and boot files.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) id: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let dir = tempfile::tempdir().unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(dir.path(), mode).unwrap();
        fs::create_dir(dir.path().join("vm")).unwrap();
        fs::write(dir.path().join("kernel"), halting_kernel()).unwrap();
        fs::write(dir.path().join("initramfs"), b"").unwrap();
        let id = format!(
            "{:x}{:x}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed) + 0xa000
        );
        Self { dir, id }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn spec(&self) -> VmSpec {
        VmSpec {
            id: self.id.clone(),
            dir: self.path("vm"),
            kernel: self.path("kernel"),
            initramfs: self.path("initramfs"),
            cmdline: Vec::new(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            nics: Vec::new(),
            disks: Vec::new(),
            attach_slots: 3,
            cgroup: None,
        }
    }

    /// A sparse image.
    pub(crate) fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    pub(crate) async fn console_shows(&self, vm: &dyn Vm, text: &str) {
        let until = Instant::now() + LIMIT;
        loop {
            let console = fs::read(vm.console()).unwrap_or_default();
            if String::from_utf8_lossy(&console).contains(text) {
                return;
            }
            assert!(
                Instant::now() < until,
                "{text:?} never came: {}",
                String::from_utf8_lossy(&console)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A failed test leaves no VM behind.
impl Drop for Bench {
    fn drop(&mut self) {
        for pid in processes_of(&self.id) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
    }
}

/// A bzImage (Documentation/arch/x86/boot.rst) whose real-mode entry halts for ever.
pub(crate) fn halting_kernel() -> Vec<u8> {
    let mut image = vec![0_u8; 4096];
    image[0x1f1] = 1; // setup_sects: one after the boot sector
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x204].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]); // entry: cli; hlt; jmp to hlt
    // The header's magic lies where a jump would go over it: what stands at 0x202 is data.
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]); // jmp 0x268, behind the header
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0c, 0x02]); // protocol 2.12
    image[0x211] = 1; // LOADED_HIGH
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    image[0x238..0x23c].copy_from_slice(&2048_u32.to_le_bytes()); // cmdline_size
    image[0x268..0x26c].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]); // cli; hlt; jmp to hlt
    image
}

/// A cpio archive (newc) with an /init that says `UP` and sleeps for ever.
pub(crate) fn sleeping_initramfs() -> Vec<u8> {
    let message = b"UP\n";
    let code = [
        &[0xb8, 1, 0, 0, 0][..],               // mov eax, 1 (write)
        &[0xbf, 1, 0, 0, 0],                   // mov edi, 1
        &[0x48, 0x8d, 0x35, 16, 0, 0, 0],      // lea rsi, [rip + 16]: behind the code
        &[0xba, message.len() as u8, 0, 0, 0], // mov edx, length
        &[0x0f, 0x05],                         // syscall
        &[0xb8, 34, 0, 0, 0],                  // mov eax, 34 (pause)
        &[0x0f, 0x05],                         // syscall
        &[0xeb, 0xf7],                         // jmp to mov eax, 34
    ]
    .concat();
    let program = elf(&[&code[..], message].concat());
    let mut archive = Vec::new();
    for (name, mode, data) in [("init", 0o100_755, &program[..]), ("TRAILER!!!", 0, &[][..])] {
        let fields = [0, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").into_bytes());
        }
        archive.extend(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A static x86-64 executable of one segment whose entry is its first byte.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend([2_u16, 62].iter().flat_map(|v| v.to_le_bytes())); // executable, x86-64
    image.extend(1_u32.to_le_bytes());
    image.extend([BASE + HEADERS, 64, 0].iter().flat_map(|v: &u64| v.to_le_bytes())); // entry, program headers
    image.extend(0_u32.to_le_bytes());
    image.extend([64_u16, 56, 1, 0, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
    image.extend([1_u32, 5].iter().flat_map(|v| v.to_le_bytes())); // PT_LOAD, read and execute
    let size = HEADERS + code.len() as u64;
    image.extend(
        [0, BASE, BASE, size, size, 0x1000]
            .iter()
            .flat_map(|v: &u64| v.to_le_bytes()),
    );
    image.extend(code);
    image
}

/// The newest kernel of this name from the cache that `guest/` fills (`distribution-*/vmlinuz`), or `None` (said aloud).
pub(crate) fn cached_kernel(prefix: &str, file: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("CAISSON_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache/caisson")))?;
    let entries = fs::read_dir(&cache).into_iter().flatten().filter_map(Result::ok);
    let found = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(file))
        .filter(|kernel| kernel.is_file())
        .max_by_key(|kernel| fs::metadata(kernel).and_then(|m| m.modified()).ok());
    if found.is_none() {
        eprintln!(
            "skipped: no {prefix}*/{file} in {} (see guest/README.md)",
            cache.display()
        );
    }
    found
}

/// Processes that carry this VM's id.
pub(crate) fn processes_of(id: &str) -> Vec<i32> {
    let marker = format!("CAISSON_VM_ID={id}\0");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if String::from_utf8_lossy(&environment).contains(&marker) {
            found.push(pid);
        }
    }
    found
}
