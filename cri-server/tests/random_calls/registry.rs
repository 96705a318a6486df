//! A registry with one empty image, enough for one pull.

use std::{collections::HashMap, sync::Arc};

use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Serves until dropped.
pub(crate) struct Registry {
    /// Name of the image.
    pub(crate) image: String,
    server: JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What is served, by path: type and content.
type Pages = HashMap<String, (&'static str, Vec<u8>)>;

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

fn pages() -> Pages {
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    // The end of an archive is all there is in it.
    let layer = vec![0; 1024];
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
    })
    .to_string()
    .into_bytes();
    let blob = |kind: &str, bytes: &[u8]| serde_json::json!({ "mediaType": kind, "size": bytes.len(), "digest": digest(bytes) });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": blob(CONFIG, &config), "layers": [blob(LAYER, &layer)],
    })
    .to_string()
    .into_bytes();
    HashMap::from([
        ("/v2/test/manifests/1".to_owned(), (MANIFEST, manifest)),
        (format!("/v2/test/blobs/{}", digest(&config)), (CONFIG, config)),
        (format!("/v2/test/blobs/{}", digest(&layer)), (LAYER, layer)),
    ])
}

/// A registry on a free port of the loopback interface.
pub(crate) async fn serve() -> Registry {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let image = format!("{}/test:1", listener.local_addr().unwrap());
    let pages = Arc::new(pages());
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream, pages.clone()));
        }
    });
    Registry { image, server }
}

/// One request on each connection.
async fn answer(mut stream: TcpStream, pages: Arc<Pages>) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    let (status, (kind, content)) = match pages.get(path) {
        Some((kind, content)) => ("200 OK", (*kind, content.as_slice())),
        None => ("404 Not Found", ("text/plain", b"".as_slice())),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        content.len()
    );
    let mut reply = head.into_bytes();
    reply.extend_from_slice(content);
    let _client_may_be_gone = stream.write_all(&reply).await;
}
