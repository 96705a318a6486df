//! The packet header of virtio 1.2, section 5.10.6.

/// Bytes of a header on the wire.
pub const HEADER_BYTES: usize = 44;

/// Longest payload in either direction, in bytes; the same bound as Linux'.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// The one socket type there is here.
pub const STREAM: u16 = 1;

/// Flags of [`Op::Shutdown`].
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    ReadWrite = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    /// `None` for an operation that the specification does not know.
    #[must_use]
    pub fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header; the fields are those of `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Every sequence of bytes is a header.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut words = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word));
        let mut word = || words.next().unwrap_or_default();
        let mut double = || u64::from(word()) | u64::from(word()) << 32;
        let (src_cid, dst_cid) = (double(), double());
        let (src_port, dst_port, len, kind_and_op) = (word(), word(), word(), word());
        let [k0, k1, o0, o1] = kind_and_op.to_le_bytes();
        Self {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            kind: u16::from_le_bytes([k0, k1]),
            op: u16::from_le_bytes([o0, o1]),
            flags: word(),
            buf_alloc: word(),
            fwd_cnt: word(),
        }
    }

    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let parts: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_its_encoding_and_lies_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 1021,
            len: 64,
            kind: STREAM,
            op: Op::ReadWrite as u16,
            flags: 3,
            buf_alloc: 0x2122_2324,
            fwd_cnt: 0x3132_3334,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), header);
        assert_eq!(bytes[0], 8);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..44], [0x34, 0x33, 0x32, 0x31]);
    }

    #[test]
    fn operations_beyond_the_specification_have_no_name() {
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(8), None);
        for op in 1..=7 {
            assert_eq!(Op::from_wire(op).map(|o| o as u16), Some(op));
        }
    }
}
