//! The six streaming lists (KEP-5825): the same items as the list of the same name, in messages that stay far below what a client accepts.
//!
//! What a stream answers is one picture of the moment of the call, not of each message. No items: no message, and the stream ends.

use std::pin::Pin;

use caisson_cri_api::v1;
use prost::Message;
use tonic::Status;

use super::{
    list_container_stats, list_containers, list_images, list_pod_sandbox, list_pod_sandbox_metrics,
    list_pod_sandbox_stats,
};
use crate::{runtime::Runtime, status::RpcError};

/// Encoded items in one message; a single larger item goes alone. kubelet reads 16 MiB at most.
const CHUNK_BYTES: usize = 1 << 20;

/// A stream as the generated server wants it.
pub(super) type Chunks<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// StreamPodSandboxes.
pub(super) async fn pod_sandboxes(
    runtime: &Runtime,
    request: v1::StreamPodSandboxesRequest,
) -> Result<Chunks<v1::StreamPodSandboxesResponse>, RpcError> {
    let list = list_pod_sandbox::handle(
        runtime,
        v1::ListPodSandboxRequest {
            filter: request.filter,
        },
    )
    .await?;
    Ok(chunks(list.items, |pod_sandboxes| {
        v1::StreamPodSandboxesResponse { pod_sandboxes }
    }))
}

/// StreamContainers.
pub(super) async fn containers(
    runtime: &Runtime,
    request: v1::StreamContainersRequest,
) -> Result<Chunks<v1::StreamContainersResponse>, RpcError> {
    let list = list_containers::handle(
        runtime,
        v1::ListContainersRequest {
            filter: request.filter,
        },
    )
    .await?;
    Ok(chunks(list.containers, |containers| {
        v1::StreamContainersResponse { containers }
    }))
}

/// StreamContainerStats.
pub(super) async fn container_stats(
    runtime: &Runtime,
    request: v1::StreamContainerStatsRequest,
) -> Result<Chunks<v1::StreamContainerStatsResponse>, RpcError> {
    let list = list_container_stats::handle(
        runtime,
        v1::ListContainerStatsRequest {
            filter: request.filter,
        },
    )
    .await?;
    Ok(chunks(list.stats, |container_stats| {
        v1::StreamContainerStatsResponse { container_stats }
    }))
}

/// StreamPodSandboxStats.
pub(super) async fn pod_sandbox_stats(
    runtime: &Runtime,
    request: v1::StreamPodSandboxStatsRequest,
) -> Result<Chunks<v1::StreamPodSandboxStatsResponse>, RpcError> {
    let list = list_pod_sandbox_stats::handle(
        runtime,
        v1::ListPodSandboxStatsRequest {
            filter: request.filter,
        },
    )
    .await?;
    Ok(chunks(list.stats, |pod_sandbox_stats| {
        v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }
    }))
}

/// StreamPodSandboxMetrics.
pub(super) async fn pod_sandbox_metrics(
    runtime: &Runtime,
    _: v1::StreamPodSandboxMetricsRequest,
) -> Result<Chunks<v1::StreamPodSandboxMetricsResponse>, RpcError> {
    let list = list_pod_sandbox_metrics::handle(runtime, v1::ListPodSandboxMetricsRequest {}).await?;
    Ok(chunks(list.pod_metrics, |pod_sandbox_metrics| {
        v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }
    }))
}

/// StreamImages.
pub(super) async fn images(
    runtime: &Runtime,
    request: v1::StreamImagesRequest,
) -> Result<Chunks<v1::StreamImagesResponse>, RpcError> {
    let list = list_images::handle(
        runtime,
        v1::ListImagesRequest {
            filter: request.filter,
        },
    )
    .await?;
    Ok(chunks(list.images, |images| v1::StreamImagesResponse { images }))
}

/// Cuts a list into messages, each made by `message`.
fn chunks<I, M>(items: Vec<I>, message: fn(Vec<I>) -> M) -> Chunks<M>
where
    I: Message + 'static,
    M: Send + 'static,
{
    let messages: Vec<_> = cut(items).into_iter().map(|items| Ok(message(items))).collect();
    Box::pin(tokio_stream::iter(messages))
}

fn cut<I: Message>(items: Vec<I>) -> Vec<Vec<I>> {
    let mut all = Vec::new();
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    for item in items {
        let length = item.encoded_len();
        if !chunk.is_empty() && bytes + length > CHUNK_BYTES {
            all.push(std::mem::take(&mut chunk));
            bytes = 0;
        }
        bytes += length;
        chunk.push(item);
    }
    if !chunk.is_empty() {
        all.push(chunk);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: usize) -> v1::Image {
        v1::Image {
            id: "x".repeat(bytes),
            ..Default::default()
        }
    }

    #[test]
    fn a_long_list_is_cut_without_losing_or_moving_anything() {
        let items: Vec<_> = (0..100).map(|n| image(50_000 + n)).collect();
        let cut = cut(items.clone());
        assert!(cut.len() >= 5);
        for chunk in &cut {
            let bytes: usize = chunk.iter().map(Message::encoded_len).sum();
            assert!(bytes <= CHUNK_BYTES);
        }
        assert_eq!(cut.concat(), items);
    }

    #[test]
    fn an_item_larger_than_a_message_goes_alone_and_nothing_makes_no_message() {
        let cut_up = cut(vec![image(1), image(CHUNK_BYTES * 2), image(1)]);
        assert_eq!(cut_up.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
        assert!(cut(Vec::<v1::Image>::new()).is_empty());
    }
}
