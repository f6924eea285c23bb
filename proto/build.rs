//! Compiles the `.proto` files with protox (pure Rust), so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/worker.proto",
        "proto/cluster.proto",
        "proto/state.proto",
        "proto/raft.proto",
        "proto/files.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
