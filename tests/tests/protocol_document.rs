//! `docs/protocol.md` suffices to write a client: `tests/python/client.py`, written from it alone, works with this broker.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use felucca_tests::process::BrokerProcess;

#[test]
fn a_client_written_from_the_document_works() {
    let data = tempfile::tempdir().expect("a directory");
    let broker = BrokerProcess::start(data.path());
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/client.py");
    let output = Command::new("python3")
        .arg(&client)
        .arg(broker.address().to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| match error.kind() {
            ErrorKind::NotFound => panic!("this test needs python3 (3.9 or later) in PATH"),
            _ => panic!("python3 cannot be started: {error}"),
        });
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {}\n{stdout}{stderr}", client.display(), output.status);
    assert_eq!(stdout.trim_end(), "ok", "{stderr}");
}
