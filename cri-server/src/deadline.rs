//! A client's own deadline for a call (`grpc-timeout`, the gRPC protocol over HTTP/2): past it, the answer is DEADLINE_EXCEEDED.
//!
//! The server library below has the same deadline and answers CANCELLED, which says that the client took its call back. So ours ends a
//! moment earlier. What the call had begun goes on where a handler has handed it over.

use std::{future::Future, time::Duration};

use http::{HeaderMap, Response};
use tonic::body::Body;

use crate::status;

const HEADER: &str = "grpc-timeout";

/// How much earlier than the library's this deadline is: one tick of its clock.
const HEAD_START: Duration = Duration::from_millis(1);

/// The deadline that a request names; one that makes no sense is none.
#[must_use]
pub fn of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(HEADER)?.to_str().ok()?;
    let (amount, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if amount.is_empty() || amount.len() > 8 || !amount.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = amount.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// The answer of `call`, or that its time is up.
pub async fn within<E>(
    limit: Option<Duration>,
    call: impl Future<Output = Result<Response<Body>, E>>,
) -> Result<Response<Body>, E> {
    let Some(limit) = limit else { return call.await };
    match tokio::time::timeout(limit.saturating_sub(HEAD_START), call).await {
        Ok(answer) => answer,
        Err(_) => Ok(status::deadline_passed(limit).into_http()),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn header(text: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, text.parse().unwrap());
        of(&headers)
    }

    #[test]
    fn every_unit_is_read_and_nonsense_is_no_deadline() {
        assert_eq!(header("1m"), Some(Duration::from_millis(1)));
        assert_eq!(header("2S"), Some(Duration::from_secs(2)));
        assert_eq!(header("3M"), Some(Duration::from_secs(180)));
        assert_eq!(header("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(header("7u"), Some(Duration::from_micros(7)));
        assert_eq!(header("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for nonsense in ["", "m", "1", "1x", "-1m", "+1m", "123456789S", "1 m"] {
            assert_eq!(header(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(of(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn a_call_that_takes_longer_answers_that_its_time_is_up() {
        let late = std::future::pending::<Result<Response<Body>, Infallible>>();
        let Ok(answer) = within(Some(Duration::from_millis(1)), late).await;
        // DEADLINE_EXCEEDED.
        assert_eq!(answer.headers()["grpc-status"], "4");
        let Ok(answer) = within(None, async {
            Ok::<_, Infallible>(Response::new(Body::default()))
        })
        .await;
        assert!(!answer.headers().contains_key("grpc-status"));
    }
}
