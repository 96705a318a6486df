//! The port to the node's pod network: two verbs, so that a pod's boot and rollback can be tried without CNI.

use async_trait::async_trait;
use caisson_net::{NetError, Network, PodNetwork, PodNetworkSpec};

/// Makes and takes down pod networks.
#[async_trait]
pub trait PodNetworks: Send + Sync + 'static {
    /// See [`Network::setup`].
    async fn setup(&self, id: &str, spec: &PodNetworkSpec) -> Result<PodNetwork, NetError>;
    /// See [`Network::teardown`].
    async fn teardown(&self, id: &str, spec: &PodNetworkSpec) -> Result<(), NetError>;
}

#[async_trait]
impl PodNetworks for Network {
    async fn setup(&self, id: &str, spec: &PodNetworkSpec) -> Result<PodNetwork, NetError> {
        Network::setup(self, id, spec).await
    }

    async fn teardown(&self, id: &str, spec: &PodNetworkSpec) -> Result<(), NetError> {
        Network::teardown(self, id, spec).await
    }
}
