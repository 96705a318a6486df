//! The first words on a stream connection: what is wanted, and whether it can be had.

use std::{io, time::Duration};

use caisson_agent_api::{
    STREAM_PORT,
    stream::{Open, Outcome, REPLY_BYTES, Reply},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout},
};

use crate::{GuestError, transport::Route};

/// How long the guest may take to accept the connection, and then the agent to answer an Open: a guest that is busy is slow and not gone, and
/// a port may take ten seconds to accept.
const OPEN_LIMIT: Duration = Duration::from_secs(12);

/// The verb's name in errors.
const VERB: &str = "OpenStream";

/// Opens a stream connection; answers it with the agent's offset when the stream can be had.
pub(crate) async fn open(route: &Route, open: &Open) -> Result<(UnixStream, u64), GuestError> {
    let message = open.encode()?;
    let start = Instant::now();
    let mut stream = route
        .dial(STREAM_PORT, OPEN_LIMIT)
        .await
        .map_err(|reached| route.unreachable(reached, start))?;
    let exchange = async {
        stream.write_all(&message).await?;
        let mut reply = [0; REPLY_BYTES];
        stream.read_exact(&mut reply).await?;
        Ok::<_, io::Error>(reply)
    };
    let reply = match timeout(OPEN_LIMIT, exchange).await {
        Ok(Ok(reply)) => Reply::decode(reply)?,
        Ok(Err(_)) => return Err(GuestError::StreamBroken(open.offset)),
        Err(_) => {
            return Err(GuestError::Deadline {
                verb: VERB,
                limit: OPEN_LIMIT,
            });
        }
    };
    let refused = |code, message: &str| GuestError::Agent {
        verb: VERB,
        code,
        message: message.to_owned(),
    };
    match reply.outcome {
        Outcome::Accepted => Ok((stream, reply.offset)),
        Outcome::NotFound => Err(refused(tonic::Code::NotFound, "no such stream")),
        Outcome::OffsetUnavailable => Err(GuestError::OffsetUnavailable {
            wanted: open.offset,
            lowest: reply.offset,
        }),
        Outcome::Malformed => Err(refused(tonic::Code::InvalidArgument, "malformed open message")),
        // The errno is the guest's word: one that is none becomes a reason all the same.
        Outcome::Refused => Err(GuestError::PortRefused(io::Error::from_raw_os_error(
            i32::try_from(reply.offset).unwrap_or(i32::MAX),
        ))),
    }
}
