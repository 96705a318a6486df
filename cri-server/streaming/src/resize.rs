//! The resize stream: JSON objects with a terminal's width and height, one after the other, cut anyhow.

use bytes::{Buf, Bytes, BytesMut};
use serde_json::{Deserializer, Value};

/// Longest text that is no whole object yet.
const MAX_PENDING: usize = 4096;

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// The stream is no sequence of sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("resize stream is not a sequence of terminal sizes")]
pub(crate) struct Malformed;

/// Collects sizes.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    pending: BytesMut,
}

impl Sizes {
    /// Takes some bytes; answers the newest size that they complete.
    pub(crate) fn take(&mut self, bytes: &Bytes) -> Result<Option<Size>, Malformed> {
        self.pending.extend_from_slice(bytes);
        let mut newest = None;
        let mut values = Deserializer::from_slice(&self.pending).into_iter::<Value>();
        let mut whole = 0;
        loop {
            match values.next() {
                Some(Ok(value)) => {
                    newest = Some(size(&value).ok_or(Malformed)?);
                    whole = values.byte_offset();
                }
                Some(Err(error)) if !error.is_eof() => return Err(Malformed),
                Some(Err(_)) | None => break,
            }
        }
        drop(values);
        self.pending.advance(whole);
        if self.pending.len() > MAX_PENDING {
            return Err(Malformed);
        }
        Ok(newest)
    }
}

fn size(value: &Value) -> Option<Size> {
    let side = |name: &str| match value.get(name) {
        None => Some(0),
        Some(number) => number.as_u64().and_then(|number| u16::try_from(number).ok()),
    };
    value.is_object().then_some(())?;
    Some(Size {
        columns: side("Width")?,
        rows: side("Height")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_newest_size_counts() {
        let mut sizes = Sizes::default();
        let text = Bytes::from_static(b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":30}\n");
        assert_eq!(
            sizes.take(&text),
            Ok(Some(Size {
                columns: 100,
                rows: 30
            }))
        );
    }

    #[test]
    fn what_is_no_size_ends_the_stream() {
        for text in [&b"x"[..], b"{\"Width\":70000}", b"[1]", b"{\"Width\":-1}", b"7 "] {
            assert_eq!(
                Sizes::default().take(&Bytes::copy_from_slice(text)),
                Err(Malformed)
            );
        }
        let long = Bytes::from(vec![b' '; MAX_PENDING + 1]);
        assert_eq!(Sizes::default().take(&long), Err(Malformed));
    }

    proptest! {
        #[test]
        fn sizes_come_out_however_the_text_is_cut(
            wanted in prop::collection::vec((any::<u16>(), any::<u16>()), 1..6),
            cut in 1usize..30,
        ) {
            let text: String = wanted
                .iter()
                .map(|(width, height)| format!("{{\"Width\":{width},\"Height\":{height}}}\n"))
                .collect();
            let mut sizes = Sizes::default();
            let mut last = None;
            for piece in text.as_bytes().chunks(cut) {
                if let Some(size) = sizes.take(&Bytes::copy_from_slice(piece)).unwrap() {
                    last = Some((size.columns, size.rows));
                }
            }
            prop_assert_eq!(last, wanted.last().copied());
        }
    }
}
