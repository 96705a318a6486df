//! The agent as the init of a real VM under QEMU's emulation: what needs a kernel of its own.
//!
//! Needs `CAISSON_TEST_KERNEL` and `CAISSON_TEST_INITRAMFS` (as guest/ makes them), `CAISSON_TEST_VSOCK` (the vhost-user vsock backend),
//! and mkfs.erofs; is skipped, visibly, without them.
#![expect(clippy::unwrap_used, reason = "a broken harness is a failed test")]

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use crate::harness::{self, Agent, Sockets, container, make_image, process, shell, text, wait_for};
use caisson_agent_api::{RPC_PORT, stream::Kind, v1};

/// QEMU, its vsock backend and their files; both end with the test.
struct Vm {
    processes: Vec<Child>,
    dir: tempfile::TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        for process in &mut self.processes {
            if process.kill().and_then(|()| process.wait()).is_err() {
                eprintln!("a process of the VM cannot be ended");
            }
        }
        if std::thread::panicking() {
            eprintln!(
                "console:\n{}",
                fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
            );
        }
    }
}

fn input(name: &str) -> Option<OsString> {
    let value = env::var_os(name).filter(|path| Path::new(path).exists());
    if value.is_none() {
        eprintln!("skipped: {name} names no file");
    }
    value
}

fn run(command: &mut Command) -> Option<()> {
    match command.stdout(Stdio::null()).status() {
        Ok(status) if status.success() => Some(()),
        other => {
            eprintln!("skipped: {command:?}: {other:?}");
            None
        }
    }
}

/// Boots a VM with a scratch disk, and the image as a disk.
async fn boot() -> Option<(Agent, PathBuf)> {
    let (kernel, initramfs) = (input("CAISSON_TEST_KERNEL")?, input("CAISSON_TEST_INITRAMFS")?);
    let backend = input("CAISSON_TEST_VSOCK")?;
    let mkfs = env::var_os("CAISSON_TEST_MKFS_EROFS").unwrap_or("mkfs.erofs".into());
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    make_image(&at("image"));
    run(Command::new(mkfs)
        .arg("--quiet")
        .arg(at("image.erofs"))
        .arg(at("image")))?;
    fs::copy(at("image.erofs"), at("late.erofs")).unwrap();
    File::create(at("scratch")).unwrap().set_len(256 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(at("scratch")))?;

    let device = UnixListener::bind(at("device")).unwrap();
    let hybrid = UnixListener::bind(at("vsock")).unwrap();
    for socket in [&device, &hybrid] {
        rustix::io::fcntl_setfd(socket.as_fd(), rustix::io::FdFlags::empty()).unwrap();
    }
    let backend = Command::new(backend)
        .args(["--socket-fd", &device.as_raw_fd().to_string()])
        .args(["--uds-fd", &hybrid.as_raw_fd().to_string(), "--cid", "3"])
        .spawn()
        .unwrap();
    let mut vm = Vm {
        processes: vec![backend],
        dir,
    };
    let at = |name: &str| vm.dir.path().join(name).display().to_string();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-cpu",
        "max,la57=off",
    ])
    .args([
        "-machine",
        "q35,memory-backend=mem,hpet=off",
        "-accel",
        "tcg,thread=multi",
        "-smp",
        "2",
    ])
    .args([
        "-m",
        "256M",
        "-object",
        "memory-backend-memfd,id=mem,size=256M,share=on",
    ])
    .arg("-kernel")
    .arg(kernel)
    .arg("-initrd")
    .arg(initramfs)
    .args([
        "-append",
        "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t no_timer_check clearcpuid=cx16",
    ])
    .args(["-serial", &format!("file:{}", at("console"))])
    .args(["-chardev", &format!("socket,id=vs,path={}", at("device"))])
    .args(["-device", "vhost-user-vsock-pci,chardev=vs"]);
    // A disk that is plugged in later, and where.
    let late = format!("if=none,id=late,format=raw,file={},readonly=on", at("late.erofs"));
    qemu.args(["-drive", &late, "-device", "pci-bridge,id=pool0,chassis_nr=1"]);
    qemu.args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))]);
    for (name, readonly) in [("scratch", "off"), ("image.erofs", "on")] {
        let serial = name.trim_end_matches(".erofs");
        qemu.args([
            "-drive",
            &format!(
                "if=none,id={serial},format=raw,file={},readonly={readonly}",
                at(name)
            ),
        ]);
        qemu.args([
            "-device",
            &format!("virtio-blk-pci,drive={serial},serial={serial}"),
        ]);
    }
    qemu.args([
        "-netdev",
        "user,id=net,restrict=on",
        "-device",
        "virtio-net-pci,netdev=net,mac=02:00:00:00:00:01",
    ]);
    vm.processes.push(qemu.stdin(Stdio::null()).spawn().unwrap());
    drop((device, hybrid));
    let monitor = PathBuf::from(at("qmp"));
    let sockets = Sockets::Hybrid(at("vsock").into());
    wait_for(async || sockets.connect(RPC_PORT).await.is_ok()).await;
    let mut agent = Agent::reached_by(sockets, Box::new(vm)).await;
    agent.client.configure_sandbox(sandbox()).await.unwrap();
    Some((agent, monitor))
}

/// Plugs in the late disk.
async fn plug(monitor: &Path) {
    let mut qmp = UnixStream::connect(monitor).await.unwrap();
    let add = r#"{"execute":"device_add","arguments":{"driver":"virtio-blk-pci","drive":"late","serial":"late","bus":"pool0","addr":"1"}}"#;
    qmp.write_all(format!("{{\"execute\":\"qmp_capabilities\"}}{add}").as_bytes())
        .await
        .unwrap();
    // The greeting, and an answer to each of the two.
    let mut lines = BufReader::new(qmp).lines();
    for _ in 0..3 {
        let line = lines.next_line().await.unwrap().unwrap();
        assert!(!line.contains("error"), "{line}");
    }
}

fn sandbox() -> v1::ConfigureSandboxRequest {
    v1::ConfigureSandboxRequest {
        scratch_serial: "scratch".into(),
        realtime_nanos: 2_000_000_000_000_000_000,
        entropy: vec![7; 64],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        interfaces: vec![v1::Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1400,
            addresses: vec!["10.88.0.5/16".into(), "fd00::5/64".into()],
        }],
        routes: vec![
            v1::Route {
                destination: "0.0.0.0/0".into(),
                gateway: "169.254.1.1".into(),
                interface: "eth0".into(),
                ..v1::Route::default()
            },
            v1::Route {
                destination: "169.254.1.1/32".into(),
                interface: "eth0".into(),
                ..v1::Route::default()
            },
            v1::Route {
                destination: "::/0".into(),
                gateway: "fd00::1".into(),
                interface: "eth0".into(),
                ..v1::Route::default()
            },
        ],
        neighbours: vec![v1::Neighbour {
            address: "169.254.1.1".into(),
            mac: vec![2, 0, 0, 0, 0, 9],
            interface: "eth0".into(),
        }],
        ..harness::sandbox()
    }
}

fn image(spec: v1::ContainerSpec) -> v1::ContainerSpec {
    v1::ContainerSpec {
        image_serial: "image".into(),
        ..spec
    }
}

/// One boot is expensive under emulation, so one test asks all that needs it, a paragraph for each question.
#[tokio::test]
async fn a_vm_boots_and_keeps_its_promises_to_containers() {
    let Some((mut agent, monitor)) = boot().await else {
        return;
    };
    let hello = agent
        .client
        .hello(v1::HelloRequest {})
        .await
        .unwrap()
        .into_inner();
    eprintln!("{hello:?}");
    assert!(hello.configured && hello.kernel_nanos > 0 && hello.listening_nanos >= hello.kernel_nanos);
    // The same request once more is a no-op.
    agent.client.configure_sandbox(sandbox()).await.unwrap();

    // Network, clock and sysctls are as configured; no address is tentative.
    let script = "ip addr show dev eth0; ip route; ip -6 route; ip neigh; date +%s; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; ip addr show lo";
    let (exit, stdout, stderr) = agent.run("net", image(shell(script))).await;
    assert_eq!(exit.exit_code, 0, "{stderr}");
    for expected in [
        "mtu 1400",
        "inet 10.88.0.5/16",
        "inet6 fd00::5/64 scope global",
        "default via 169.254.1.1 dev eth0",
        "default via fd00::1 dev eth0",
        "169.254.1.1 dev eth0 lladdr 02:00:00:00:00:09",
        "\n20000",
        "127.0.0.1/8",
    ] {
        assert!(stdout.contains(expected), "{expected:?} is not in:\n{stdout}");
    }
    assert!(!stdout.contains("tentative scope global"), "{stdout}");

    // The writable layer is the scratch disk's; the image is read-only below it; nothing of the guest is visible.
    let (_, stdout, stderr) = agent
        .run(
            "fs",
            image(shell(
                "echo x > /etc/new && cat /etc/new; ls /; cat /proc/self/mountinfo",
            )),
        )
        .await;
    assert!(stdout.starts_with("x\nbin\n"), "{stdout}{stderr}");
    assert!(
        stdout.contains(" / / rw") && !stdout.contains("rootfs"),
        "{stdout}"
    );

    // More memory than allowed: killed by the kernel, and told so.
    let mut hungry = image(container(&[
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=64M",
        "count=1",
    ]));
    hungry.resources = Some(v1::Resources {
        memory_limit_bytes: 16 << 20,
        cpu_quota_micros: 50_000,
        cpu_period_micros: 100_000,
        cpu_shares: 512,
        pids_limit: 50,
        ..v1::Resources::default()
    });
    let (exit, _, stderr) = agent.run("oom", hungry).await;
    assert!(exit.oom_killed, "{exit:?} {stderr}");

    // One process allowed is enough for one process.
    let mut alone = image(container(&["cat", "/proc/self/cgroup"]));
    alone.resources = Some(v1::Resources {
        pids_limit: 1,
        ..v1::Resources::default()
    });
    let (exit, stdout, stderr) = agent.run("alone", alone).await;
    assert_eq!((exit.exit_code, stdout.as_str()), (0, "0::/\n"), "{stderr}");

    // vsock is closed to containers, and to privileged ones; they see every device, though.
    let mut privileged = image(shell(
        "ls /dev | grep -c vd; touch /sys/fs/cgroup/x 2>&1 | grep -c Read-only; mount -t tmpfs t /home && echo mounted",
    ));
    privileged.privileged = true;
    let every: Vec<String> = ["SYS_ADMIN", "MKNOD", "NET_ADMIN"]
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    privileged.process.as_mut().unwrap().capabilities = Some(v1::Capabilities {
        bounding: every.clone(),
        effective: every.clone(),
        permitted: every,
        ..v1::Capabilities::default()
    });
    let (_, stdout, stderr) = agent.run("privileged", privileged).await;
    assert_eq!(stdout, "2\n0\nmounted\n", "{stderr}");

    // A disk that is plugged in while the agent waits for it.
    let request = v1::CreateContainerRequest {
        container_id: "late".into(),
        spec: Some(v1::ContainerSpec {
            image_serial: "late".into(),
            ..shell("echo late")
        }),
    };
    let mut client = agent.client.clone();
    let create = tokio::spawn(async move { client.create_container(request).await });
    // The agent answers this after it has begun to look.
    agent.client.hello(v1::HelloRequest {}).await.unwrap();
    plug(&monitor).await;
    create.await.unwrap().unwrap();
    agent.start_container("late").await.unwrap();
    assert_eq!(text(&agent.read_all("late", "", Kind::Stdout).await), "late\n");
    agent.remove("late").await;

    // Exec, while another container keeps running.
    agent
        .create("long", image(container(&["sleep", "1000"])))
        .await
        .unwrap();
    agent.start_container("long").await.unwrap();
    let (exit, stdout) = agent
        .exec("long", "e", process(&["sh", "-c", "echo here; exit 4"]))
        .await
        .unwrap();
    assert_eq!((exit.exit_code, stdout.as_str()), (4, "here\n"));
    // A megabyte, whole.
    let many = process(&["sh", "-c", "yes 0123456789 | head -c 1000000"]);
    let (_, stdout) = agent.exec("long", "many", many).await.unwrap();
    assert_eq!(stdout.len(), 1_000_000);
    agent.remove("long").await;
    assert!(text(&agent.read_all("long", "", Kind::Stdout).await).is_empty());

    let hello = agent
        .client
        .hello(v1::HelloRequest {})
        .await
        .unwrap()
        .into_inner();
    eprintln!("agent memory after all this: {} KiB", hello.agent_rss_bytes >> 10);
    assert!(hello.agent_rss_bytes < 4 << 20, "{} bytes", hello.agent_rss_bytes);
}
