//! Serves the CRI on a Unix socket until told to stop.
//!
//! Both services share one connection, as kubelet and crictl expect, with the one that `caissond image` uses; a small dispatcher stands
//! where a router would, and answers services that there are not with UNIMPLEMENTED.

use std::{convert::Infallible, future::Future, os::unix::net::UnixListener, pin::Pin, time::Duration};

use caisson_cri_api::{
    admin::images_server::{self, ImagesServer},
    v1::{
        image_service_server::{self, ImageServiceServer},
        runtime_service_server::{self, RuntimeServiceServer},
    },
};
use http::{Request, Response};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{body::Body, transport::Server};
use tower::Service;

use crate::{deadline, rpc::service::Cri, status};

/// Largest request that is read; kubelet's own bound.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// How long calls in progress may take after the daemon was told to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Serves until `stop` resolves and calls in progress have been answered, or the drain bound has passed.
pub async fn serve(
    cri: Cri,
    listener: UnixListener,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::Listener)?;
    let (stopping, mut told) = tokio::sync::watch::channel(false);
    let serving = Server::builder().serve_with_incoming_shutdown(
        Dispatch::new(cri),
        UnixListenerStream::new(listener),
        async move {
            stop.await;
            stopping.send_replace(true);
        },
    );
    let overtime = async move {
        // The sender lives until the server's future ends; then this branch is dropped with it.
        drop(told.wait_for(|stopping| *stopping).await);
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = serving => result.map_err(ServeError::Transport),
        () = overtime => {
            tracing::warn!(bound = ?DRAIN, "calls in progress were broken off");
            Ok(())
        }
    }
}

/// Why serving ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener cannot be used.
    #[error("cannot use the listening socket")]
    Listener(#[source] std::io::Error),
    /// The server gave up.
    #[error("the gRPC server failed")]
    Transport(#[source] tonic::transport::Error),
}

/// Both services of the CRI and the admin's, told apart by the path's first part.
#[derive(Clone)]
struct Dispatch {
    runtime: RuntimeServiceServer<Cri>,
    image: ImageServiceServer<Cri>,
    admin_images: ImagesServer<Cri>,
}

impl Dispatch {
    fn new(cri: Cri) -> Self {
        Self {
            runtime: RuntimeServiceServer::new(cri.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            admin_images: ImagesServer::new(cri.clone()),
            image: ImageServiceServer::new(cri).max_decoding_message_size(MAX_MESSAGE_BYTES),
        }
    }
}

impl Service<Request<Body>> for Dispatch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let limit = deadline::of(request.headers());
        let call = match service(request.uri().path()) {
            Some(runtime_service_server::SERVICE_NAME) => self.runtime.call(request),
            Some(image_service_server::SERVICE_NAME) => self.image.call(request),
            Some(images_server::SERVICE_NAME) => self.admin_images.call(request),
            other => {
                let answer = status::unknown_service(other.unwrap_or_default()).into_http();
                Box::pin(async { Ok(answer) })
            }
        };
        Box::pin(deadline::within(limit, call))
    }
}

/// `service` of `/service/Method`.
fn service(path: &str) -> Option<&str> {
    path.strip_prefix('/')?
        .split_once('/')
        .map(|(service, _)| service)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_is_the_paths_first_part() {
        assert_eq!(
            service("/runtime.v1.RuntimeService/Version"),
            Some(runtime_service_server::SERVICE_NAME)
        );
        assert_eq!(
            service("/runtime.v1.ImageService/ListImages"),
            Some(image_service_server::SERVICE_NAME)
        );
        assert_eq!(service("/x"), None);
    }
}
