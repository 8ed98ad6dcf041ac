//! Compiles `proto/` with protox: pure Rust, so that building needs no `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../../proto";
    let files = ["coordinator", "raft", "state", "worker"];
    let files = files.map(|name| format!("phalanx/v1/{name}.proto"));
    println!("cargo::rerun-if-changed={root}");
    let descriptors = protox::compile(files, [root])?;
    let mut config = tonic_prost_build::Config::new();
    config.bytes(["."]);
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
