//! Whatever bytes arrive, they are a message or an error.
#![no_main]

use caisson_vmm_api::{
    control::{Reply, Request},
    exit::ExitRecord,
    spec::{Started, VmSpec},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = Request::decode(data) {
        assert_eq!(Request::decode(&request.encode().unwrap()).unwrap(), request);
    }
    if let Ok(reply) = Reply::decode(data) {
        drop(reply.encode());
    }
    if let Ok(spec) = VmSpec::decode(data) {
        assert!(spec.problems().is_empty());
    }
    drop(ExitRecord::decode(data));
    let _ = Started::parse(&String::from_utf8_lossy(data));
});
