//! Where the agent can be reached: four privileged vsock ports, opened before any container exists, for the host alone.

use std::{io, sync::Arc};

use caisson_agent_api::{FILES_PORT, POWER_PORT, RPC_PORT, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::console::complain;

/// A connection of either kind.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Where connections come from.
#[derive(Debug)]
pub(crate) enum Listener {
    /// The host, by vsock.
    Vsock(VsockListener),
    /// A test, by a socket file.
    #[cfg(feature = "component-test")]
    Unix(tokio::net::UnixListener),
}

impl Listener {
    /// The port of the RPC service.
    pub(crate) fn rpc() -> io::Result<Self> {
        Self::vsock(RPC_PORT)
    }

    /// The port of the stdio streams.
    pub(crate) fn streams() -> io::Result<Self> {
        Self::vsock(STREAM_PORT)
    }

    /// The port of shared volumes.
    pub(crate) fn files() -> io::Result<Self> {
        Self::vsock(FILES_PORT)
    }

    /// The port of the power button.
    pub(crate) fn power() -> io::Result<Self> {
        Self::vsock(POWER_PORT)
    }

    fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// A socket file.
    #[cfg(feature = "component-test")]
    pub(crate) fn unix(path: &str) -> io::Result<Self> {
        tokio::net::UnixListener::bind(path).map(Self::Unix)
    }

    async fn accept(&self) -> io::Result<Option<Box<dyn Connection>>> {
        match self {
            Self::Vsock(listener) => {
                let (connection, peer) = listener.accept().await?;
                Ok(is_host(peer.cid()).then(|| Box::new(connection) as Box<dyn Connection>))
            }
            #[cfg(feature = "component-test")]
            Self::Unix(listener) => Ok(Some(Box::new(listener.accept().await?.0))),
        }
    }

    /// Accepts for ever; `serve` is given each connection of the host's.
    pub(crate) async fn run(self, serve: Arc<dyn Fn(Box<dyn Connection>) + Send + Sync>) {
        loop {
            match self.accept().await {
                Ok(Some(connection)) => serve(connection),
                Ok(None) => {}
                Err(error) => {
                    complain(&format!("accepting a connection: {error}"));
                    // Out of descriptors, say: others need the time to give some back.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// Whether a connection from this CID is the host's. A container that gets at vsock after all, through loopback or another VM, is not.
fn is_host(peer: u32) -> bool {
    peer == VMADDR_CID_HOST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_but_the_host_is_served() {
        assert!(is_host(2));
        // The hypervisor's, loopback's, the guest's own and another VM's, and the wildcard.
        for other in [0, 1, 3, 4, VMADDR_CID_ANY] {
            assert!(!is_host(other), "{other}");
        }
    }
}
