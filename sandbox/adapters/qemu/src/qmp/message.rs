//! What QEMU says on its control socket: cutting bytes into lines, and lines into messages. Pure.

use std::fmt;

use serde_json::Value;

/// Longest line, bytes. The longest honest ones (lists of block nodes) are some tens of KiB.
const LINE_MAX: usize = 1024 * 1024;
const READ_SIZE: usize = 16 * 1024;
/// Longest text of QEMU that goes into an error message, characters.
const REASON_MAX: usize = 1000;

/// One message of the server.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    /// The first one.
    Greeting,
    /// Success.
    Return { id: Option<u64>, value: Value },
    /// Refusal.
    Error {
        id: Option<u64>,
        class: String,
        reason: String,
    },
    /// The event DEVICE_DELETED for a device with an id.
    Unplugged { device: String },
    /// The event STOP: no virtual CPU runs any more.
    Stopped,
    /// Any other event.
    Event,
}

/// The line is no message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed(String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a QMP message: {}", self.0)
    }
}

impl Message {
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Malformed> {
        let mut value: Value = serde_json::from_slice(line).map_err(|e| Malformed(e.to_string()))?;
        let Some(object) = value.as_object_mut() else {
            return Err(Malformed("not an object".into()));
        };
        let id = object.get("id").and_then(Value::as_u64);
        if object.contains_key("QMP") {
            Ok(Self::Greeting)
        } else if let Some(value) = object.remove("return") {
            Ok(Self::Return { id, value })
        } else if let Some(error) = object.get("error") {
            Ok(Self::Error {
                id,
                class: text(error, "class"),
                reason: text(error, "desc"),
            })
        } else if let Some(event) = object.get("event") {
            let device = object
                .get("data")
                .and_then(|data| data.get("device"))
                .and_then(Value::as_str);
            match (event.as_str(), device) {
                (Some("DEVICE_DELETED"), Some(device)) => Ok(Self::Unplugged {
                    device: shorten(device),
                }),
                (Some("STOP"), _) => Ok(Self::Stopped),
                _ => Ok(Self::Event),
            }
        } else {
            Err(Malformed("neither return, error nor event".into()))
        }
    }
}

fn text(object: &Value, key: &str) -> String {
    shorten(
        object
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or("no reason given"),
    )
}

fn shorten(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(REASON_MAX)
        .collect()
}

/// Bytes that were read and not yet taken as lines.
#[derive(Debug, Default)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
    /// How much of `bytes` was read; the rest is room.
    length: usize,
    /// Up to here there is no line feed.
    searched: usize,
}

impl LineBuffer {
    /// Room for the next read; an error when a line has grown too long.
    pub(crate) fn space(&mut self) -> Result<&mut [u8], Malformed> {
        if self.length >= LINE_MAX {
            return Err(Malformed(format!("a line longer than {LINE_MAX} bytes")));
        }
        self.bytes.resize(self.length + READ_SIZE, 0);
        Ok(self.bytes.get_mut(self.length..).unwrap_or_default())
    }

    /// So much of the room was filled.
    pub(crate) fn filled(&mut self, count: usize) {
        self.length = self.length.saturating_add(count).min(self.bytes.len());
    }

    /// The next non-empty line without its end.
    pub(crate) fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let unread = self.bytes.get(self.searched..self.length)?;
            let Some(at) = unread.iter().position(|&byte| byte == b'\n') else {
                self.searched = self.length;
                return None;
            };
            let end = self.searched + at;
            let line = self.bytes.get(..end)?.trim_ascii().to_vec();
            self.bytes.drain(..=end);
            self.length -= end + 1;
            self.searched = 0;
            if !line.is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn feed(buffer: &mut LineBuffer, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let space = buffer.space().unwrap();
            let n = space.len().min(bytes.len());
            space[..n].copy_from_slice(&bytes[..n]);
            buffer.filled(n);
            bytes = &bytes[n..];
        }
    }

    #[test]
    fn messages_of_a_real_qemu_are_understood() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        assert_eq!(Message::parse(greeting), Ok(Message::Greeting));
        assert_eq!(
            Message::parse(br#"{"return": {"fd": 19, "fdset-id": 1000}, "id": 7}"#),
            Ok(Message::Return {
                id: Some(7),
                value: json!({"fd": 19, "fdset-id": 1000})
            })
        );
        assert_eq!(
            Message::parse(br#"{"id": 8, "error": {"class": "GenericError", "desc": "Duplicate nodes"}}"#),
            Ok(Message::Error {
                id: Some(8),
                class: "GenericError".into(),
                reason: "Duplicate nodes".into()
            })
        );
        let deleted = br#"{"timestamp": {"seconds": 1}, "event": "DEVICE_DELETED", "data": {"device": "hot0", "path": "/machine/peripheral/hot0"}}"#;
        assert_eq!(
            Message::parse(deleted),
            Ok(Message::Unplugged {
                device: "hot0".into()
            })
        );
        let inner =
            br#"{"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/hot0/virtio-backend"}}"#;
        assert_eq!(Message::parse(inner), Ok(Message::Event));
        let stop = br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
        assert_eq!(Message::parse(stop), Ok(Message::Stopped));
    }

    #[test]
    fn other_json_is_refused() {
        for line in ["", "[]", "null", "{}", "{\"id\": 1}", "\"QMP\"", "{"] {
            assert!(Message::parse(line.as_bytes()).is_err(), "{line}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(Message::parse(&line));
        }

        #[test]
        fn any_strings_in_messages_are_bounded_and_printable(class in ".*", desc in ".{0,3000}") {
            let line = json!({"error": {"class": class, "desc": desc}, "id": 1}).to_string();
            let Ok(Message::Error { class, reason, .. }) = Message::parse(line.as_bytes()) else {
                return Err(TestCaseError::fail("an error must parse as one"));
            };
            prop_assert!(reason.chars().count() <= REASON_MAX && class.chars().count() <= REASON_MAX);
            prop_assert!(!reason.chars().any(char::is_control));
        }

        #[test]
        fn lines_come_out_as_they_went_in_however_they_were_torn(
            lines in proptest::collection::vec("[a-z]{1,40}", 0..20),
            cuts in proptest::collection::vec(1..30_usize, 1..50),
        ) {
            let stream = lines.iter().map(|line| format!("{line}\r\n")).collect::<String>();
            let mut buffer = LineBuffer::default();
            let mut heard = Vec::new();
            let mut rest = stream.as_bytes();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                feed(&mut buffer, now);
                rest = later;
                while let Some(line) = buffer.next_line() {
                    heard.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(heard, lines);
        }
    }
}
