//! Unix sockets below a shared directory: the host's are connected where they are seen, the pod's own stay its own.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    eventually,
    host::Host,
    node::{Node, node_with},
    run,
    volumes::{
        Mounted, fails, file_servers, kubelet_volume, mount, readonly, sh, sleeper, sub_path, wait_for,
    },
};

use crate::probe_image;

/// Says back what it has heard, after a word of its own. Ends with the test's process.
fn serve(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            std::thread::spawn(move || {
                let mut heard = [0; 256];
                // Whoever only looks says nothing.
                if let Ok(length @ 1..) = client.read(&mut heard) {
                    let said = [b"host:", heard.get(..length).unwrap_or_default()].concat();
                    drop(client.write_all(&said));
                }
            });
        }
    });
    Ok(())
}

/// The same in a process with a network of its own, as a server that runs in another pod has; killed when dropped.
struct Elsewhere(Child);

impl Elsewhere {
    async fn serve(path: &Path) -> Result<Self> {
        const SERVER: &str = "import socket, sys\n\
            s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n\
            while True:\n    c, _ = s.accept(); m = c.recv(256); m and c.sendall(b'elsewhere:' + m); c.close()\n";
        let server = Command::new("unshare")
            .args(["--net", "--mount", "python3", "-c", SERVER])
            .arg(path)
            .stderr(Stdio::null())
            .spawn()
            .context("starting a server in namespaces of its own")?;
        let server = Self(server);
        eventually(
            "the server in namespaces of its own",
            Duration::from_secs(20),
            async || UnixStream::connect(path).ok(),
        )
        .await?;
        Ok(server)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        if self.0.kill().and_then(|()| self.0.wait()).is_err() {
            eprintln!("the server in namespaces of its own is not gone");
        }
    }
}

#[test]
fn sockets_of_the_host_below_a_directory_are_connected_where_they_are() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/probe", &probe_image(&host)?).await?;
        let data = host.dir().join("data");
        fs::create_dir_all(data.join("a/b"))?;
        serve(&data.join("a/b/server"))?;
        fs::set_permissions(data.join("a/b/server"), fs::Permissions::from_mode(0o640))?;
        serve(&host.dir().join("outside"))?;
        symlink("../outside", data.join("link"))?;
        // Deeper than is looked, which is said and no error.
        fs::create_dir_all(data.join("1/2/3/4/5/6/7/8"))?;
        let elsewhere = Elsewhere::serve(&data.join("elsewhere")).await?;
        // As a CSI driver mounts it, and a part of that as kubelet does.
        let volume = kubelet_volume(&host, "below", "csi", "data")?;
        let driver = Mounted::bind(&data, volume.join("mount"))?;
        let part = Mounted::bind(&driver.0.join("a"), sub_path(&host, "below", "data", "one"))?;

        let config = pod(&host, "below");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [
            mount(&data, "/data"),
            readonly(&driver.0, "/fixed"),
            readonly(&part.0, "/part"),
        ];
        let one = cri
            .run(&pod_id, &sleeper("one", &image, &mounts), &config)
            .await?;
        let told = sh(
            &mut cri,
            &one,
            "stat -c '%F %a' /data/a/b/server; for s in /data/a/b /fixed/a/b /part/b; do /probe connect $s/server hello; done; \
             /probe connect /data/elsewhere you; /probe connect /fixed/elsewhere there",
        )
        .await?;
        ensure!(
            told == "socket 640\nhost:hello\nhost:hello\nhost:hello\nelsewhere:you\nelsewhere:there\n",
            "{told}"
        );
        ensure!(file_servers(&host).len() == 2);
        // A link leads to where it leads in the container; what is connected cannot be taken away.
        fails(&mut cri, &one, "/probe connect /data/link x", "No such file").await?;
        fails(&mut cri, &one, "rm /data/a/b/server", "busy").await?;
        fails(
            &mut cri,
            &one,
            "chmod 777 /fixed/a/b/server",
            "Read-only file system",
        )
        .await?;
        let log = daemon.log();
        for volume in [&data, &driver.0] {
            let said = volume.display().to_string();
            let said = log
                .lines()
                .filter(|line| line.contains("not all of a volume was searched") && line.contains(&said));
            ensure!(said.count() == 1, "of {}:\n{log}", volume.display());
        }

        // One that comes later, or that a server makes anew, is for containers that come later; another volume in its place hides it.
        serve(&data.join("a/late"))?;
        fs::rename(data.join("a/b/server"), data.join("a/moved"))?;
        serve(&data.join("a/b/server"))?;
        wait_for(&mut cri, &one, "the later socket", "test -S /data/a/late").await?;
        fails(&mut cri, &one, "/probe connect /data/a/late x", "refused").await?;
        daemon.kill()?;
        daemon.start_again().await?;
        cri = daemon.cri().await?;
        let own = host.dir().join("own");
        fs::create_dir_all(&own)?;
        let mounts = [
            mount(&data, "/data"),
            mount(&data, "/hidden"),
            mount(&own, "/hidden/a"),
        ];
        let two = cri
            .run(&pod_id, &sleeper("two", &image, &mounts), &config)
            .await?;
        let told = sh(
            &mut cri,
            &two,
            "ls /hidden/a; /probe connect /data/a/late now; /probe connect /hidden/elsewhere here",
        )
        .await?;
        ensure!(told == "host:now\nelsewhere:here\n", "{told}");
        fails(&mut cri, &one, "/probe connect /data/a/b/server x", "refused").await?;
        let told = sh(
            &mut cri,
            &two,
            "/probe connect /data/a/b/server anew; /probe connect /data/a/moved still",
        )
        .await?;
        ensure!(told == "host:anew\nhost:still\n", "{told}");
        ensure!(sh(&mut cri, &one, "/probe connect /data/elsewhere again").await? == "elsewhere:again\n");

        cri.remove_pod(&pod_id).await?;
        // The host's own are as they were.
        for socket in ["a/b/server", "a/late", "elsewhere"] {
            ensure!(fs::symlink_metadata(data.join(socket))?.file_type().is_socket());
            UnixStream::connect(data.join(socket))?;
        }
        drop((part, driver, elsewhere, daemon));
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn sockets_that_containers_make_stay_theirs() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            daemon: _daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/probe", &probe_image(&host)?).await?;
        let data = host.dir().join("data");
        fs::create_dir(&data)?;
        serve(&data.join("server"))?;
        // Whoever has made this one is gone.
        drop(UnixListener::bind(data.join("left"))?);
        let config = pod(&host, "own");
        let pod_id = cri.run_pod(&config).await?;
        let mounts = [mount(&data, "/data")];
        let one = cri
            .run(&pod_id, &sleeper("one", &image, &mounts), &config)
            .await?;
        fails(&mut cri, &one, "/probe connect /data/left x", "refused").await?;

        // Twice: the second time the socket of the first is there, as after a restart of a container.
        for turn in ["first", "second"] {
            let script = "for s in left own; do rm -f /data/$s; /probe listen /data/$s & done; wait";
            let mut server = container(turn, &image, &["sh", "-c", script]);
            server.mounts = mounts.to_vec();
            let server = cri.run(&pod_id, &server, &config).await?;
            let ready = "grep -q '00010000.*/data/left' /proc/net/unix && grep -q '00010000.*/data/own' /proc/net/unix";
            wait_for(&mut cri, &one, "the container's sockets", ready).await?;
            // One that was there before, and one that is made while they stand.
            let name = format!("{turn}-client");
            let client = cri
                .run(&pod_id, &sleeper(&name, &image, &mounts), &config)
                .await?;
            let told = sh(
                &mut cri,
                &one,
                "/probe connect /data/own to-own; /probe connect /data/server to-host",
            )
            .await?;
            ensure!(told == "to-own\nhost:to-host\n", "{told}");
            let told = sh(
                &mut cri,
                &client,
                "/probe connect /data/left to-left; /probe connect /data/server to-host",
            )
            .await?;
            ensure!(told == "to-left\nhost:to-host\n", "{told}");
            ensure!(cri.exited(&server).await?.exit_code == 0);
        }
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}
