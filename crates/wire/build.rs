//! Compiles `proto/` with protox: pure Rust, so that building needs no `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../../proto";
    let files = ["phalanx/v1/coordinator.proto", "phalanx/v1/worker.proto"];
    println!("cargo::rerun-if-changed={root}");
    let descriptors = protox::compile(files, [root])?;
    let mut config = tonic_prost_build::Config::new();
    config.bytes(["."]);
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
