//! Whatever a streaming client sends: frames and header blocks, or an error; the same however the bytes are cut, and what is a frame
//! comes out as it went in.
#![no_main]

use bytes::BytesMut;
use caisson_streaming::spdy::{
    frame::{Decoder, Frame},
    headers::{Deflater, Inflater},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is cut.
    let Some((cut, bytes)) = data.split_first() else {
        return;
    };
    let whole = frames([bytes].into_iter());
    let parts = frames(bytes.chunks(usize::from(*cut) + 1));
    assert_eq!(whole, parts);
    let mut inflater = Inflater::default();
    for frame in whole {
        comes_out_as_it_went_in(&frame);
        let (Frame::SynStream { block, .. } | Frame::SynReply { block, .. } | Frame::Headers { block, .. }) = frame else {
            continue;
        };
        let Ok(headers) = inflater.read(&block) else {
            return;
        };
        let again = Deflater::new().unwrap().write(&headers).unwrap();
        assert_eq!(Inflater::default().read(&again), Ok(headers));
    }
});

/// Up to the first error; pieces of one data frame are joined, for they may be cut anywhere.
fn frames<'a>(parts: impl Iterator<Item = &'a [u8]>) -> Vec<Frame> {
    let mut decoder = Decoder::default();
    let mut input = BytesMut::new();
    let mut found: Vec<Frame> = Vec::new();
    for part in parts {
        input.extend_from_slice(part);
        loop {
            match decoder.next(&mut input) {
                Ok(Some(frame)) => join(&mut found, frame),
                Ok(None) => break,
                Err(_) => return found,
            }
        }
    }
    found
}

fn join(found: &mut Vec<Frame>, frame: Frame) {
    if let (
        Some(Frame::Data {
            stream: open,
            fin: last,
            bytes: before,
        }),
        Frame::Data { stream, fin, bytes },
    ) = (found.last_mut(), &frame)
        && open == stream
        && !*last
    {
        *before = [before.as_ref(), bytes].concat().into();
        *last = *fin;
    } else {
        found.push(frame);
    }
}

fn comes_out_as_it_went_in(frame: &Frame) {
    let mut wire = BytesMut::new();
    if frame.encode(&mut wire) {
        let again = frames([wire.as_ref()].into_iter());
        // A data frame without bytes and without an end says nothing, and is none.
        let silent = matches!(frame, Frame::Data { bytes, fin: false, .. } if bytes.is_empty());
        assert!(again.as_slice() == std::slice::from_ref(frame) || silent && again.is_empty(), "{frame:?} {again:?}");
    }
}
