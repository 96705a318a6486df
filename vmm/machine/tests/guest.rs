//! Guests of a few instructions, in real virtual machines. Where KVM cannot run them, each test says so and is skipped.

#![expect(
    unsafe_code,
    reason = "the guests' instructions lie between two labels in this program"
)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    arch::global_asm,
    fs::File,
    io::Write,
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use caisson_devices::ports::{BusDevice, MsiMessage};
use caisson_machine::{Config, End, Entry, Error, ExitReason, Host, Kernel, Machine, MachineState, Vm};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// Nothing here takes longer, however slow the machine.
const LIMIT: Duration = Duration::from_secs(60);
/// Where the guests' code goes.
const PLACE: u64 = 0x100_0000;
/// Where guests and tests meet in memory.
const MEETING: u64 = 0x110_0000;
/// Ports on which guests report.
const REPORT: u64 = 0x100;

// Each guest begins in 64-bit mode with the first GiB mapped one to one. `out` to port 0x100 is a report.
global_asm!(
    ".macro report what",
    "mov dx, 0x100",
    "mov al, \\what",
    "out dx, al",
    ".endm",
    ".macro guest name",
    ".global guest_\\name",
    "guest_\\name:",
    ".endm",
    "guest off",
    "report 0x68",
    "report 0x69",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "report 0x21",
    "2: hlt",
    "jmp 2b",
    "guest reset",
    "mov dx, 0x602",
    "mov al, 1",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
    // No interrupt table, and an instruction that is none.
    "guest fault",
    "push 0",
    "push 0",
    "lidt [rsp]",
    "ud2",
    "guest count",
    "mov rbx, 0x1100000",
    "2: lock inc qword ptr [rbx]",
    "jmp 2b",
    // Copies what a device says to the device's next register, through the third GiB, which it maps first.
    "guest device",
    "mov eax, 0xc0000083",
    "mov qword ptr [0xe000], rax",
    "mov qword ptr [0xa018], 0xe003",
    "mov rbx, 0xc0000000",
    "mov rax, qword ptr [rbx]",
    "mov qword ptr [rbx + 8], rax",
    "movzx eax, byte ptr [rbx + 0x1000]",
    "report al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
    // Waits for the word, then starts the second CPU at 0x8000, by x2APIC.
    "guest second",
    "report 0x72",
    "mov rbx, 0x1100000",
    "2: pause",
    "cmp qword ptr [rbx], 0",
    "je 2b",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x830",
    "mov edx, 1",
    "mov eax, 0x4500",
    "wrmsr",
    "mov eax, 0x4608",
    "wrmsr",
    "2: hlt",
    "jmp 2b",
    // Reports each interrupt 0x40; its table is made by the test.
    "guest interrupts",
    "mov rsp, 0x1200000",
    "lidt [0x2ff0]",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "mov ecx, 0x80f",
    "xor edx, edx",
    "mov eax, 0x1ff",
    "wrmsr",
    "sti",
    "report 0x72",
    "2: hlt",
    "jmp 2b",
    "guest interrupts_handler",
    "report 0x69",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "iretq",
    // Reads and writes memory that has been plugged at 512 MiB, and memory at 768 MiB that cannot be written to.
    "guest plugged",
    "mov rbx, 0x20000000",
    "mov byte ptr [rbx], 0x70",
    "mov al, byte ptr [rbx]",
    "report al",
    "mov rbx, 0x30000000",
    "mov al, byte ptr [rbx]",
    "report al",
    "mov byte ptr [rbx], 0x78",
    "mov al, byte ptr [rbx]",
    "report al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
    // Reads, writes and reads configuration space, and reads where there is no function.
    "guest config",
    "mov eax, 0xe0000083",
    "mov qword ptr [0xe800], rax",
    "mov qword ptr [0xa018], 0xe003",
    "mov rbx, 0xe0000000",
    "mov al, byte ptr [rbx]",
    "report al",
    "mov byte ptr [rbx + 4], 7",
    "mov al, byte ptr [rbx + 4]",
    "report al",
    "mov al, byte ptr [rbx + 0x8000]",
    "report al",
    "mov dx, 0x600",
    "mov al, 0x34",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
    ".global guest_end",
    "guest_end:",
);

unsafe extern "C" {
    static guest_off: u8;
    static guest_reset: u8;
    static guest_fault: u8;
    static guest_count: u8;
    static guest_device: u8;
    static guest_second: u8;
    static guest_interrupts: u8;
    static guest_interrupts_handler: u8;
    static guest_plugged: u8;
    static guest_config: u8;
    static guest_end: u8;
}

/// The instructions from a label to the end of all guests.
macro_rules! code {
    ($label:ident) => {{
        let (start, end) = (&raw const $label, &raw const guest_end);
        // SAFETY: both labels are in one block of this program's text, the second behind the first, and text is never written to.
        unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
    }};
}

/// An ELF file of these instructions.
fn kernel(code: &[u8]) -> Kernel {
    let mut bytes = vec![0; 0x1000];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&PLACE.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = 1;
    bytes[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
    bytes[88..96].copy_from_slice(&PLACE.to_le_bytes());
    for at in [96, 104] {
        bytes[at..at + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    bytes.extend(code);
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(&bytes).unwrap();
    Kernel {
        image,
        initramfs: None,
        command_line: String::new(),
        entry: Entry::Linux64,
    }
}

struct Reports(mpsc::Sender<u8>);

impl BusDevice for Reports {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.send(data[0]).ok();
    }
}

struct Guest {
    vm: Vm,
    reports: mpsc::Receiver<u8>,
}

/// Why the guests cannot run here, if they cannot. Paravirtual KVM, which boots no common kernel, runs these few instructions.
fn cannot_run() -> Option<String> {
    let file = File::options().read(true).write(true).open("/dev/kvm");
    file.err().map(|e| format!("/dev/kvm cannot be opened: {e}"))
}

fn guest(change: impl FnOnce(&mut Config)) -> Option<Guest> {
    if let Some(reason) = cannot_run() {
        // Written past the test harness, which swallows what successful tests print.
        let line = format!("skipped: no guest can run here: {reason}\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return None;
    }
    let mut config = Config::new(32 << 20);
    change(&mut config);
    let vm = Vm::new(Host::open(Path::new("/dev/kvm")).unwrap(), config).unwrap();
    let (sender, reports) = mpsc::channel();
    vm.pio().insert(REPORT, 1, Arc::new(Reports(sender))).unwrap();
    Some(Guest { vm, reports })
}

fn next(reports: &mpsc::Receiver<u8>) -> u8 {
    reports.recv_timeout(LIMIT).expect("the guest reports")
}

fn counter(machine: &Machine) -> u64 {
    machine
        .vm()
        .memory()
        .memory()
        .read_obj(GuestAddress(MEETING))
        .unwrap()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_guest_that_switches_itself_off_ends_with_that_instruction() {
    let Some(Guest { vm, reports }) = guest(|config| config.trace_exits = true) else {
        return;
    };
    let machine = vm.boot(&kernel(code!(guest_off))).unwrap();
    assert_eq!(machine.wait(), End::PowerOff);
    assert_eq!(
        reports.try_iter().collect::<Vec<_>>(),
        b"hi",
        "and nothing after it"
    );
    assert_eq!(machine.exits().of(ExitReason::PortWrite), 3);
    assert_eq!(machine.exit_places()[0], (ExitReason::PortWrite, REPORT, 2));
}

#[test]
fn a_reset_and_a_triple_fault_are_ends_of_their_own() {
    for (code, end) in [
        (code!(guest_reset), End::Reset),
        (code!(guest_fault), End::TripleFault),
    ] {
        let Some(Guest { vm, .. }) = guest(|_| ()) else {
            return;
        };
        assert_eq!(vm.boot(&kernel(code)).unwrap().wait(), end);
    }
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let Some(Guest { vm, .. }) = guest(|_| ()) else {
        return;
    };
    let machine = vm.boot(&kernel(code!(guest_count))).unwrap();
    wait_until("it counts", || counter(&machine) > 0);
    for _ in 0..20 {
        machine.pause().unwrap();
        let seen = counter(&machine);
        for _ in 0..1000 {
            assert_eq!(counter(&machine), seen);
            std::thread::yield_now();
        }
        machine.resume();
        wait_until("it goes on", || counter(&machine) > seen);
    }
    machine.stop();
    assert_eq!(machine.wait(), End::Stopped);
    let seen = counter(&machine);
    std::thread::yield_now();
    assert_eq!(counter(&machine), seen, "nothing runs after the end");
}

/// What a machine is, on its way to another one that gets a copy of its memory.
fn moved(machine: &Machine, change: impl FnOnce(&mut Config)) -> (Guest, MachineState) {
    let state = machine.state(&[]).unwrap();
    let json = serde_json::to_string(&state).unwrap();
    let next = guest(change).unwrap();
    for &(start, bytes) in &state.memory {
        let mut copy = vec![0; usize::try_from(bytes).unwrap()];
        let memory = machine.vm().memory();
        memory
            .memory()
            .read_slice(&mut copy, GuestAddress(start))
            .unwrap();
        let memory = next.vm.memory();
        memory.memory().write_slice(&copy, GuestAddress(start)).unwrap();
    }
    let state: MachineState = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_json::to_string(&state).unwrap(), json);
    (next, state)
}

#[test]
fn a_machine_is_kept_and_goes_on_and_so_does_another_one_in_its_place() {
    let Some(Guest { vm, .. }) = guest(|_| ()) else {
        return;
    };
    let machine = vm.boot(&kernel(code!(guest_count))).unwrap();
    wait_until("it counts", || counter(&machine) > 0);
    assert!(
        matches!(machine.state(&[]), Err(Error::NotPaused)),
        "what runs has no state"
    );
    machine.pause().unwrap();
    let seen = counter(&machine);
    let (next, state) = moved(&machine, |_| ());
    assert_eq!(state.cpus.len(), 1);
    machine.resume();
    wait_until("it goes on", || counter(&machine) > seen);
    let other = next.vm.restore(&state).unwrap();
    assert_eq!(counter(&other), seen, "it stands still");
    other.resume();
    wait_until("the other one goes on", || counter(&other) > seen);
    assert_eq!(other.ends().reported(), None);
    other.pause().unwrap();
    assert!(!other.state(&[]).unwrap().cpus[0].msrs.is_empty());
}

#[test]
fn registers_that_a_caller_names_are_kept_or_refused_by_name() {
    // KVM_CLOCK's, which is on KVM's own list; and one that no CPU has.
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    const NONE: u32 = 0xdead_beef;
    let Some(Guest { vm, .. }) = guest(|_| ()) else {
        return;
    };
    let machine = vm.boot(&kernel(code!(guest_count))).unwrap();
    machine.pause().unwrap();
    let state = machine.state(&[SYSTEM_TIME]).unwrap();
    let msrs = &state.cpus[0].msrs;
    assert_eq!(msrs.iter().filter(|msr| msr.index == SYSTEM_TIME).count(), 1);
    let refused = machine.state(&[NONE]).unwrap_err();
    assert!(
        matches!(refused, Error::MsrRead { index: NONE, cpu: 0 }),
        "{refused}"
    );
    assert!(machine.state(&[7; 300]).is_err(), "too many");
}

#[test]
fn interrupts_reach_a_machine_in_the_place_of_another() {
    let Some(Guest { vm, reports }) = guest(|_| ()) else {
        return;
    };
    let handler = (&raw const guest_interrupts_handler).addr() - (&raw const guest_interrupts).addr();
    write_gate(&vm, PLACE + handler as u64);
    let machine = vm.boot(&kernel(code!(guest_interrupts))).unwrap();
    assert_eq!(next(&reports), b'r');
    // Until it sleeps: its local APIC is set up then.
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x40,
    };
    let vectors = machine.vm().interrupts().msi(1).unwrap();
    vectors.update(0, message, false).unwrap();
    vectors.trigger(0).unwrap();
    assert_eq!(next(&reports), b'i');
    machine.pause().unwrap();
    // One that is on its way when the machine is kept arrives in both.
    vectors.trigger(0).unwrap();
    let (other, state) = moved(&machine, |_| ());
    machine.resume();
    assert_eq!(next(&reports), b'i');
    let vectors = other.vm.interrupts().msi(1).unwrap();
    vectors.update(0, message, false).unwrap();
    let machine = other.vm.restore(&state).unwrap();
    assert!(other.reports.try_recv().is_err(), "it stands still");
    machine.resume();
    assert_eq!(next(&other.reports), b'i');
    vectors.trigger(0).unwrap();
    assert_eq!(next(&other.reports), b'i');
    assert_eq!(machine.ends().reported(), None);
}

#[test]
fn a_machine_that_is_dropped_while_it_is_paused_is_gone() {
    let Some(Guest { vm, .. }) = guest(|_| ()) else {
        return;
    };
    let machine = vm.boot(&kernel(code!(guest_count))).unwrap();
    machine.pause().unwrap();
    drop(machine);
}

struct Registers(mpsc::Sender<u64>);

impl BusDevice for Registers {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    }
    fn write(&self, offset: u64, data: &[u8]) {
        assert_eq!(offset, 8);
        self.0.send(u64::from_le_bytes(data.try_into().unwrap())).ok();
    }
}

#[test]
fn a_device_is_read_and_written_and_where_there_is_none_are_ones() {
    let Some(Guest { vm, reports }) = guest(|_| ()) else {
        return;
    };
    let (sender, written) = mpsc::channel();
    vm.mmio()
        .insert(0xc000_0000, 16, Arc::new(Registers(sender)))
        .unwrap();
    let machine = vm.boot(&kernel(code!(guest_device))).unwrap();
    assert_eq!(machine.wait(), End::PowerOff);
    assert_eq!(written.try_recv(), Ok(0x1122_3344_5566_7788));
    assert_eq!(reports.try_recv(), Ok(0xff));
}

#[test]
fn a_cpu_that_was_made_later_is_started_by_the_guest() {
    let Some(Guest { vm, reports }) = guest(|config| config.cpus = 2) else {
        return;
    };
    // In real mode: mov dx, 0x100; mov al, '2'; out dx, al; cli; hlt
    let code = [0xba, 0x00, 0x01, 0xb0, b'2', 0xee, 0xfa, 0xf4];
    vm.memory()
        .memory()
        .write_slice(&code, GuestAddress(0x8000))
        .unwrap();
    let machine = vm.boot(&kernel(code!(guest_second))).unwrap();
    assert_eq!(next(&reports), b'r');
    assert_eq!(machine.cpus(), 1);
    assert!(machine.grow_cpus(3).is_err(), "there are only two");
    machine.grow_cpus(2).unwrap();
    machine.grow_cpus(1).unwrap();
    assert_eq!(machine.cpus(), 2);
    let memory = machine.vm().memory();
    memory.memory().write_obj(1u64, GuestAddress(MEETING)).unwrap();
    assert_eq!(next(&reports), b'2');
    machine.pause().unwrap();
    machine.resume();
    machine.stop();
    assert_eq!(machine.wait(), End::Stopped);
}

/// An interrupt table whose gate 0x40 leads to an address.
fn write_gate(vm: &Vm, handler: u64) {
    const TABLE: u64 = 0x3000;
    let memory = vm.memory();
    let memory = memory.memory();
    let gate = (handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    memory.write_obj(gate, GuestAddress(TABLE + 0x400)).unwrap();
    memory
        .write_obj(handler >> 32, GuestAddress(TABLE + 0x408))
        .unwrap();
    memory.write_obj(0xfffu16, GuestAddress(0x2ff0)).unwrap();
    memory.write_obj(TABLE, GuestAddress(0x2ff2)).unwrap();
}

#[test]
fn interrupts_arrive_by_call_and_by_event_and_wait_while_they_are_masked() {
    let Some(Guest { vm, reports }) = guest(|_| ()) else {
        return;
    };
    let handler = (&raw const guest_interrupts_handler).addr() - (&raw const guest_interrupts).addr();
    write_gate(&vm, PLACE + handler as u64);
    let vectors = vm.interrupts().msi(2).unwrap();
    let machine = vm.boot(&kernel(code!(guest_interrupts))).unwrap();
    assert_eq!(next(&reports), b'r');
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x40,
    };
    vectors.trigger(0).unwrap();
    vectors.update(0, message, false).unwrap();
    assert!(
        reports.try_recv().is_err(),
        "what is triggered while it is masked is nobody's"
    );
    vectors.trigger(0).unwrap();
    assert_eq!(next(&reports), b'i');

    let event = vectors.eventfd(1).unwrap();
    event.write(1).unwrap();
    assert!(reports.try_recv().is_err(), "masked");
    vectors.update(1, message, false).unwrap();
    assert_eq!(next(&reports), b'i', "delivered when it is unmasked");
    event.write(1).unwrap();
    assert_eq!(next(&reports), b'i');
    vectors.update(1, message, true).unwrap();
    event.write(1).unwrap();
    vectors.trigger(0).unwrap();
    assert_eq!(next(&reports), b'i', "from the other one");
    assert!(reports.try_recv().is_err());
    vectors.update(1, message, false).unwrap();
    assert_eq!(next(&reports), b'i');
    assert!(
        vectors.trigger(2).is_err() && vectors.eventfd(2).is_err(),
        "there are only two"
    );
    drop(vectors);
    assert_eq!(machine.ends().reported(), None);
}

#[test]
fn memory_is_plugged_and_unplugged_and_some_cannot_be_written() {
    use vm_memory::{GuestRegionMmap, mmap::MmapRegion};
    let Some(Guest { vm, reports }) = guest(|_| ()) else {
        return;
    };
    let control = vm.memory_control();
    let (plain, fixed) = (GuestAddress(0x2000_0000), GuestAddress(0x3000_0000));
    control.add_ram(plain, 1 << 21).unwrap();
    let mapping = MmapRegion::new(4096).unwrap();
    control
        .map(GuestRegionMmap::new(mapping, fixed).unwrap(), true)
        .unwrap();
    assert!(control.add_ram(plain, 4096).is_err(), "something is there");
    assert!(control.unmap(plain, 4096).is_err(), "not as it was put");
    vm.memory().memory().write_obj(b'f', fixed).unwrap();
    let machine = vm.boot(&kernel(code!(guest_plugged))).unwrap();
    assert_eq!(machine.wait(), End::PowerOff);
    assert_eq!(reports.try_iter().collect::<Vec<_>>(), b"pff");
    control.unmap(plain, 1 << 21).unwrap();
    assert!(machine.vm().memory().memory().read_obj::<u8>(plain).is_err());
    control.add_ram(plain, 1 << 21).unwrap();
    assert_eq!(
        machine.vm().memory().memory().read_obj::<u8>(plain).unwrap(),
        0,
        "fresh"
    );
}

/// Configuration space of one function, all of whose registers can be written.
struct Space(std::sync::Mutex<[u8; 256]>);

impl BusDevice for Space {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let space = self.0.lock().unwrap();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = space.get(at).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }
}

#[test]
fn configuration_space_is_read_without_exits_and_shows_what_was_written() {
    let Some(Guest { vm, reports }) = guest(|_| ()) else {
        return;
    };
    let read_only_memory = vm.optional().read_only_memory;
    let space = Arc::new(Space([0; 256].into()));
    let mirror = vm
        .mirror_config(Arc::clone(&space) as Arc<dyn BusDevice>)
        .unwrap();
    space.0.lock().unwrap()[0] = b'f';
    mirror.refresh(0, 0);
    let machine = vm.boot(&kernel(code!(guest_config))).unwrap();
    assert_eq!(machine.wait(), End::PowerOff);
    assert_eq!(reports.try_iter().collect::<Vec<_>>(), [b'f', 7, 0xff]);
    let reads = if read_only_memory { 0 } else { 3 };
    assert_eq!(machine.exits().of(ExitReason::MemoryRead), reads);
    assert_eq!(machine.exits().of(ExitReason::MemoryWrite), 1);
}
