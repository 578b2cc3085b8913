//! Compiles the journal's messages with a compiler written in Rust, so that no `protoc` is needed to build.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/journal.proto");
    let descriptors = protox::compile(["proto/journal.proto"], ["proto"])?;
    prost_build::Config::new()
        // By far the largest: every event would take its room.
        .boxed(".felucca.journal.Event.kind.redrive_noted")
        .compile_fds(descriptors)?;
    Ok(())
}
