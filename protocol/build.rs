//! Compiles the protobuf messages with a compiler written in Rust, so that no `protoc` is needed to build.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/felucca.proto");
    let descriptors = protox::compile(["proto/felucca.proto"], ["proto"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)?;
    Ok(())
}
