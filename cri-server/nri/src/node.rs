//! What plugins may learn and ask of a node.

use async_trait::async_trait;

use crate::v1alpha1::{Container, ContainerEviction, ContainerUpdate, PodSandbox};

/// The side that has pods.
#[async_trait]
pub trait Node: Send + Sync {
    /// All pods and containers there are, but for those whose creation goes on.
    async fn inventory(&self) -> (Vec<PodSandbox>, Vec<Container>);

    /// Changes limits of a container, or says why not. It must not wait for anything that tells plugins.
    async fn update(&self, update: &ContainerUpdate) -> Result<(), String>;

    /// Begins to stop a container, and does not wait for its end, which is told to plugins.
    fn evict(&self, eviction: &ContainerEviction);
}
