//! Unix sockets of the host as volumes: containers connect to them, as its users may, and to nothing else.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod},
    host::{Host, command},
    image::{self, Image, Layer},
    node::{Node, node_with},
    run,
};
use k8s_cri::v1 as cri;

/// Connects to its first argument, says its second, ends its half of the conversation, and prints what it hears. With a third, a
/// number: as this user.
const CLIENT: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    char buffer[65536];
    if (argc > 3 && setuid(atoi(argv[3])) < 0) return 9;
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(s, (struct sockaddr *)&address, sizeof address) < 0) { perror("connect"); return 1; }
    size_t left = strlen(argv[2]);
    for (const char *at = argv[2]; left > 0;) {
        ssize_t n = write(s, at, left);
        if (n < 0) { perror("write"); return 2; }
        at += n; left -= n;
    }
    shutdown(s, SHUT_WR);
    for (;;) {
        ssize_t n = read(s, buffer, sizeof buffer);
        if (n < 0) { perror("read"); return 3; }
        if (n == 0) return 0;
        fwrite(buffer, 1, n, stdout);
    }
}
"#;

fn client_image(host: &Host) -> Result<Image> {
    let (source, binary) = (host.dir().join("client.c"), host.dir().join("client"));
    fs::write(&source, CLIENT)?;
    command(
        Command::new("gcc")
            .args(["-O1", "-static", "-o"])
            .arg(&binary)
            .arg(&source),
    )?;
    let client = Layer::default()
        .file("client", 0o755, &fs::read(&binary)?)?
        .gzip()?;
    let config = serde_json::json!({ "Env": ["PATH=/bin"] });
    Ok(Image::new(vec![image::busybox_layer()?, client], &config))
}

/// A server on a socket of the host, which says back what it has heard until its client has ended. Ends with the test's process.
fn serve(path: &Path, greeting: &'static str) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            std::thread::spawn(move || {
                let mut heard = Vec::new();
                let answered = client
                    .read_to_end(&mut heard)
                    .and_then(|_| client.write_all(greeting.as_bytes()))
                    .and_then(|()| client.write_all(&heard));
                if let Err(error) = answered {
                    eprintln!("the server of the test: {error}");
                }
            });
        }
    });
    Ok(())
}

fn mount(host_path: PathBuf, container_path: &str) -> cri::Mount {
    cri::Mount {
        host_path: host_path.display().to_string(),
        container_path: container_path.into(),
        ..Default::default()
    }
}

async fn sh(cri: &mut Cri, id: &str, script: &str) -> Result<String> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code == 0, "{script}: {code}: {out}{err}");
    Ok(out)
}

#[test]
fn containers_talk_to_sockets_of_the_host_that_are_their_volumes() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut daemon,
            mut cri,
            image,
            registry: _registry,
        } = node_with(&host, "test/client", &client_image(&host)?).await?;
        let data = host.dir().join("sockets");
        fs::create_dir(&data)?;
        serve(&data.join("one"), "one:")?;
        serve(&data.join("two"), "two:")?;
        fs::set_permissions(data.join("one"), fs::Permissions::from_mode(0o777))?;
        fs::set_permissions(data.join("two"), fs::Permissions::from_mode(0o600))?;
        command(Command::new("mkfifo").arg(data.join("pipe")))?;

        let config = pod(&host, "sockets");
        let pod_id = cri.run_pod(&config).await?;
        let mut first = container("first", &image, &["sleep", "1000"]);
        first.mounts = vec![
            mount(data.join("one"), "/run/one.sock"),
            mount(data.join("two"), "/two"),
        ];
        let first = cri.run(&pod_id, &first, &config).await?;

        let told = sh(
            &mut cri,
            &first,
            "stat -c '%F %a' /run/one.sock /two; /client /run/one.sock hello; echo; /client /two there",
        )
        .await?;
        ensure!(told == "socket 777\nsocket 600\none:hello\ntwo:there", "{told}");
        // The socket's own mode decides, as it would on the host.
        let told = sh(
            &mut cri,
            &first,
            "/client /run/one.sock x 1000; echo; /client /two x 1000 2>&1 || true",
        )
        .await?;
        ensure!(told == "one:x\nconnect: Permission denied\n", "{told}");
        // More than there are connections to the host, one after the other and at once; and more than fits any buffer on the way.
        let told = sh(
            &mut cri,
            &first,
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do /client /two $i & done | wc -c; \
             /client /two $(head -c 100000 /dev/zero | tr '\\0' a) | wc -c",
        )
        .await?;
        ensure!(told == "111\n100004\n", "{told}");

        // A restarted daemon has no part in it, and later containers find the server again.
        daemon.kill()?;
        daemon.start_again().await?;
        cri = daemon.cri().await?;
        ensure!(sh(&mut cri, &first, "/client /two again").await? == "two:again");
        let mut second = container("second", &image, &["sleep", "1000"]);
        second.mounts = vec![mount(data.join("two"), "/two")];
        let second = cri.run(&pod_id, &second, &config).await?;
        ensure!(sh(&mut cri, &second, "/client /two mine").await? == "two:mine");

        let mut bad = container("bad", &image, &["sleep", "1000"]);
        bad.mounts = vec![mount(data.join("pipe"), "/pipe")];
        let refused = cri.create(&pod_id, &bad, &config).await.err();
        let refused = refused.context("a named pipe was accepted")?;
        ensure!(refused.message().contains("named pipe"), "{refused}");

        cri.remove_pod(&pod_id).await?;
        drop(daemon);
        host.leftovers()?.nothing_new_since(&before)
    })
}
