//! The threads of the vCPUs, and the machine that they are.
//!
//! A vCPU's thread is in KVM_RUN, or hands an access of the guest to a bus, or waits at the [`Gate`] while the machine is paused.
//! To get its attention, somebody changes what the gate says and sends it a signal, whose handler makes the current or the next KVM_RUN
//! return at once (`immediate_exit`), so that no attention is ever missed.

#![expect(
    unsafe_code,
    reason = "a signal handler writes into the page that a vCPU shares with KVM"
)]

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    io, ptr,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    Error, ExitCounts, ExitReason, MachineState, Vm,
    boot::Start,
    cpu,
    ends::{End, Ends},
    exits::Exits,
    state,
};

/// A vCPU that takes longer than this to come out of KVM does not come at all.
const ATTENTION_DEADLINE: Duration = Duration::from_secs(5);

thread_local! {
    /// Where this thread's vCPU is told to leave KVM_RUN at once; null on all other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Runs on a vCPU's thread, between any two of its instructions.
extern "C" fn attend(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    // A cell of a plain pointer is never destroyed, so this does not fail.
    let flag = IMMEDIATE_EXIT.try_with(Cell::get).unwrap_or(ptr::null_mut());
    if !flag.is_null() {
        // SAFETY: the thread has set it to a byte of its vCPU's shared page, and sets it to null before `run` returns, until when its caller
        // keeps the vCPU; the handler runs on the same thread. The write is one byte, and volatile, since KVM is its reader.
        unsafe { flag.write_volatile(1) };
    }
}

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// Where vCPUs wait while the machine is paused.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// Whether there is anything to look at; so that a running vCPU need not take the lock.
    closed: AtomicBool,
}

#[derive(Debug)]
struct GateState {
    wanted: Wanted,
    /// Threads that run vCPUs or wait here.
    alive: usize,
    /// Threads that wait here.
    waiting: usize,
}

impl Gate {
    fn new() -> Self {
        Self {
            state: Mutex::new(GateState {
                wanted: Wanted::Run,
                alive: 0,
                waiting: 0,
            }),
            changed: Condvar::new(),
            closed: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wanted: Wanted) {
        let mut state = self.lock();
        // Nothing follows a stop.
        if state.wanted != Wanted::Stop {
            state.wanted = wanted;
            self.closed.store(wanted != Wanted::Run, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Waits while the machine is paused: whether to go on.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Pause {
            state.waiting += 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Pause {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
        }
        state.wanted == Wanted::Run
    }

    /// Whether the machine stands still.
    fn is_quiet(&self) -> bool {
        let state = self.lock();
        state.wanted == Wanted::Pause && state.waiting == state.alive
    }

    /// Waits until every thread waits or has ended.
    fn wait_until_quiet(&self) -> io::Result<()> {
        let deadline = Instant::now() + ATTENTION_DEADLINE;
        let mut state = self.lock();
        while state.wanted == Wanted::Pause && state.waiting < state.alive {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

/// What all vCPU threads share.
#[derive(Debug)]
struct Shared {
    gate: Gate,
    exits: Exits,
    ends: Arc<Ends>,
    pio: caisson_devices::bus::Bus,
    mmio: caisson_devices::bus::Bus,
}

/// A vCPU. Its thread holds the lock but for the time in which it waits at the gate.
#[derive(Debug)]
struct Cpu {
    thread: JoinHandle<()>,
    fd: Arc<Mutex<VcpuFd>>,
}

/// A machine that has been booted. It runs until it ends or is dropped.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    // By vCPU. Holding the lock also keeps two callers from changing the number of vCPUs at once.
    threads: Mutex<Vec<Cpu>>,
    // Behind the threads, so that guest memory outlives whoever runs in it.
    vm: Vm,
}

impl Machine {
    pub(crate) fn start(vm: Vm, start: &Start) -> Result<Self, Error> {
        let machine = Self::without_cpus(vm)?;
        machine.add_cpus(machine.vm.config().boot_cpus, Some(start))?;
        Ok(machine)
    }

    pub(crate) fn restore(vm: Vm, state: &MachineState) -> Result<Self, Error> {
        let machine = Self::without_cpus(vm)?;
        machine.shared.gate.set(Wanted::Pause);
        let count = u8::try_from(state.cpus.len()).unwrap_or(u8::MAX);
        let made = machine.make_cpus(0, count, None)?;
        for ((id, cpu), state) in made.iter().zip(&state.cpus) {
            state::restore_cpu(cpu, *id, machine.vm.host(), state)?;
        }
        state::restore_vm(machine.vm.fd(), &state.controllers, &state.clock)?;
        machine.run_cpus(&mut machine.threads(), made)?;
        // Whoever resumes it finds every vCPU at the gate.
        machine
            .shared
            .gate
            .wait_until_quiet()
            .map_err(|source| Error::Kvm {
                what: "hold restored vCPUs",
                source,
            })?;
        Ok(machine)
    }

    fn without_cpus(vm: Vm) -> Result<Self, Error> {
        register_signal_handler(attention_signal(), attend).map_err(|e| Error::Kvm {
            what: "install the handler of the vCPUs' signal",
            source: io::Error::from_raw_os_error(e.errno()),
        })?;
        Ok(Self {
            shared: Arc::new(Shared {
                gate: Gate::new(),
                exits: Exits::new(vm.config().trace_exits),
                ends: vm.ends(),
                pio: vm.pio(),
                mmio: vm.mmio(),
            }),
            threads: Mutex::default(),
            vm,
        })
    }

    /// What the machine is, while it is paused. `named` are model-specific registers to save beyond those that KVM lists.
    pub fn state(&self, named: &[u32]) -> Result<MachineState, Error> {
        let threads = self.threads();
        if !self.shared.gate.is_quiet() {
            return Err(Error::NotPaused);
        }
        let host = self.vm.host();
        let indices = state::msrs_to_save(host, named)?;
        let mut cpus = Vec::with_capacity(threads.len());
        for (id, cpu) in (0..).zip(threads.iter()) {
            let fd = cpu.fd.lock().unwrap_or_else(PoisonError::into_inner);
            cpus.push(state::save_cpu(&fd, id, host, &indices, named)?);
        }
        let (controllers, clock) = state::save_vm(self.vm.fd())?;
        let memory = self.vm.memory().memory();
        let memory = memory.iter().map(|region| (region.start_addr().0, region.len()));
        Ok(MachineState {
            cpus,
            controllers,
            clock,
            memory: memory.collect(),
        })
    }

    /// The VM, for devices that are added while it runs.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// How many vCPUs have a thread.
    #[must_use]
    pub fn cpus(&self) -> u8 {
        // There are never more than 254.
        u8::try_from(self.threads().len()).unwrap_or(u8::MAX)
    }

    /// Makes the first `count` vCPUs runnable, so that the guest can bring them online. Never takes any away: one that the guest has
    /// taken offline costs a thread that sleeps.
    pub fn grow_cpus(&self, count: u8) -> Result<(), Error> {
        self.add_cpus(count, None)
    }

    fn add_cpus(&self, count: u8, start: Option<&Start>) -> Result<(), Error> {
        let mut threads = self.threads();
        let made = self.make_cpus(threads.len(), count, start)?;
        self.run_cpus(&mut threads, made)
    }

    /// Makes the vCPUs from `present` on up to `count`, without running them.
    fn make_cpus(
        &self,
        present: usize,
        count: u8,
        start: Option<&Start>,
    ) -> Result<Vec<(u8, VcpuFd)>, Error> {
        let config = self.vm.config();
        if count > config.cpus {
            return Err(Error::Cpus {
                boot: count,
                most: config.cpus,
                limit: self.vm.host().cpu_limit(),
            });
        }
        let present = u8::try_from(present).unwrap_or(u8::MAX);
        let mut new = Vec::new();
        for id in present..count {
            let start = start.filter(|_| id == 0);
            let cpu = cpu::create(
                self.vm.fd(),
                self.vm.host(),
                &config.tweaks,
                id,
                config.cpus,
                start,
            )?;
            new.push((id, cpu));
        }
        Ok(new)
    }

    fn run_cpus(&self, threads: &mut Vec<Cpu>, made: Vec<(u8, VcpuFd)>) -> Result<(), Error> {
        for (id, cpu) in made {
            let fd = Arc::new(Mutex::new(cpu));
            let thread = self.spawn(id, Arc::clone(&fd))?;
            threads.push(Cpu { thread, fd });
        }
        Ok(())
    }

    fn spawn(&self, id: u8, cpu: Arc<Mutex<VcpuFd>>) -> Result<JoinHandle<()>, Error> {
        let shared = Arc::clone(&self.shared);
        let enter = self.vm.config().enter_cpu_thread.clone();
        self.shared.gate.lock().alive += 1;
        let spawned = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(CPU_STACK)
            .spawn(move || {
                let _gone = Gone(Arc::clone(&shared));
                match enter.0(id) {
                    Ok(()) => run(&cpu, &shared),
                    Err(error) => shared
                        .ends
                        .report(End::Failed(format!("cannot confine vCPU {id}: {error}"))),
                }
            });
        spawned.map_err(|source| {
            self.shared.gate.lock().alive -= 1;
            Error::Thread { cpu: id, source }
        })
    }

    fn threads(&self) -> MutexGuard<'_, Vec<Cpu>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        for cpu in self.threads().iter() {
            // Fails only for a thread that is gone.
            cpu.thread.kill(attention_signal()).ok();
        }
    }

    /// Stops all vCPUs where they are. When this returns, none runs, and none has an access to a device half done.
    pub fn pause(&self) -> io::Result<()> {
        self.shared.gate.set(Wanted::Pause);
        self.kick();
        self.shared.gate.wait_until_quiet()
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) {
        self.shared.gate.set(Wanted::Run);
    }

    /// Ends the machine from outside.
    pub fn stop(&self) {
        self.shared.ends.report(End::Stopped);
    }

    /// Where the end is reported; its event tells those who wait for several things.
    #[must_use]
    pub fn ends(&self) -> &Ends {
        &self.shared.ends
    }

    /// Waits until the machine has ended and no vCPU runs any more: how it ended.
    pub fn wait(&self) -> End {
        let end = self.shared.ends.wait();
        self.join();
        end
    }

    fn join(&self) {
        self.shared.gate.set(Wanted::Stop);
        self.kick();
        for cpu in self.threads().drain(..) {
            // A thread that has panicked is gone as well; in the product, a panic ends the process.
            drop(cpu.thread.join());
        }
    }

    /// How often vCPUs have come back to user space.
    #[must_use]
    pub fn exits(&self) -> ExitCounts {
        self.shared.exits.counts()
    }

    /// With [`crate::Config::trace_exits`]: port or address of each access, and how often it happened, most frequent first.
    #[must_use]
    pub fn exit_places(&self) -> Vec<(ExitReason, u64, u64)> {
        self.shared.exits.places()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

/// Tells the gate that a thread has ended, even by a panic.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.gate.lock().alive -= 1;
        self.0.gate.changed.notify_all();
    }
}

/// The stack of a vCPU's thread: device code that runs on it (configuration space, serial) is shallow.
const CPU_STACK: usize = 128 << 10;

/// The signal by which a vCPU's attention is asked for.
fn attention_signal() -> c_int {
    SIGRTMIN()
}

/// Where [`attend`] writes to, for as long as it lives.
struct Attentive;

impl Attentive {
    fn new(cpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut cpu.get_kvm_run().immediate_exit);
        Self
    }
}

impl Drop for Attentive {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// What to do after an exit.
enum Next {
    Continue,
    Attend,
    End(End),
}

/// Runs a vCPU until the machine ends.
fn run(shared_cpu: &Mutex<VcpuFd>, shared: &Shared) {
    let take = || shared_cpu.lock().unwrap_or_else(PoisonError::into_inner);
    let mut cpu = take();
    let _attentive = Attentive::new(&mut cpu);
    loop {
        if shared.gate.closed.load(Ordering::Acquire) {
            if let Err(end) = finish_access(&mut cpu, shared) {
                shared.ends.report(end);
                return;
            }
            // Whoever waits until all stand still may look at it.
            drop(cpu);
            let go_on = shared.gate.pass();
            cpu = take();
            if !go_on {
                return;
            }
            // Tells the guest that it was not its fault if time has passed; a guest without kvm-clock cannot be told.
            cpu.kvmclock_ctrl().ok();
        }
        match step(&mut cpu, shared) {
            // A bus has reported an end: this vCPU must not run the instruction behind it.
            Next::Continue if shared.ends.reported().is_some() => return,
            Next::Continue => {}
            // Cleared before the gate is looked at: whoever asks for attention from now on sets it again.
            Next::Attend => cpu.set_kvm_immediate_exit(0),
            Next::End(end) => {
                shared.ends.report(end);
                return;
            }
        }
    }
}

/// KVM completes an access to a device only when the vCPU runs again: has it do so without running the guest.
fn finish_access(cpu: &mut VcpuFd, shared: &Shared) -> Result<(), End> {
    loop {
        cpu.set_kvm_immediate_exit(1);
        let next = step(cpu, shared);
        cpu.set_kvm_immediate_exit(0);
        match next {
            Next::Continue => {}
            Next::Attend => return Ok(()),
            Next::End(end) => return Err(end),
        }
    }
}

/// Runs the guest up to its next exit, and does what the exit is for.
fn step(cpu: &mut VcpuFd, shared: &Shared) -> Next {
    let exits = &shared.exits;
    match cpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            exits.count(ExitReason::PortRead, port.into());
            shared.pio.read(port.into(), data);
            Next::Continue
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            exits.count(ExitReason::PortWrite, port.into());
            shared.pio.write(port.into(), data);
            Next::Continue
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.count(ExitReason::MemoryRead, address);
            shared.mmio.read(address, data);
            Next::Continue
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            exits.count(ExitReason::MemoryWrite, address);
            shared.mmio.write(address, data);
            Next::Continue
        }
        Ok(VcpuExit::Intr) => {
            exits.count(ExitReason::Interrupted, 0);
            Next::Attend
        }
        Ok(exit) => {
            exits.count(ExitReason::Other, 0);
            let end = end_of(&exit);
            end.map_or_else(|| failure(cpu), Next::End)
        }
        Err(error) => match error.errno() {
            libc::EINTR => {
                exits.count(ExitReason::Interrupted, 0);
                Next::Attend
            }
            // A vCPU that waits to be started, and has been.
            libc::EAGAIN => Next::Continue,
            _ => Next::End(End::Failed(format!("cannot run a vCPU: {error}"))),
        },
    }
}

/// What an exit that is no access means, if that is plain.
fn end_of(exit: &VcpuExit<'_>) -> Option<End> {
    Some(match exit {
        VcpuExit::Shutdown => End::TripleFault,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => End::PowerOff,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => End::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            End::Failed("the guest says that it has crashed".into())
        }
        VcpuExit::FailEntry(reason, _) => {
            End::Failed(format!("the CPU refuses to enter the guest, reason {reason:#x}"))
        }
        VcpuExit::InternalError => return None,
        other => End::Failed(format!("KVM says {other:?}, which nobody expects")),
    })
}

/// An internal error of KVM, with what it says of it: most often an instruction that it cannot emulate.
fn failure(cpu: &mut VcpuFd) -> Next {
    // SAFETY: KVM_RUN has just returned with KVM_EXIT_INTERNAL_ERROR, for which this is the part of the union that KVM has filled.
    let internal = unsafe { cpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata)
        .unwrap_or(0)
        .min(internal.data.len());
    let at = cpu.get_regs().map_or(0, |registers| registers.rip);
    Next::End(End::Failed(format!(
        "internal error {} of KVM at {at:#x}: {:x?}",
        internal.suberror,
        &internal.data[..count]
    )))
}
