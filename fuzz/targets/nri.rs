//! Whatever an NRI plugin sends: frames and messages, or an error; and what is a message comes out as it went in.
#![no_main]

use caisson_nri::frame::{Demux, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is cut.
    let Some((cut, bytes)) = data.split_first() else {
        return;
    };
    let mut demux = Demux::default();
    for part in bytes.chunks(usize::from(*cut) + 1) {
        demux.push(part);
        loop {
            match demux.next() {
                Ok(Some((lane, message))) => {
                    let mut again = Demux::default();
                    again.push(&encode(lane, &message).unwrap());
                    assert_eq!(again.next(), Ok(Some((lane, message))));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
