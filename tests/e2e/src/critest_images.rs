//! The images that critest 1.36 runs, under their own names, made from Debian packages.
//!
//! Owns their content; what each must hold was read from critest's specs. Most are Docker schema 2 and a few OCI, some behind an
//! index of two platforms, as their originals are.

use std::{fs, path::Path, process::Command};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{
    checkout,
    host::command,
    image::{Blob, Image, Layer, applets, debian_package},
    registry::{DOCKER, OCI, Registry},
};

/// What nginx needs beside libc6.
pub const NGINX_PACKAGES: [&str; 5] = ["nginx", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g"];

/// Registries whose names the images have; each must be mirrored by the local one.
pub const REGISTRIES: [&str; 4] = ["registry.k8s.io", "gcr.io", "k8s.gcr.io", "public.ecr.aws"];

/// Debian's busybox lacks both.
const PGREP: &str = "#!/bin/sh\nr=1\nfor d in /proc/[0-9]*; do\n  { read -r c < \"$d/comm\"; } 2>/dev/null || continue\n  [ \"$c\" = \"$1\" ] && echo \"${d#/proc/}\" && r=0\ndone\nexit $r\n";
const IPCS: &str = "#!/bin/sh\nexec cat /proc/sysvipc/shm\n";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbin:x:2:2:bin:/bin:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\nbin:x:2:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n";

/// Pushes all of them; answers the digest of the one that critest asks for by digest.
pub fn push_all(registry: &Registry) -> Result<String> {
    let base = busybox_layer(PASSWD, GROUP)?;
    let shell = json!({ "Env": [PATH], "Cmd": ["sh"] });
    let e2e = |name: &str| format!("e2e-test-images/{name}");
    let staging = |name: &str| format!("k8s-staging-cri-tools/{name}");

    let busybox = Image::new(vec![base.clone()], &shell);
    registry.push_index(&DOCKER, &e2e("busybox"), "1.29-2", &busybox)?;

    let nginx = |port: u16| -> Result<Image> {
        let config = json!({
            "Env": [PATH], "Cmd": ["nginx", "-g", "daemon off;"], "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGTERM",
        });
        Ok(Image::new(vec![base.clone(), nginx_layer(port)?], &config))
    };
    registry.push_as(&DOCKER, &e2e("nginx"), "1.14-2", &nginx(80)?)?;
    registry.push_as(&DOCKER, &staging("hostnet-nginx-amd64"), "latest", &nginx(12003)?)?;
    registry.push_as(&DOCKER, &e2e("httpd"), "2.4.39-4", &httpd(&base)?)?;
    registry.push_as(&DOCKER, &e2e("nonewprivs"), "1.3", &nonewprivs()?)?;
    let pause = pause_layer()?;
    for tag in ["3.8", "3.9", "3.10", "3.10.1", "3.10.2"] {
        let config = json!({ "Env": [PATH], "User": "65535:65535", "Entrypoint": ["/pause"], "Labels": { "version": tag } });
        registry.push_index(&DOCKER, "pause", tag, &Image::new(vec![pause.clone()], &config))?;
    }
    // Each has an id of its own by the file that bears its name.
    let named = |text: &str| -> Result<Image> {
        let file = Layer::default().file(text, 0o644, format!("{text}\n").as_bytes())?;
        Ok(Image::new(vec![base.clone(), file.gzip()?], &shell))
    };
    registry.push_index(
        &DOCKER,
        &staging("test-image-latest"),
        "latest",
        &named("test-image-latest")?,
    )?;
    registry.push_as(
        &DOCKER,
        &staging("test-image-tag"),
        "test",
        &named("test-image-tag")?,
    )?;
    registry.push_as(
        &DOCKER,
        &staging("test-image-tag"),
        "all",
        &named("test-image-tag-all")?,
    )?;
    for number in ["1", "2", "3"] {
        let name = format!("test-image-{number}");
        registry.push_as(&DOCKER, &staging(&name), "latest", &named(&name)?)?;
        registry.push_as(
            &OCI,
            &staging("test-image-tags"),
            number,
            &named("test-image-tags")?,
        )?;
    }
    for (name, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:1004"),
        ("username-group", "www-data:1004"),
    ] {
        let image = Image::new(vec![base.clone()], &with_user(&shell, user));
        registry.push_as(
            &DOCKER,
            &staging(&format!("test-image-user-{name}")),
            "latest",
            &image,
        )?;
    }
    let groups = busybox_layer(
        &format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n"),
        &format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
    )?;
    let predefined = Image::new(vec![groups], &with_user(&shell, "1000"));
    registry.push_as(
        &DOCKER,
        &staging("test-image-predefined-group"),
        "latest",
        &predefined,
    )?;
    for flavour in ["1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl"] {
        let mut config = shell.clone();
        config["Labels"] = json!({ "flavour": flavour });
        let image = Image::new(vec![base.clone()], &config);
        registry.push_as(&DOCKER, "docker/library/busybox", flavour, &image)?;
    }
    registry.push_as(
        &DOCKER,
        &staging("test-image-digest"),
        "latest",
        &named("test-image-digest")?,
    )
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn with_user(config: &Value, user: &str) -> Value {
    let mut config = config.clone();
    config["User"] = user.into();
    config
}

/// Debian's dynamic busybox, each applet a file of its own name: a spec masks /bin/ls, which must not mask the shell.
fn busybox_layer(passwd: &str, group: &str) -> Result<Blob> {
    let busybox = debian_package("busybox")?;
    let libraries = ["ld-linux-x86-64.so.2", "libc.so.6", "libresolv.so.2", "libm.so.6"];
    let mut layer = Layer::default();
    for dir in [
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "proc",
        "run",
        "sys",
        "usr",
        "usr/bin",
        "usr/sbin",
        "var",
        "var/log",
        "var/run",
        "var/spool",
        "var/spool/mail",
        "var/www",
    ] {
        layer = layer.directory(dir, 0o755)?;
    }
    layer = layer
        .directory("root", 0o700)?
        .directory("tmp", 0o1777)?
        .directory("var/tmp", 0o1777)?
        .package(&debian_package("libc6")?, |path| {
            path.starts_with("lib64")
                || libraries
                    .iter()
                    .any(|name| path == format!("lib/x86_64-linux-gnu/{name}"))
        })?
        .package(&busybox, |path| path == "bin/busybox")?;
    for applet in applets(&busybox)? {
        if !["dpkg", "dpkg-deb", "rpm"].contains(&applet.as_str()) {
            layer = layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
        }
    }
    layer
        .file("bin/pgrep", 0o755, PGREP.as_bytes())?
        .file("bin/ipcs", 0o755, IPCS.as_bytes())?
        .symlink("usr/bin/env", "/bin/env")?
        .file("etc/passwd", 0o644, passwd.as_bytes())?
        .file("etc/group", 0o644, group.as_bytes())?
        .file("etc/shadow", 0o640, b"root:*:0:0:99999:7:::\n")?
        .file(
            "etc/nsswitch.conf",
            0o644,
            b"passwd: files\ngroup: files\nhosts: files dns\n",
        )?
        .gzip()
}

fn nginx_layer(port: u16) -> Result<Blob> {
    let mut layer = Layer::default();
    for name in NGINX_PACKAGES {
        layer = layer.package(&debian_package(name)?, |path| {
            path.contains(".so") || path == "usr/sbin/nginx"
        })?;
    }
    for dir in [
        "etc/nginx",
        "var/log/nginx",
        "var/lib",
        "var/lib/nginx",
        "var/lib/nginx/body",
        "usr/share",
        "usr/share/nginx",
    ] {
        layer = layer.directory(dir, 0o755)?;
    }
    let config = format!(
        "user www-data;\nworker_processes 1;\npid /var/run/nginx.pid;\nerror_log /dev/stderr notice;\nevents {{ worker_connections 64; }}\n\
         http {{ default_type text/html; access_log /dev/stdout;\n server {{ listen {port}; location / {{ root /usr/share/nginx; index index.html; }} }} }}\n"
    );
    layer
        .file("etc/nginx/nginx.conf", 0o644, config.as_bytes())?
        .file(
            "usr/share/nginx/index.html",
            0o644,
            b"<html><head><title>Welcome to nginx!</title></head><body><h1>Welcome to nginx!</h1></body></html>\n",
        )?
        .gzip()
}

/// A web server whose first log line has the word that a spec looks for.
fn httpd(base: &Blob) -> Result<Image> {
    let page = Layer::default()
        .directory("www", 0o755)?
        .file(
            "www/index.html",
            0o644,
            b"<html><body><h1>It works!</h1></body></html>\n",
        )?
        .gzip()?;
    let serve = "echo \"[core:notice] Command line: httpd -f -p 80\" >&2; exec httpd -f -p 80 -h /www";
    let config = json!({ "Env": [PATH], "ExposedPorts": { "80/tcp": {} }, "Cmd": ["sh", "-c", serve] });
    Ok(Image::new(vec![base.clone(), page], &config))
}

fn nonewprivs() -> Result<Image> {
    let layer = Layer::default()
        .file("nnp", 0o4755, &compiled("nonewprivs")?)?
        .directory("etc", 0o755)?
        .file("etc/passwd", 0o644, PASSWD.as_bytes())?
        .file("etc/group", 0o644, GROUP.as_bytes())?;
    let config = json!({ "Env": [PATH], "User": "1000", "Entrypoint": ["/nnp"] });
    Ok(Image::new(vec![layer.gzip()?], &config))
}

fn pause_layer() -> Result<Blob> {
    Layer::default().file("pause", 0o755, &compiled("pause")?)?.gzip()
}

/// A static program of `tests/e2e/critest`.
fn compiled(name: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join(name);
    let source = checkout().join("tests/e2e/critest").join(format!("{name}.c"));
    command(
        Command::new("cc")
            .args(["-static", "-Os", "-s", "-o"])
            .args([&program, &source as &Path]),
    )?;
    Ok(fs::read(program)?)
}
