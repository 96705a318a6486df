//! Debian's `docker-registry` as a process of one test, and pushing into it.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::fixture::{TestImage, digest};

/// `user` with the password `secret`, as htpasswd -B writes it.
const HTPASSWD: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
/// The same as header.
const PUSH_AUTH: &str = "Authorization: Basic dXNlcjpzZWNyZXQ=\r\n";

pub(crate) struct RegistryProcess {
    pub(crate) address: String,
    child: Child,
    directory: Option<tempfile::TempDir>,
}

impl Drop for RegistryProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the registry is configured with.
#[derive(Default)]
pub(crate) struct Options<'a> {
    pub(crate) password: bool,
    /// Certificate and key files.
    pub(crate) tls: Option<(&'a Path, &'a Path)>,
}

impl RegistryProcess {
    /// Nothing, with a word about it, when there is no registry on this machine.
    pub(crate) fn start(options: &Options<'_>) -> Option<Self> {
        Self::is_installed().then(|| Self::start_on(options, tempfile::tempdir().unwrap()))
    }

    fn start_on(options: &Options<'_>, mut directory: tempfile::TempDir) -> Self {
        // The port is free when chosen, and may be taken a moment later: then another is tried.
        for _ in 0..5 {
            match Self::try_start(options, directory) {
                Ok(registry) => return registry,
                Err(back) => directory = back,
            }
        }
        panic!("docker-registry does not start")
    }

    /// The same content behind other options.
    pub(crate) fn restart(mut self, options: &Options<'_>) -> Self {
        let directory = self.directory.take().unwrap();
        drop(self);
        Self::start_on(options, directory)
    }

    fn is_installed() -> bool {
        let installed = Command::new("docker-registry")
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok();
        if !installed {
            eprintln!("skipped: docker-registry is not installed");
        }
        installed
    }

    fn try_start(options: &Options<'_>, directory: tempfile::TempDir) -> Result<Self, tempfile::TempDir> {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let root = directory.path().display();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {root}/data}}}}\nhttp:\n  addr: {address}\n"
        );
        if let Some((certificate, key)) = options.tls {
            let (certificate, key) = (certificate.display(), key.display());
            config.push_str(&format!("  tls: {{certificate: {certificate}, key: {key}}}\n"));
        }
        if options.password {
            std::fs::write(directory.path().join("htpasswd"), HTPASSWD).unwrap();
            config.push_str(&format!(
                "auth: {{htpasswd: {{realm: Registry, path: {root}/htpasswd}}}}\n"
            ));
        }
        let file = directory.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut registry = Self {
            address,
            child,
            directory: Some(directory),
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(&registry.address).is_err() {
            if registry.child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                return Err(registry.directory.take().unwrap());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(registry)
    }

    pub(crate) fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    /// Pushes blobs and manifest.
    pub(crate) fn push(&self, repository: &str, tag: &str, image: &TestImage) {
        for blob in image.blobs.values() {
            self.push_blob(repository, blob);
        }
        self.push_manifest(repository, tag, image.media_type, &image.manifest);
    }

    pub(crate) fn push_manifest(&self, repository: &str, tag: &str, media_type: &str, manifest: &[u8]) {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, answer) = self.request("PUT", &path, media_type, manifest);
        assert_eq!(status, 201, "{answer}");
    }

    fn push_blob(&self, repository: &str, blob: &[u8]) {
        let (status, head) = self.request(
            "POST",
            &format!("/v2/{repository}/blobs/uploads/"),
            "text/plain",
            b"",
        );
        assert_eq!(status, 202, "{head}");
        let location = head
            .lines()
            .find_map(|line| line.strip_prefix("Location: "))
            .unwrap()
            .trim();
        let path = &location[location.find("/v2/").unwrap()..];
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={}", digest(blob));
        let (status, answer) = self.request("PUT", &path, "application/octet-stream", blob);
        assert_eq!(status, 201, "{answer}");
    }

    fn request(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{PUSH_AUTH}Connection: close\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        (answer[9..12].parse().unwrap(), answer)
    }
}
