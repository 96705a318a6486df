//! Compiles the messages without protoc: protox parses, prost generates. There is no service in them: ttrpc is this crate's own.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/nri.proto", "proto/ttrpc.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .build_transport(false)
        // Plugins compare what they are sent; an order that changes from call to call would look like a change.
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
