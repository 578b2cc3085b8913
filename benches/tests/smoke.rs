//! Every measurement, as short as possible, against a broker in this process: that it works and has figures, not what they
//! are.

use std::time::Duration;

use felucca_bench::peer::{Peer, Programs};
use felucca_bench::report::{Sink, table};
use felucca_bench::run::{Effort, Run};
use felucca_bench::server::Launcher;
use felucca_bench::workload::Workload;
use felucca_broker::server::Server;
use felucca_broker::settings::ServerSettings;

/// Less than `--quick`: unoptimised code on a busy machine is slow enough.
const EFFORT: Effort = Effort {
    longest: Duration::from_millis(300),
    longest_warm_up: Duration::from_millis(100),
    shortest: Duration::ZERO,
    most_records: 20_000,
    most_bytes: 64 << 20,
    most_starts: 1,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_standard_workload_has_figures() {
    let directory = tempfile::tempdir().unwrap();
    let settings = ServerSettings {
        data_dir: directory.path().join("data"),
        // Groups can be deleted so soon after their members have gone.
        session_timeout: Duration::from_secs(1),
        listen: "127.0.0.1:0".parse().unwrap(),
        ..ServerSettings::default()
    };
    let server = Server::start(settings).await.unwrap();
    let programs =
        Programs { felucca: directory.path().join("absent"), folder: directory.path().join("absent") };
    let launcher = Launcher::new(programs, directory.path()).unwrap();
    let run = Run {
        workloads: [Workload::standard(false).unwrap(), Workload::standard(true).unwrap()].concat(),
        peers: vec![Peer::Felucca],
        launcher: launcher.with_running(server.local_addr().to_string()),
        effort: EFFORT,
        repetitions: 1,
        // They have a test of their own.
        limits: false,
        client_threads: 1,
        longest: Duration::MAX,
        data_dir: directory.path().to_path_buf(),
    };
    let sink = tokio::task::spawn_blocking(move || {
        let mut sink = Sink::memory();
        run.measure(&mut sink).map(|_| sink)
    });
    let sink = sink.await.unwrap().unwrap();
    server.shutdown().await;

    for name in ["W1", "W2", "W3", "W4", "W5", "W6", "W7", "raw-blocks", "raw-singles"] {
        assert!(sink.rows().iter().any(|row| row.workload == name), "{name}");
    }
    for row in sink.rows() {
        assert!(row.records.is_some_and(|records| records > 0), "{row:?}");
        assert!(row.client_cpu_s.is_some(), "{row:?}");
    }
    // One line each, and two of heading.
    assert_eq!(table(sink.rows()).lines().count(), sink.rows().len() + 2);
}
