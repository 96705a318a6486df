//! Volumes that stay on the host, asked for as kubelet does: what containers see, change and share, and what they cannot.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    eventually,
    host::{Host, command},
    image::{self, Image, Layer},
    node::{Node, node, node_with},
    run,
};
use k8s_cri::v1 as cri;

/// How long a change on the host may take to be seen in a container, and the other way.
const SEEN_LIMIT: Duration = Duration::from_secs(20);

fn mount(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.into(),
        ..Default::default()
    }
}

fn readonly(host_path: &Path, container_path: &str) -> cri::Mount {
    cri::Mount {
        readonly: true,
        ..mount(host_path, container_path)
    }
}

/// A container that sleeps, with these mounts.
fn sleeper(name: &str, image: &str, mounts: &[cri::Mount]) -> cri::ContainerConfig {
    let mut config = container(name, image, &["sleep", "1000"]);
    config.mounts = mounts.to_vec();
    config
}

/// Runs a script that must succeed; answers what it printed.
async fn sh(cri: &mut Cri, id: &str, script: &str) -> Result<String> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code == 0, "{script}: {code}: {out}{err}");
    Ok(out)
}

/// Runs a script that must fail, with this in its error.
async fn fails(cri: &mut Cri, id: &str, script: &str, word: &str) -> Result<()> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code != 0 && err.contains(word), "{script}: {code}: {out}{err}");
    Ok(())
}

async fn wait_for(cri: &mut Cri, id: &str, what: &str, script: &str) -> Result<()> {
    eventually(what, SEEN_LIMIT, async || {
        let (code, _, _) = cri.exec(id, &["sh", "-c", script]).await.ok()?;
        (code == 0).then_some(())
    })
    .await
}

/// A file system of its own below the test's directory; unmounted at the end.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path)?;
        command(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&path))?;
        Ok(Self(path))
    }

    /// A directory on itself, so that propagation can be set.
    fn shared(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path)?;
        command(Command::new("mount").arg("--bind").arg(&path).arg(&path))?;
        command(Command::new("mount").arg("--make-rshared").arg(&path))?;
        Ok(Self(path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-lR").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

#[test]
fn a_directory_of_the_host_is_read_and_written_in_place() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("from-host"), "hello\n")?;
        chown(data.join("from-host"), Some(1234), Some(4321))?;
        fs::set_permissions(data.join("from-host"), fs::Permissions::from_mode(0o640))?;
        symlink("from-host", data.join("link"))?;
        let config = pod(&host, "hostpath");
        let pod_id = cri.run_pod(&config).await?;
        let one = sleeper("one", &image, &[mount(&data, "/data")]);
        let one = cri.run(&pod_id, &one, &config).await?;

        // Content, links, owners and modes, both ways.
        let out = sh(
            &mut cri,
            &one,
            "cat /data/link; stat -c '%u %g %a' /data/from-host",
        )
        .await?;
        ensure!(out == "hello\n1234 4321 640\n", "{out}");
        sh(&mut cri, &one, "set -e; cd /data; mkdir -p a/b; echo deep > a/b/c; chmod 4751 a/b/c; chown 7:8 a/b/c; \
            ln a/b/c hard; ln -s a/b/c soft; mkfifo pipe; dd if=/dev/zero of=big bs=1M count=5 2>/dev/null; mv big bigger; \
            truncate -s 3 a/b/c; touch -d @1000000000 bigger").await?;
        let file = data.join("a/b/c").metadata()?;
        ensure!(fs::read(data.join("a/b/c"))? == b"dee" && (file.uid(), file.gid()) == (7, 8));
        ensure!(
            file.nlink() == 2 && file.mode() & 0o777 == 0o751,
            "{:o}",
            file.mode()
        );
        let bigger = data.join("bigger").metadata()?;
        ensure!(bigger.len() == 5 << 20 && bigger.mtime() == 1_000_000_000);
        ensure!(fs::read_link(data.join("soft"))? == Path::new("a/b/c"));

        // What the host changes is seen.
        fs::write(data.join("from-host"), "changed, and longer than before\n")?;
        fs::write(data.join("new"), "new\n")?;
        fs::remove_file(data.join("link"))?;
        wait_for(
            &mut cri,
            &one,
            "the host's changes",
            "grep -q longer /data/from-host && grep -q new /data/new && ! test -e /data/link",
        )
        .await?;

        // Another container of the pod shares files, locks, memory maps and sockets, and one that comes later as well.
        let two = sleeper("two", &image, &[mount(&data, "/elsewhere")]);
        let two = cri.run(&pod_id, &two, &config).await?;
        sh(&mut cri, &one, "echo shared > /data/shared").await?;
        let out = sh(
            &mut cri,
            &two,
            "cat /elsewhere/shared; ls /elsewhere | sort | head -3",
        )
        .await?;
        ensure!(out == "shared\na\nbigger\nfrom-host\n", "{out}");
        sh(
            &mut cri,
            &one,
            "(flock -x 9; touch /data/held; while test -e /data/held; do sleep 0.1; done) 9>/data/lock >/dev/null 2>&1 & \
            while ! test -e /data/held; do sleep 0.1; done",
        )
        .await?;
        fails(
            &mut cri,
            &two,
            "flock -n -x /elsewhere/lock true || { echo taken >&2; false; }",
            "taken",
        )
        .await?;
        fs::remove_file(data.join("held"))?;

        // A user of the pod who may write only by a supplementary group (fsGroup) can.
        let group = data.join("group");
        fs::create_dir(&group)?;
        chown(&group, Some(0), Some(5555))?;
        fs::set_permissions(&group, fs::Permissions::from_mode(0o2775))?;
        let mut member = sleeper("member", &image, &[mount(&data, "/data")]);
        let linux = member.linux.get_or_insert_default();
        linux.security_context = Some(cri::LinuxContainerSecurityContext {
            run_as_user: Some(cri::Int64Value { value: 1000 }),
            supplemental_groups: vec![5555],
            ..Default::default()
        });
        let member = cri.run(&pod_id, &member, &config).await?;
        sh(
            &mut cri,
            &member,
            "mkdir /data/group/d && echo x > /data/group/d/f && ln -s f /data/group/d/l",
        )
        .await?;
        let made = group.join("d/f").metadata()?;
        ensure!(
            (made.uid(), made.gid()) == (1000, 5555),
            "{} {}",
            made.uid(),
            made.gid()
        );
        fails(&mut cri, &member, "echo x > /data/a/no", "Permission denied").await?;

        cri.remove_pod(&pod_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn read_only_means_what_was_asked_for() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir_all(data.join("plain"))?;
        fs::write(data.join("file"), "text\n")?;
        let inner = Mounted::tmpfs(data.join("inner"))?;
        fs::write(inner.0.join("seen"), "inner\n")?;
        let config = pod(&host, "readonly");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            readonly(&data, "/top"),
            cri::Mount {
                recursive_read_only: true,
                ..readonly(&data, "/all")
            },
            readonly(&data.join("plain"), "/plain"),
            readonly(&data.join("file"), "/file"),
            mount(&data.join("file"), "/writable-file"),
        ];
        let id = cri.run(&pod_id, &sleeper("ro", &image, &mounts), &config).await?;
        let out = sh(&mut cri, &id, "cat /top/inner/seen /all/inner/seen /file; touch /top/inner/written; echo more >> /writable-file").await?;
        ensure!(out == "inner\ninner\ntext\n", "{out}");
        ensure!(inner.0.join("written").exists());
        ensure!(fs::read_to_string(data.join("file"))? == "text\nmore\n");
        for script in [
            "touch /top/x",
            "echo x >> /top/file",
            "rm /top/file",
            "touch /all/x",
            "touch /all/inner/x",
            "touch /plain/x",
            "echo x >> /file",
        ] {
            fails(&mut cri, &id, script, "Read-only file system").await?;
        }
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn later_mounts_of_the_host_appear_only_where_asked_for() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = Mounted::shared(host.dir().join("data"))?;
        let config = pod(&host, "propagation");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            mount(&data.0, "/private"),
            cri::Mount {
                propagation: cri::MountPropagation::PropagationHostToContainer.into(),
                ..mount(&data.0, "/slave")
            },
        ];
        let id = cri
            .run(&pod_id, &sleeper("late", &image, &mounts), &config)
            .await?;
        sh(&mut cri, &id, "ls /private /slave").await?;
        let late = Mounted::tmpfs(data.0.join("late"))?;
        fs::write(late.0.join("file"), "late\n")?;
        wait_for(
            &mut cri,
            &id,
            "the host's later mount",
            "grep -q late /slave/late/file",
        )
        .await?;
        sh(
            &mut cri,
            &id,
            "test -d /private/late && ! test -e /private/late/file",
        )
        .await?;
        let mut shared = sleeper("shared", &image, &mounts);
        shared.mounts[0].propagation = cri::MountPropagation::PropagationBidirectional.into();
        let error = cri
            .create(&pod_id, &shared, &config)
            .await
            .err()
            .context("a mount that cannot travel to the host was accepted")?;
        ensure!(error.message().contains("Bidirectional"), "{error}");
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// Pids of the file servers of this host's pods.
fn file_servers(host: &Host) -> Vec<i32> {
    let mine = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(host.dir()))
            && fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "caisson-files")
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(mine).collect()
}

#[test]
fn the_file_server_sees_its_volumes_and_nothing_else() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("file"), "here\n")?;
        let config = pod(&host, "confined");
        let pod_id = cri.run_pod(&config).await?;
        let plain = cri.run(&pod_id, &sleeper("plain", &image, &[]), &config).await?;
        ensure!(
            file_servers(&host).is_empty(),
            "a file server runs for a pod that has no such volume"
        );
        cri.remove(&plain).await?;
        let id = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        sh(&mut cri, &id, "cat /data/file").await?;
        let [pid] = file_servers(&host)[..] else {
            anyhow::bail!("there are {:?}", file_servers(&host));
        };
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let mut names: Vec<_> = fs::read_dir(&root)?
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        ensure!(names == ["proc", "volumes"], "{names:?}");
        ensure!(fs::read_dir(root.join("volumes"))?.count() == 1);
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
        let kept = [0u32, 1, 2, 3, 4, 6, 7, 27, 31]
            .iter()
            .fold(0u64, |set, bit| set | 1 << bit);
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            ensure!(
                line(set) == Some(format!("{kept:016x}").as_str()),
                "{set} {:?}",
                line(set)
            );
        }
        ensure!(
            (line("NoNewPrivs:"), line("Seccomp:")) == (Some("1"), Some("2")),
            "{status}"
        );
        let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
        ensure!(
            interfaces
                .lines()
                .skip(2)
                .all(|line| line.trim_start().starts_with("lo:")),
            "{interfaces}"
        );
        cri.remove_pod(&pod_id).await?;
        eventually("the file server's end", SEEN_LIMIT, async || {
            file_servers(&host).is_empty().then_some(())
        })
        .await
    })
}

#[test]
fn a_dead_file_server_gives_errors_and_a_restarted_daemon_finds_the_living() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        fs::write(data.join("file"), "here\n")?;
        let config = pod(&host, "server");
        let pod_id = cri.run_pod(&config).await?;
        let one = cri
            .run(
                &pod_id,
                &sleeper("one", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        let [pid] = file_servers(&host)[..] else {
            anyhow::bail!("there are {:?}", file_servers(&host));
        };

        // No daemon, and the volume works; a new daemon, and the same server serves a new container.
        daemon.kill()?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        ensure!(sh(&mut cri, &one, "cat /data/file; echo still > /data/still").await? == "here\n");
        ensure!(fs::read(data.join("still"))? == b"still\n");
        let two = cri
            .run(
                &pod_id,
                &sleeper("two", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        ensure!(sh(&mut cri, &two, "cat /data/still").await? == "still\n");
        ensure!(
            file_servers(&host) == [pid],
            "{:?} and not {pid}",
            file_servers(&host)
        );

        // Its end is an I/O error in the pod, at once and for good; what comes later is served again.
        nix_kill(pid)?;
        eventually("the file server's end", SEEN_LIMIT, async || {
            file_servers(&host).is_empty().then_some(())
        })
        .await?;
        fails(&mut cri, &one, "cat /data/file", "Input/output error").await?;
        fails(&mut cri, &two, "ls /data/", "Input/output error").await?;
        let three = cri
            .run(
                &pod_id,
                &sleeper("three", &image, &[mount(&data, "/data")]),
                &config,
            )
            .await?;
        ensure!(sh(&mut cri, &three, "cat /data/file").await? == "here\n");
        fails(&mut cri, &one, "cat /data/file", "Input/output error").await?;
        cri.stop(&one, 1).await?;
        cri.remove(&one).await?;
        cri.remove_pod(&pod_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}

fn nix_kill(pid: i32) -> Result<()> {
    command(Command::new("kill").args(["-9", &pid.to_string()]))?;
    Ok(())
}

#[test]
fn a_volume_that_cannot_be_had_is_named_and_nothing_is_left() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        symlink("nowhere", data.join("dangling"))?;
        symlink("loop", data.join("loop"))?;
        let config = pod(&host, "bad");
        let pod_id = cri.run_pod(&config).await?;
        for name in ["absent", "dangling", "loop"] {
            let bad = sleeper(
                name,
                &image,
                &[mount(&data, "/good"), mount(&data.join(name), "/bad")],
            );
            let error = cri
                .create(&pod_id, &bad, &config)
                .await
                .err()
                .with_context(|| format!("{name} was accepted"))?;
            ensure!(
                error.message().contains("mounts[1]") && error.message().contains(name),
                "{error}"
            );
        }
        ensure!(file_servers(&host).is_empty());
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// kubelet's directory of a volume of this pod.
fn kubelet_volume(host: &Host, pod: &str, plugin: &str, name: &str) -> Result<PathBuf> {
    let path = host
        .dir()
        .join(format!("kubelet/pods/uid-{pod}/volumes/kubernetes.io~{plugin}"))
        .join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// Replaces a volume's content as kubelet's atomic writer does.
fn swap(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let data = volume.join(version);
    fs::create_dir(&data)?;
    for (name, content) in files {
        fs::write(data.join(name), content)?;
        fs::set_permissions(data.join(name), fs::Permissions::from_mode(0o644))?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(version, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for (name, _) in files {
        if !volume.join(name).is_symlink() {
            symlink(Path::new("..data").join(name), volume.join(name))?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(volume.join(old))?;
    }
    Ok(())
}

/// Ends well as soon as something named like its second argument has been moved into the directory of its first.
const LISTENER: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char buffer[65536] __attribute__((aligned(8)));
    int events = inotify_init();
    if (argc < 3 || inotify_add_watch(events, argv[1], IN_MOVED_TO) < 0) return 1;
    puts("watching");
    fflush(stdout);
    for (;;) {
        ssize_t length = read(events, buffer, sizeof buffer);
        if (length <= 0) return 2;
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            if (event->len > 0 && strcmp(event->name, argv[2]) == 0) return 0;
            at += sizeof *event + event->len;
        }
    }
}
"#;

fn listener_image(host: &Host) -> Result<Image> {
    let (source, binary) = (host.dir().join("listen.c"), host.dir().join("listen"));
    fs::write(&source, LISTENER)?;
    command(
        Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .arg(&binary)
            .arg(&source),
    )?;
    let listener = Layer::default()
        .file("listen", 0o755, &fs::read(&binary)?)?
        .gzip()?;
    let config = serde_json::json!({ "Env": ["PATH=/bin"] });
    Ok(Image::new(vec![image::busybox_layer()?, listener], &config))
}

#[test]
fn a_config_map_is_kept_up_to_date_and_its_parts_are_not() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/listener", &listener_image(&host)?).await?;
        let config = pod(&host, "config");
        let volume = kubelet_volume(&host, "config", "configmap", "settings")?;
        let optional = kubelet_volume(&host, "config", "configmap", "later")?;
        swap(&volume, "..1", &[("key", "one"), ("other", "same")])?;
        swap(&optional, "..1", &[])?;
        // A subPath: a bind mount of what the key was when the container was made.
        let part = host
            .dir()
            .join("kubelet/pods/uid-config/volume-subpaths/settings/reader/0");
        fs::create_dir_all(part.parent().context("no parent")?)?;
        fs::write(&part, "")?;
        command(
            Command::new("mount")
                .arg("--bind")
                .arg(volume.join("..1/key"))
                .arg(&part),
        )?;
        let _part = Mounted(part.clone());
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            readonly(&volume, "/settings"),
            readonly(&optional, "/later"),
            readonly(&part, "/key"),
        ];
        let id = cri
            .run(&pod_id, &sleeper("reader", &image, &mounts), &config)
            .await?;
        ensure!(
            sh(&mut cri, &id, "cat /settings/key /key; readlink /settings/key").await?
                == "oneone..data/key\n"
        );
        fails(&mut cri, &id, "touch /settings/x", "Read-only file system").await?;
        ensure!(
            file_servers(&host).is_empty(),
            "a file server runs for volumes that are copied"
        );

        // inotify in a container sees the swap.
        let mut listener = container("listener", &image, &["/listen", "/settings", "..data"]);
        listener.mounts = mounts.to_vec();
        let listener = cri.run(&pod_id, &listener, &config).await?;
        let log = host.log_dir("config")?.join("listener.log");
        eventually("the listener's watch", SEEN_LIMIT, async || {
            fs::read_to_string(&log)
                .ok()
                .filter(|log| log.contains("watching"))
                .map(drop)
        })
        .await?;
        let began = std::time::Instant::now();
        swap(&volume, "..2", &[("key", "two"), ("other", "same"), ("new", "x")])?;
        swap(&optional, "..2", &[("key", "here now")])?;
        wait_for(
            &mut cri,
            &id,
            "the new content",
            "grep -q two /settings/key && test -e /settings/new && grep -q here /later/key",
        )
        .await?;
        eprintln!(
            "a change of a configMap was seen after {:?}, a command's time included",
            began.elapsed()
        );
        ensure!(cri.exited(&listener).await?.exit_code == 0);
        ensure!(sh(&mut cri, &id, "cat /key").await? == "one");

        // What changes while there is no daemon arrives with the next one; then it follows again.
        daemon.kill()?;
        swap(
            &volume,
            "..3",
            &[("key", "three"), ("other", "same"), ("new", "x")],
        )?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        wait_for(
            &mut cri,
            &id,
            "the change from before the daemon",
            "grep -q three /settings/key",
        )
        .await?;
        swap(&volume, "..4", &[("key", "four"), ("other", "same")])?;
        wait_for(&mut cri, &id, "the change after", "grep -q four /settings/key").await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

#[test]
fn an_empty_dir_is_the_pod_s_own_and_outlives_its_containers() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "empty");
        let disk = kubelet_volume(&host, "empty", "empty-dir", "disk")?;
        chown(&disk, Some(0), Some(7000))?;
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o2777))?;
        let memory = Mounted(kubelet_volume(&host, "empty", "empty-dir", "memory")?);
        command(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=8m,mode=1777", "none"])
                .arg(&memory.0),
        )?;
        // kubelet makes the directory of a subPath in the host's directory, and binds it.
        let part = host
            .dir()
            .join("kubelet/pods/uid-empty/volume-subpaths/disk/two/0");
        fs::create_dir_all(&part)?;
        fs::create_dir(disk.join("sub"))?;
        command(
            Command::new("mount")
                .arg("--bind")
                .arg(disk.join("sub"))
                .arg(&part),
        )?;
        let _part = Mounted(part.clone());

        let pod_id = cri.run_pod(&config).await?;
        let mounts = [mount(&disk, "/disk"), mount(&memory.0, "/memory")];
        let one = cri
            .run(&pod_id, &sleeper("one", &image, &mounts), &config)
            .await?;
        let script = "set -e; stat -c '%g %a' /disk; ls -A /disk; grep -E ' /(disk|memory) ' /proc/mounts | cut -d' ' -f2,3; \
            mkdir /disk/sub; echo kept > /disk/sub/file; dd if=/dev/zero of=/disk/big bs=1M count=8 2>/dev/null; sync; \
            df -m /memory | tail -1 | grep -q ' 8 '; echo m > /memory/m";
        let out = sh(&mut cri, &one, script).await?;
        ensure!(out == "7000 2777\n/disk ext4\n/memory tmpfs\n", "{out}");
        // On the host it is inside the volume's directory, where `du` sees it.
        let used = caisson_e2e::host::text(Command::new("du").arg("-sm").arg(&disk))?;
        let used: u64 = used.split_whitespace().next().context("no number")?.parse()?;
        ensure!((8..100).contains(&used), "{used} MiB are used");
        ensure!(file_servers(&host).is_empty());

        // Shared with a container that comes later, whose subPath is what the first one made.
        let mut mounts = mounts.to_vec();
        mounts.push(mount(&part, "/part"));
        mounts[0].readonly = true;
        let two = cri
            .run(&pod_id, &sleeper("two", &image, &mounts), &config)
            .await?;
        ensure!(
            sh(
                &mut cri,
                &two,
                "cat /part/file /memory/m; echo more >> /part/file"
            )
            .await?
                == "kept\nm\n"
        );
        fails(&mut cri, &two, "touch /disk/x", "Read-only file system").await?;
        ensure!(sh(&mut cri, &one, "cat /disk/sub/file").await? == "kept\nmore\n");
        cri.stop(&one, 0).await?;
        cri.remove(&one).await?;
        ensure!(sh(&mut cri, &two, "cat /disk/sub/file").await? == "kept\nmore\n");

        // A sandbox that has to be made anew finds the disk as it was.
        sh(&mut cri, &two, "sync").await?;
        cri.stop_pod(&pod_id).await?;
        let mut again = config.clone();
        again.metadata.get_or_insert_default().attempt = 1;
        let next_id = cri.run_pod(&again).await?;
        let three = cri
            .run(
                &next_id,
                &sleeper("three", &image, &[mount(&disk, "/disk")]),
                &again,
            )
            .await?;
        ensure!(sh(&mut cri, &three, "cat /disk/sub/file").await? == "kept\nmore\n");
        cri.remove_pod(&next_id).await?;
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// A disk of the host's, made of a file.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path, bytes: u64) -> Result<Self> {
        fs::File::create(file)?.set_len(bytes)?;
        let name = caisson_e2e::host::text(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays attached", self.0.display());
        }
    }
}

#[test]
fn a_disk_of_the_host_is_a_disk_of_its_containers_only() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node(&host).await?;
        let file = host.dir().join("disk");
        let disk = Loop::new(&file, 16 << 20)?;
        let config = pod(&host, "block");
        let pod_id = cri.run_pod(&config).await?;
        let device = |inside: &str, permissions: &str| cri::Device {
            host_path: disk.0.display().to_string(),
            container_path: inside.into(),
            permissions: permissions.into(),
        };
        let mut writer = sleeper("writer", &image, &[]);
        writer.devices = vec![device("/dev/data", "rwm")];
        let writer = cri.run(&pod_id, &writer, &config).await?;
        let mut reader = sleeper("reader", &image, &[]);
        reader.devices = vec![device("/disks/data", "rm")];
        let reader = cri.run(&pod_id, &reader, &config).await?;
        let bystander = cri
            .run(&pod_id, &sleeper("bystander", &image, &[]), &config)
            .await?;

        // Not synced by the container: its end brings it to the host.
        sh(
            &mut cri,
            &writer,
            "test -b /dev/data && echo from the guest | dd of=/dev/data bs=512 seek=3 conv=sync 2>/dev/null",
        )
        .await?;
        fails(
            &mut cri,
            &reader,
            "echo x > /disks/data",
            "Operation not permitted",
        )
        .await?;
        fails(
            &mut cri,
            &bystander,
            "mknod /tmp/disk b 254 0 && cat /tmp/disk",
            "Operation not permitted",
        )
        .await?;
        cri.stop(&writer, 0).await?;
        let content = fs::read(&file)?;
        let found = content.get(3 * 512..3 * 512 + 14);
        ensure!(found == Some(b"from the guest"), "{found:?}");
        ensure!(
            sh(
                &mut cri,
                &reader,
                "dd if=/disks/data bs=512 skip=3 count=1 2>/dev/null | head -c 14"
            )
            .await?
                == "from the guest"
        );

        let mut bad = sleeper("bad", &image, &[]);
        bad.devices = vec![cri::Device {
            host_path: "/dev/nowhere".into(),
            ..device("/dev/x", "rwm")
        }];
        let error = cri
            .create(&pod_id, &bad, &config)
            .await
            .err()
            .context("accepted")?;
        ensure!(
            error.message().contains("config.devices[0]") && error.message().contains("/dev/nowhere"),
            "{error}"
        );
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
