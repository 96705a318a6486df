//! What workloads take for granted of the kernel below them, and what a guest does when its memory ends.

use std::{fmt::Write as _, fs, process::Command};

use anyhow::{Result, ensure};
use caisson_e2e::{
    cri::{container, pod, security},
    host::{Host, command},
    image::{self, Image, Layer},
    node::{Node, node, node_with},
    run, skipped,
};
use k8s_cri::v1 as cri;
use serde_json::json;

/// One line for each feature of the kernel that is reached by a system call: `ok NAME` or `FAIL NAME: reason`.
const PROBE: &str = include_str!("workloads/probe.c");

/// Shell commands that succeed when the kernel has what is named; each starts where the one before left the network.
const FEATURES: [(&str, &str); 27] = [
    (
        "bridge",
        "brctl addbr br0 && ip link set br0 type bridge vlan_filtering 1",
    ),
    (
        "veth",
        "ip link add v0 type veth peer name v1 && ip link set v0 master br0",
    ),
    ("dummy", "ip link add dm0 type dummy && ip link set dm0 up"),
    ("vlan", "ip link add link dm0 name dm0.7 type vlan id 7"),
    (
        "macvlan",
        "ip link add link dm0 name mv0 type macvlan mode bridge",
    ),
    (
        "ipvlan",
        "ip link add dm1 type dummy && ip link add link dm1 name iv0 type ipvlan",
    ),
    ("vxlan", "ip link add vx0 type vxlan id 42 dstport 4789 dev dm0"),
    ("geneve", "ip link add gn0 type geneve id 1 remote 192.0.2.1"),
    (
        "gre",
        "ip link add gre9 type gre remote 192.0.2.1 local 192.0.2.2",
    ),
    (
        "wireguard",
        "ip link add wg0 type wireguard && ip addr add 192.0.2.9/24 dev wg0 && ip link set wg0 up",
    ),
    ("vrf", "ip link add vrf0 type vrf table 10"),
    ("tun", "test -c /dev/net/tun && ip tuntap add mode tun name tn0"),
    ("tap", "ip tuntap add mode tap name tp0"),
    ("netem", "tc qdisc add dev dm0 root netem delay 10ms loss 1%"),
    (
        "htb",
        "tc qdisc add dev dm1 root handle 1: htb && tc class add dev dm1 parent 1: classid 1:1 htb rate 1mbit",
    ),
    (
        "tbf and ingress",
        "tc qdisc add dev v1 root tbf rate 1mbit burst 32k latency 400ms && tc qdisc add dev v1 ingress",
    ),
    (
        "mirred",
        "tc filter add dev v1 parent ffff: matchall action mirred egress redirect dev dm0",
    ),
    (
        "policy routing",
        "ip rule add fwmark 0x1 lookup 100 && ip -6 rule add fwmark 0x1 lookup 100",
    ),
    (
        "network namespaces",
        "unshare -n sh -c 'test $(ls /sys/class/net 2>/dev/null | wc -l) -ge 0'",
    ),
    ("user namespaces", "unshare -U -r sh -c 'test $(id -u) = 0'"),
    (
        "cgroup controllers",
        "for c in cpuset cpu io memory hugetlb pids; do grep -qw $c /sys/fs/cgroup/cgroup.controllers || exit 1; done",
    ),
    (
        "hugetlbfs",
        "echo 2 > /proc/sys/vm/nr_hugepages && mkdir /tmp/huge && mount -t hugetlbfs none /tmp/huge",
    ),
    (
        "binfmt_misc",
        "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc && echo ':probe:E::probe::/bin/sh:' > /proc/sys/fs/binfmt_misc/register",
    ),
    ("fuse", "test -c /dev/fuse && grep -qw fuse /proc/filesystems"),
    ("nfs", "grep -qw nfs4 /proc/filesystems"),
    ("squashfs", "grep -qw squashfs /proc/filesystems"),
    (
        "kernel configuration",
        "zcat /proc/config.gz | grep -q CONFIG_NAMESPACES=y",
    ),
];

/// istio-init's rules, reduced to one port; what is sent to 8080 arrives at 9090, where a web server listens.
const REDIRECT: &str = "\
    IPT -t nat -N CAISSON_OUTPUT && IPT -t nat -A OUTPUT -p tcp -j CAISSON_OUTPUT \
    && IPT -t nat -A CAISSON_OUTPUT -m owner --uid-owner 1337 -j RETURN \
    && IPT -t nat -A CAISSON_OUTPUT -p tcp --dport PORT -j REDIRECT --to-ports 9090 \
    && IPT -t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1 \
    && IPT -A INPUT -m conntrack --ctstate INVALID -j DROP \
    && wget -q -O - http://127.0.0.1:PORT/";

fn privileged_pod(host: &Host, name: &str) -> cri::PodSandboxConfig {
    let mut config = pod(host, name);
    config.linux.get_or_insert_default().security_context = Some(cri::LinuxSandboxSecurityContext {
        privileged: true,
        ..Default::default()
    });
    config
}

fn workload_image(host: &Host) -> Result<Image> {
    let (source, binary) = (host.dir().join("probe.c"), host.dir().join("probe"));
    fs::write(&source, PROBE)?;
    command(
        Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .arg(&binary)
            .arg(&source),
    )?;
    let probe = Layer::default()
        .file("probe", 0o755, &fs::read(&binary)?)?
        .directory("www", 0o755)?
        .file("www/index.html", 0o644, b"redirected\n")?
        .gzip()?;
    Ok(Image::new(
        vec![image::busybox_layer()?, image::network_layer()?, probe],
        &json!({ "Env": ["PATH=/usr/sbin:/sbin:/usr/bin:/bin"] }),
    ))
}

#[test]
fn the_tuned_kernel_has_what_workloads_take_for_granted() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node_with(&host, "test/workload", &workload_image(&host)?).await?;
        let config = privileged_pod(&host, "workloads");
        let pod_id = cri.run_pod(&config).await?;
        let mut all = container("all", &image, &["httpd", "-f", "-p", "9090", "-h", "/www"]);
        security(&mut all).privileged = true;
        let all = cri.run(&pod_id, &all, &config).await?;
        let (_, release, _) = cri.exec(&all, &["uname", "-r"]).await?;
        if !release.contains("-caisson") {
            skipped(&format!(
                "the kernel is {}, not the tuned one; see `make e2e-tuned`",
                release.trim()
            ));
            return Ok(());
        }
        let mut missing = String::new();
        for (feature, script) in FEATURES {
            let (code, out, err) = cri.exec(&all, &["sh", "-c", script]).await?;
            if code != 0 {
                writeln!(missing, "{feature}: {script} gave {code}: {out}{err}")?;
            }
        }
        let (_, probed, _) = cri.exec(&all, &["/probe"]).await?;
        ensure!(probed.contains("ok the end"), "the probe broke off: {probed}");
        for line in probed.lines().filter(|line| !line.starts_with("ok ")) {
            writeln!(missing, "{line}")?;
        }
        // As istio-init: no privilege but these two capabilities.
        let mut init = container("init", &image, &["sleep", "1000"]);
        security(&mut init).capabilities = Some(cri::Capability {
            add_capabilities: vec!["NET_ADMIN".into(), "NET_RAW".into()],
            ..Default::default()
        });
        let init = cri.run(&pod_id, &init, &config).await?;
        for (tables, port) in [("iptables-legacy", "8080"), ("iptables-nft", "8081")] {
            let script = REDIRECT.replace("IPT", tables).replace("PORT", port);
            let (code, out, err) = cri.exec(&init, &["sh", "-c", &script]).await?;
            if code != 0 || out != "redirected\n" {
                writeln!(missing, "REDIRECT by {tables} gave {code}: {out}{err}")?;
            }
        }
        ensure!(missing.is_empty(), "the kernel lacks:\n{missing}");
        Ok(())
    })
}

#[test]
fn an_image_s_volume_is_seeded_and_can_hold_an_overlay() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let seed = Layer::default()
            .directory("var/lib/docker", 0o710)?
            .file("var/lib/docker/seed", 0o640, b"from the image\n")?
            .gzip()?;
        let volumes = json!({ "Volumes": { "/var/lib/docker": {}, "/new": {} }, "Env": ["PATH=/bin"] });
        let image = Image::new(vec![image::busybox_layer()?, seed], &volumes);
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node_with(&host, "test/workload", &image).await?;
        let config = privileged_pod(&host, "volumes");
        let pod_id = cri.run_pod(&config).await?;
        let mut docker = container("docker", &image, &["sleep", "1000"]);
        security(&mut docker).privileged = true;
        let id = cri.run(&pod_id, &docker, &config).await?;
        let script = "set -e; cd /var/lib/docker; cat seed; stat -c %a . seed; \
            grep -E ' (/var/lib/docker|/new) ext4 ' /proc/mounts | wc -l; \
            mkdir l u w m; echo low > l/low; mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m; \
            echo up > m/up; cat m/low u/up; umount m";
        let (code, out, err) = cri.exec(&id, &["sh", "-c", script]).await?;
        ensure!(
            code == 0 && out == "from the image\n710\n640\n2\nlow\nup\n",
            "{code}: {out:?} {err}"
        );
        // Each container has its own copy.
        let again = cri
            .run(&pod_id, &container("again", &image, &["sleep", "1000"]), &config)
            .await?;
        let (_, out, _) = cri.exec(&again, &["ls", "/var/lib/docker"]).await?;
        ensure!(out == "seed\n", "{out}");
        Ok(())
    })
}

#[test]
fn a_container_that_takes_all_memory_is_killed_and_its_pod_lives() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "memory");
        let pod_id = cri.run_pod(&config).await?;
        let bystander = cri
            .run(&pod_id, &container("by", &image, &["sleep", "1000"]), &config)
            .await?;
        // tail keeps a line that never ends.
        let greedy = container("greedy", &image, &["sh", "-c", "exec tail -n 1 /dev/zero"]);
        let greedy = cri.run(&pod_id, &greedy, &config).await?;
        let status = cri.exited(&greedy).await?;
        ensure!(
            status.exit_code == 137 && status.reason == "OOMKilled",
            "expected an end by the OOM killer: {status:?}"
        );
        let (code, out, _) = cri.exec(&bystander, &["echo", "alive"]).await?;
        ensure!(code == 0 && out == "alive\n", "{code} {out}");
        let (status, _) = cri.pod_status(&pod_id).await?;
        ensure!(status.state() == cri::PodSandboxState::SandboxReady, "{status:?}");
        Ok(())
    })
}

#[test]
fn stdin_and_terminals_behave_as_asked() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "stdin");
        let pod_id = cri.run_pod(&config).await?;
        // Without stdin: the end at once. With stdin and nobody attached: it waits.
        let closed = cri
            .run(&pod_id, &container("closed", &image, &["cat"]), &config)
            .await?;
        ensure!(cri.exited(&closed).await?.exit_code == 0);
        let mut open = container("open", &image, &["sh", "-c", "cat; exit 9"]);
        open.stdin = true;
        let open = cri.run(&pod_id, &open, &config).await?;
        // A terminal: its exit code arrives, and its output is written once.
        let mut terminal = container(
            "terminal",
            &image,
            &["sh", "-c", "test -t 0 && test -t 1 && echo on $(tty); exit 5"],
        );
        (terminal.tty, terminal.stdin) = (true, true);
        let terminal = cri.run(&pod_id, &terminal, &config).await?;
        let status = cri.exited(&terminal).await?;
        let log = fs::read_to_string(host.log_dir("stdin")?.join("terminal.log"))?;
        ensure!(
            status.exit_code == 5 && log.matches("on /dev/").count() == 1,
            "{status:?} {log:?}"
        );
        ensure!(log.lines().count() == 1, "{log:?}");
        ensure!(
            cri.status(&open).await?.state() == cri::ContainerState::ContainerRunning,
            "stdin that nobody has attached to ended"
        );
        Ok(())
    })
}
