//! The way of a pod from its record to a configured VM.
//!
//! ```text
//! size -> (network || disk, directory, cgroup) -> launch -> connect -> configure -> hooks -> record
//! ```
//!
//! Linear, with an undo stack that the boot hands back however it ends. It may be broken off at any point: futures are dropped, except
//! for CNI, which is waited for, so that DEL never runs beside ADD.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use caisson_guest::GuestClient;
use caisson_hypervisor::{Disk, Nic, Vm, VmSpec};
use caisson_lifecycle::{
    sandbox::Event,
    sizing::{self, VmSize},
};
use caisson_net::{NetError, PodNetwork};
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{
    SandboxError, cgroup, console, guest,
    hooks::Ticket,
    identity,
    journal::{PodPhase, PodRecord, blocking, private_dir},
    pinning,
    registry::Node,
    scratch,
    undo::{Undo, UndoStack},
    view::{SandboxState, SandboxView},
};

/// How long a broken-off boot waits for CNI plugins before it goes on without them.
const NETWORK_GRACE: Duration = Duration::from_secs(15);

/// How much longer than its deadline a boot may take to say what it waited for.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// A VM that is this pod.
pub(crate) struct Booted {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) guest: GuestClient,
    /// Held until the pod is listed.
    pub(crate) ticket: Ticket,
}

/// How a boot ended; `undo` has what it made in any case.
pub(crate) struct BootEnd {
    pub(crate) undo: UndoStack,
    pub(crate) record: PodRecord,
    /// The VM, when there was one, also of a boot that failed.
    pub(crate) vm: Option<Arc<dyn Vm>>,
    pub(crate) result: Result<Booted, SandboxError>,
}

/// A boot that goes on.
pub(crate) struct Boot {
    node: Arc<Node>,
    record: PodRecord,
    undo: UndoStack,
    progress: mpsc::Sender<Event>,
    step: &'static str,
    step_began: Instant,
    began: Instant,
    timings: serde_json::Map<String, serde_json::Value>,
    network: Option<JoinHandle<Result<PodNetwork, NetError>>>,
    vm: Option<Arc<dyn Vm>>,
}

impl Boot {
    /// A boot of the pod that `record` describes; the record is not written yet. `progress` has room for every event of a boot.
    pub(crate) fn new(node: Arc<Node>, record: PodRecord, progress: mpsc::Sender<Event>) -> Self {
        Self {
            node,
            record,
            undo: UndoStack::default(),
            progress,
            step: "journal",
            step_began: Instant::now(),
            began: Instant::now(),
            timings: serde_json::Map::new(),
            network: None,
            vm: None,
        }
    }

    /// Boots, within the deadline, until `cancel` is dropped.
    pub(crate) async fn run(mut self, cancel: oneshot::Receiver<()>) -> BootEnd {
        // The agent's deadline comes first: its error says how far it got.
        let limit = self.node.config.boot_deadline + DEADLINE_GRACE;
        let result = tokio::select! {
            biased;
            _ = cancel => Err(SandboxError::Cancelled {
                what: format!("boot of pod sandbox {}", self.record.id.0),
                why: "the pod sandbox was stopped",
            }),
            result = tokio::time::timeout(limit, Box::pin(self.steps())) => result.unwrap_or_else(|_| {
                Err(SandboxError::Deadline { what: format!("boot of pod sandbox {}", self.record.id.0), limit })
            }),
        };
        self.settle_network().await;
        self.lap("total", self.began);
        if self.record.info.is_object() {
            self.record.info["timings_ms"] = self.timings.clone().into();
        }
        let result = result.map_err(|source| self.explain(source));
        BootEnd {
            undo: self.undo,
            record: self.record,
            vm: self.vm,
            result,
        }
    }

    async fn steps(&mut self) -> Result<Booted, SandboxError> {
        self.begin("journal");
        let leaf = self
            .node
            .cgroups
            .leaf(self.record.spec.cgroup_parent.as_deref(), &self.record.id.0)?;
        self.record.cgroup = leaf;
        let size = self.size()?;
        self.record.size = Some(size);
        self.record.ceiling = self.ceiling(size);
        self.undo.push(Undo::Record);
        self.node.journal.write_pod(&self.record).await?;
        let network = self.take_host_resources().await?;
        self.report(Event::NetworkUp);
        let (network, nics) = split_taps(network);
        self.record.ips.clone_from(&network.ips);

        self.begin("launch");
        self.undo.push(Undo::Cpuset);
        self.undo.push(Undo::Vm);
        let vm = self.launch(size, nics).await?;
        self.vm = Some(vm.clone());
        let cpuset = self.record.spec.cpuset.clone();
        if !cpuset.is_empty() {
            pinning::pin(&self.node, &self.record, &vm, cpuset).await?;
        }
        self.record.vm = Some(vm.record());
        self.report(Event::VmLaunched);

        self.begin("connect");
        let limit = self
            .node
            .config
            .boot_deadline
            .saturating_sub(self.began.elapsed());
        let id = self.record.id.0.clone();
        let (guest, hello) = while_vm_lives(&vm, &id, async {
            GuestClient::connect(vm.vsock(), limit)
                .await
                .map_err(SandboxError::guest(format!(
                    "reach the agent of pod sandbox {id}"
                )))
        })
        .await?;
        if hello.protocol != caisson_agent_api::PROTOCOL {
            return Err(SandboxError::Invalid {
                what: format!("guest initramfs {}", self.node.config.initramfs.display()),
                reason: format!(
                    "its agent speaks version {} of the guest protocol, and this daemon version {}",
                    hello.protocol,
                    caisson_agent_api::PROTOCOL
                ),
            });
        }
        self.report(Event::AgentAnswered);

        self.begin("configure");
        let request = identity::request(&self.record, &network, SystemTime::now())?;
        let configured = while_vm_lives(&vm, &id, async {
            guest
                .configure_sandbox(request, limit)
                .await
                .map_err(SandboxError::guest(format!(
                    "configure the guest of pod sandbox {id}"
                )))
        })
        .await?;

        self.begin("hooks");
        let shown = self.view();
        let ticket = while_vm_lives(&vm, &id, async {
            let run = self.node.hooks.run_pod(&shown).await;
            run.map_err(|source| SandboxError::Hook {
                what: format!("run pod sandbox {id}"),
                source,
            })
        })
        .await?;

        self.begin("record");
        self.record.phase = PodPhase::Ready;
        self.record.info = self.info(size, &vm, &hello, configured.network_nanos);
        self.node.journal.write_pod(&self.record).await?;
        self.begin("done");
        Ok(Booted { vm, guest, ticket })
    }

    /// The pod as hooks see it: not ready yet.
    fn view(&self) -> SandboxView {
        SandboxView {
            id: self.record.id.clone(),
            spec: self.record.spec.clone(),
            state: SandboxState::NotReady,
            created_at: self.record.created_at,
            ips: self.record.ips.clone(),
            info: serde_json::Value::Null,
        }
    }

    fn size(&self) -> Result<VmSize, SandboxError> {
        let (config, limits) = (&self.node.config, self.record.spec.limits);
        let cgroup_max_bytes = self
            .record
            .cgroup
            .as_deref()
            .and_then(|leaf| self.node.cgroups.memory_max(leaf));
        let demand = sizing::Demand {
            limit_bytes: limits.memory_bytes,
            limit_cpu_milli: limits.cpu_milli,
            cgroup_max_bytes,
        };
        let policy = sizing::Policy {
            default_memory_mib: config.default_memory_mib,
            default_vcpus: config.default_vcpus,
            guest_overhead_mib: config.guest_overhead_mib,
            host_reserve_mib: config.host_reserve_mib,
            max_vcpus: self.node.host_cpus,
        };
        sizing::size(demand, policy).map_err(|source| SandboxError::Size {
            id: self.record.id.0.clone(),
            source,
        })
    }

    /// How large the VM may become, on a driver whose VMs can.
    fn ceiling(&self, size: VmSize) -> Option<VmSize> {
        let (node, config) = (&self.node, &self.node.config);
        let most = sizing::Most {
            memory_mib: match config.max_memory_mib {
                0 => node.host_memory_mib,
                mib => mib,
            },
            vcpus: match config.max_vcpus {
                0 => None,
                vcpus => Some(vcpus),
            },
            host_cpus: node.host_cpus,
        };
        node.hypervisor.can_grow().then(|| sizing::ceiling(size, most))
    }

    /// Network and files at the same time: both are slow, and neither needs the other.
    async fn take_host_resources(&mut self) -> Result<PodNetwork, SandboxError> {
        self.begin("prepare");
        let (node, id) = (self.node.clone(), self.record.id.clone());
        self.undo.push(Undo::Network);
        let (network, name, spec) = (
            node.network.clone(),
            id.0.clone(),
            self.record.spec.network.clone(),
        );
        let began = Instant::now();
        let setup = tokio::spawn(async move { network.setup(&name, &spec).await });
        let setup = self.network.insert(setup);

        self.undo.push(Undo::Scratch);
        self.undo.push(Undo::RunDir);
        let leaf = self.record.cgroup.clone();
        if let Some(leaf) = &leaf {
            self.undo.push(Undo::Cgroup(leaf.clone()));
        }
        let (disk, run_dir) = (node.journal.scratch(&id), node.run_dir(&id));
        let (root, bytes) = (node.config.root.clone(), node.config.scratch_bytes);
        let files = async {
            let _one_template_at_a_time = node.template_lane.lock().await;
            blocking(move || {
                private_dir(&run_dir)?;
                if let Some(leaf) = leaf {
                    cgroup::make(&leaf)?;
                }
                scratch::copy(&scratch::template(&root, bytes)?, &disk)
            })
            .await
            .map(|()| began.elapsed())
        };
        let network = async {
            let result = setup.await;
            (result, began.elapsed())
        };
        // Both to their end: the error of one must not leave the other half done behind our back.
        let ((network, network_took), files) = tokio::join!(network, files);
        self.network = None;
        self.record_lap("network", network_took);
        self.record_lap("disk", *files.as_ref().unwrap_or(&Duration::ZERO));
        self.step = "network";
        let what = || format!("set up the network of pod sandbox {}", id.0);
        let network = match network {
            Ok(Ok(network)) => network,
            Ok(Err(source)) => {
                return Err(SandboxError::Network {
                    what: what(),
                    source: Box::new(source),
                });
            }
            Err(error) => return Err(SandboxError::io(what())(std::io::Error::other(error))),
        };
        self.step = "disk";
        files.map(|_| network)
    }

    async fn launch(&self, size: VmSize, nics: Vec<Nic>) -> Result<Arc<dyn Vm>, SandboxError> {
        let config = &self.node.config;
        let most = self.record.ceiling.unwrap_or(size);
        let spec = VmSpec {
            id: self.record.id.0.clone(),
            dir: self.node.run_dir(&self.record.id),
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            cmdline: config.cmdline.clone(),
            vcpus: size.vcpus,
            max_vcpus: most.vcpus,
            memory_mib: size.memory_mib,
            max_memory_mib: most.memory_mib,
            nics,
            disks: vec![Disk {
                serial: scratch::SERIAL.into(),
                files: vec![self.node.journal.scratch(&self.record.id)],
                read_only: false,
            }],
            attach_slots: config.attach_slots,
            cgroup: self.record.cgroup.clone(),
        };
        let vm = self
            .node
            .hypervisor
            .launch(spec)
            .await
            .map_err(SandboxError::hypervisor(format!(
                "start the VM of pod sandbox {}",
                self.record.id.0
            )))?;
        Ok(Arc::from(vm))
    }

    fn info(
        &self,
        size: VmSize,
        vm: &Arc<dyn Vm>,
        hello: &guest::HelloReply,
        network_nanos: u64,
    ) -> serde_json::Value {
        let processes: Vec<_> = vm
            .record()
            .processes
            .iter()
            .map(|process| json!({ "role": process.role, "pid": process.pid }))
            .collect();
        json!({
            "driver": self.node.hypervisor.name(),
            "hypervisor": self.node.hypervisor.describe(),
            "vm": { "memory_mib": size.memory_mib, "vcpus": size.vcpus },
            "processes": processes,
            "vsock": vm.vsock(),
            "console": vm.console(),
            "cgroup": self.record.cgroup,
            "agent": {
                "version": hello.agent_version,
                "kernel": hello.kernel_release,
                "kernel_nanos": hello.kernel_nanos,
                "listening_nanos": hello.listening_nanos,
                "network_nanos": network_nanos,
                "memory_bytes": hello.memory_bytes,
                "rss_bytes": hello.agent_rss_bytes,
                "apparmor": hello.apparmor,
            },
            "timings_ms": self.timings,
        })
    }

    fn begin(&mut self, step: &'static str) {
        let (done, began) = (self.step, self.step_began);
        self.step = step;
        self.step_began = Instant::now();
        // The parts of the preparation are measured apart.
        if !matches!(done, "network" | "disk" | "prepare") && done != step {
            self.lap(done, began);
        }
    }

    fn lap(&mut self, step: &'static str, began: Instant) {
        self.record_lap(step, began.elapsed());
    }

    fn record_lap(&mut self, step: &'static str, took: Duration) {
        let ms = took.as_secs_f64() * 1e3;
        tracing::debug!(sandbox.id = %self.record.id.0, step, ms, "boot step");
        self.timings
            .insert(step.into(), ((ms * 1000.0).round() / 1000.0).into());
    }

    fn report(&self, event: Event) {
        if self.progress.try_send(event).is_err() {
            tracing::debug!(?event, "nobody follows this boot");
        }
    }

    /// DEL beside a running ADD would race it, so a set-up that was broken off comes to its end first.
    async fn settle_network(&mut self) {
        let Some(mut setup) = self.network.take() else {
            return;
        };
        if tokio::time::timeout(NETWORK_GRACE, &mut setup).await.is_err() {
            setup.abort();
            if setup.await.is_err() {
                tracing::warn!(sandbox.id = %self.record.id.0, "network set-up was broken off");
            }
        }
    }

    fn explain(&self, source: SandboxError) -> SandboxError {
        if matches!(source, SandboxError::Cancelled { .. } | SandboxError::Size { .. }) {
            return source;
        }
        SandboxError::Boot {
            id: self.record.id.0.clone(),
            step: self.step,
            console: self.vm.as_ref().and_then(|vm| console::tail(vm.console())),
            source: Box::new(source),
            undo: Vec::new(),
        }
    }
}

/// Runs `call`, unless the VM ends before.
pub(crate) async fn while_vm_lives<T>(
    vm: &Arc<dyn Vm>,
    id: &str,
    call: impl Future<Output = Result<T, SandboxError>>,
) -> Result<T, SandboxError> {
    tokio::select! {
        biased;
        exit = vm.wait() => Err(SandboxError::VmDied { id: id.to_owned(), reason: exit.reason }),
        result = call => result,
    }
}

/// The taps go to the VM, the rest to the guest.
fn split_taps(mut network: PodNetwork) -> (PodNetwork, Vec<Nic>) {
    let nics = network
        .interfaces
        .iter_mut()
        .map(|interface| Nic {
            queues: std::mem::take(&mut interface.tap),
            mac: interface.mac,
            mtu: interface.mtu,
        })
        .collect();
    (network, nics)
}
