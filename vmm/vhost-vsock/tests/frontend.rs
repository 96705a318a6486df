//! The process itself, confined as always, under a frontend that does what a hypervisor and its guest do.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use std::{
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use caisson_devices::virtio::vsock::{HEADER_BYTES, HOST_CID, Header, Op, STREAM};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures, message::VhostUserConfigFlags},
};
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

const CID: u64 = 42;
const MEMORY: usize = 4 << 20;
const SIZE: u16 = 16;
const BUFFER: u32 = 4096;
const LONG: Duration = Duration::from_secs(30);

fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < LONG, "never came: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Backend {
    child: Child,
    dir: tempfile::TempDir,
}

impl Backend {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_caisson-vhost-vsock"))
            .arg("--socket")
            .arg(dir.path().join("vhost"))
            .arg("--uds")
            .arg(dir.path().join("vsock"))
            .args(["--cid", &CID.to_string()])
            .spawn()
            .unwrap();
        let backend = Self { child, dir };
        until("the sockets", || {
            (backend.path("vhost").exists() && backend.path("vsock").exists()).then_some(())
        });
        backend
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("vsock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    fn ended(&mut self) -> ExitStatus {
        until("the end of the process", || self.child.try_wait().unwrap())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Fails only when it has ended, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// One queue: rings at `base`, buffers behind them.
struct Queue {
    base: u64,
    index: usize,
    offered: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Queue {
    fn avail(&self) -> u64 {
        self.base + 0x1000
    }
    fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }
    fn buffer(&self, slot: u16) -> u64 {
        self.base + 0x3000 + u64::from(slot) * u64::from(BUFFER)
    }

    fn new(frontend: &mut Frontend, memory: &GuestMemoryMmap, index: usize) -> Self {
        let queue = Self {
            base: index as u64 * 0x10_0000,
            index,
            offered: 0,
            used: 0,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(0).unwrap(),
        };
        memory
            .write_slice(&[0; 0x3000], GuestAddress(queue.base))
            .unwrap();
        let host = |at: u64| memory.get_host_address(GuestAddress(at)).unwrap() as u64;
        frontend.set_vring_num(index, SIZE).unwrap();
        let rings = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: host(queue.base),
            used_ring_addr: host(queue.used_ring()),
            avail_ring_addr: host(queue.avail()),
            log_addr: None,
        };
        frontend.set_vring_addr(index, &rings).unwrap();
        frontend.set_vring_base(index, 0).unwrap();
        frontend.set_vring_call(index, &queue.call).unwrap();
        frontend.set_vring_kick(index, &queue.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
        queue
    }

    fn offer(&mut self, memory: &GuestMemoryMmap, len: u32, flags: u16) {
        let slot = self.offered % SIZE;
        let at = self.base + 16 * u64::from(slot);
        memory.write_obj(self.buffer(slot), GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(u32::from(flags), GuestAddress(at + 12)).unwrap();
        memory
            .write_obj(slot, GuestAddress(self.avail() + 4 + 2 * u64::from(slot)))
            .unwrap();
        self.offered = self.offered.wrapping_add(1);
        memory
            .store(
                self.offered,
                GuestAddress(self.avail() + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// Slot and length of the next buffer that came back.
    fn take(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let idx: u16 = memory
            .load(
                GuestAddress(self.used_ring() + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        if idx == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.used % SIZE);
        self.used = self.used.wrapping_add(1);
        let slot: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        Some((slot as u16, memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }
}

/// A hypervisor with its guest.
struct Vm {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    rx: Queue,
    tx: Queue,
}

impl Vm {
    fn start(backend: &Backend) -> Self {
        let mut frontend = Frontend::connect(backend.path("vhost"), 2).unwrap();
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert!(features & (1 << 32) != 0, "VIRTIO_F_VERSION_1");
        // Without EVENT_IDX: this driver is a simple one.
        frontend.set_features(features & (1 << 32 | 1 << 30)).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend
            .set_protocol_features(VhostUserProtocolFeatures::CONFIG)
            .unwrap();

        let fd: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, MEMORY as u64).unwrap();
        let file = FileOffset::new(File::from(fd), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(file))]).unwrap();
        let region = memory.iter().next().unwrap();
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
                mmap_offset: 0,
                mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
            }])
            .unwrap();
        let (rx, tx) = (
            Queue::new(&mut frontend, &memory, 0),
            Queue::new(&mut frontend, &memory, 1),
        );
        let mut vm = Self {
            frontend,
            memory,
            rx,
            tx,
        };
        for _ in 0..SIZE {
            vm.rx.offer(&vm.memory, BUFFER, 2);
        }
        vm
    }

    /// As a guest that boots again: QEMU stops the queues, and starts new ones.
    fn reboot(&mut self) {
        for queue in [self.rx.index, self.tx.index] {
            self.frontend.get_vring_base(queue).unwrap();
        }
        self.rx = Queue::new(&mut self.frontend, &self.memory, 0);
        self.tx = Queue::new(&mut self.frontend, &self.memory, 1);
        for _ in 0..SIZE {
            self.rx.offer(&self.memory, BUFFER, 2);
        }
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (slot, len) = until("a packet", || self.rx.take(&self.memory));
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(self.rx.buffer(slot)))
            .unwrap();
        let payload = bytes.split_off(HEADER_BYTES);
        self.rx.offer(&self.memory, BUFFER, 2);
        (Header::decode(&bytes.try_into().unwrap()), payload)
    }

    fn send(&mut self, to: &Header, op: Op, fwd_cnt: u32, payload: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: to.dst_port,
            dst_port: to.src_port,
            len: payload.len() as u32,
            kind: STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt,
        };
        let at = self.tx.buffer(self.tx.offered % SIZE);
        let mut bytes = header.encode().to_vec();
        bytes.extend(payload);
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        self.tx.offer(&self.memory, bytes.len() as u32, 0);
        until("the sent buffer", || self.tx.take(&self.memory));
    }

    /// Accepts what the host asks for; the request.
    fn accept(&mut self, host: &mut UnixStream) -> Header {
        let (request, _) = self.receive();
        assert_eq!(Op::from_wire(request.op), Some(Op::Request));
        self.send(&request, Op::Response, 0, &[]);
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            host.read_exact(&mut byte).unwrap();
            line.extend(byte);
        }
        assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
        request
    }
}

#[test]
fn bytes_pass_both_ways_and_the_process_ends_with_its_hypervisor() {
    let mut backend = Backend::start();
    let mut vm = Vm::start(&backend);
    let mut host = backend.dial(1021);
    let request = vm.accept(&mut host);
    let status = std::fs::read_to_string(format!("/proc/{}/status", backend.child.id())).unwrap();
    assert!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );

    host.write_all(&[7; 10_000]).unwrap();
    let mut got = Vec::new();
    while got.len() < 10_000 {
        let (header, payload) = vm.receive();
        assert_eq!(Op::from_wire(header.op), Some(Op::ReadWrite));
        got.extend(payload);
    }
    assert_eq!(got, [7; 10_000]);
    // The device notified the guest of what it used.
    assert!(vm.rx.call.read().unwrap() > 0 && vm.tx.call.read().unwrap() > 0);

    vm.send(&request, Op::ReadWrite, 10_000, b"answer");
    let mut answer = [0; 6];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");

    drop(vm);
    assert!(backend.ended().success());
    assert_eq!(host.read(&mut answer).unwrap_or(0), 0);
}

#[test]
fn a_guest_that_boots_again_finds_no_old_connections() {
    let backend = Backend::start();
    let mut vm = Vm::start(&backend);
    let mut old = backend.dial(1021);
    vm.accept(&mut old);
    vm.reboot();
    let mut new = backend.dial(1022);
    vm.accept(&mut new);
    assert_eq!(old.read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn a_connection_that_came_before_the_guest_is_served_when_it_has_booted() {
    let backend = Backend::start();
    let mut host = backend.dial(1021);
    let mut vm = Vm::start(&backend);
    vm.accept(&mut host);
}

#[test]
fn the_configuration_tells_the_context_id() {
    let backend = Backend::start();
    let mut vm = Vm::start(&backend);
    let (_, bytes) = vm
        .frontend
        .get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])
        .unwrap();
    assert_eq!(bytes, CID.to_le_bytes());
}

#[test]
fn a_hypervisor_that_goes_before_it_has_said_anything_ends_the_process() {
    let mut backend = Backend::start();
    let stream = UnixStream::connect(backend.path("vhost")).unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    assert!(backend.ended().success());
}

#[test]
fn a_wrong_command_line_says_what_is_wrong() {
    let output = Command::new(env!("CARGO_BIN_EXE_caisson-vhost-vsock"))
        .args(["--socket", "/nowhere/at/all", "--uds", "/nowhere/b", "--cid", "3"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("/nowhere/at/all") && text.contains("No such file"),
        "{text}"
    );
}
