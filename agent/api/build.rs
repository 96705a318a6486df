//! Compiles the guest protocol without protoc: protox parses, tonic-prost-build generates.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let descriptors = protox::compile(["proto/agent.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_client(cfg!(feature = "client"))
        .build_server(cfg!(feature = "server"))
        .build_transport(false)
        // The daemon journals specifications as it received them; the agent stores nothing.
        .type_attribute(
            ".",
            "#[cfg_attr(feature = \"serde\", derive(serde::Serialize, serde::Deserialize))]",
        )
        // A record of an older daemon lacks what has been added since.
        .message_attribute(".", "#[cfg_attr(feature = \"serde\", serde(default))]")
        .compile_fds(descriptors)?;
    Ok(())
}
