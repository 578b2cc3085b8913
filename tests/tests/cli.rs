//! The `felucca` command as programs and people use it: real processes, their output and exit codes.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use felucca_tests::process::{BrokerProcess, felucca_binary};
use serde_json::{Value, json};

/// What a finished command left behind.
struct Done {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Done {
    fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
    }

    fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// Failed with this code, and said so.
    fn refused(&self, code: i32, said: &str) {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        assert!(self.stderr.starts_with("error: ") && self.stderr.contains(said), "{}", self.stderr);
    }
}

struct Shell {
    broker: BrokerProcess,
    data: tempfile::TempDir,
}

impl Shell {
    fn new() -> Self {
        let data = tempfile::tempdir().expect("a directory");
        Self { broker: BrokerProcess::start(data.path()), data }
    }

    fn spawn(&self, line: &str) -> Child {
        command(line)
            .env("FELUCCA_BROKER", self.broker.address().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts")
    }

    fn run(&self, line: &str) -> Done {
        self.run_with(line, b"")
    }

    fn run_with(&self, line: &str, input: &[u8]) -> Done {
        let mut child = self.spawn(line);
        let mut stdin = child.stdin.take().expect("piped");
        let input = input.to_vec();
        // A command that refuses its arguments does not read its input.
        let writer = std::thread::spawn(move || stdin.write_all(&input).is_ok());
        let done = finish(child);
        writer.join().expect("the input is written");
        done
    }
}

fn command(line: &str) -> Command {
    let mut command = Command::new(felucca_binary());
    command.args(line.split_whitespace());
    command
}

fn finish(child: Child) -> Done {
    let output = child.wait_with_output().expect("the command ends");
    Done {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal the command");
}

#[test]
fn records_come_back_as_they_went_in() {
    let shell = Shell::new();
    shell.run("topic create orders --partitions 4").ok();
    let acked = shell
        .run_with(
            "produce orders --key-separator : --header source=test --output json",
            b"a:1\nb:x:y\na:\nc:\xff\xfe\nd:last",
        )
        .ok()
        .lines();
    assert_eq!(acked.len(), 5);
    assert!(acked.iter().all(|line| line["ack"] == "synced" && line["timestamp"].is_i64()), "{acked:?}");
    assert_eq!(acked[0]["partition"], acked[2]["partition"], "one key, one partition");
    assert!(acked[0]["offset"].as_u64() < acked[2]["offset"].as_u64(), "{acked:?}");

    let read = shell.run("consume orders").ok().lines();
    assert_eq!(read.len(), 5);
    let text = read.iter().find(|line| line["key"] == "a").unwrap();
    let members: Vec<&str> = text.as_object().unwrap().keys().map(String::as_str).collect();
    let mut wanted = ["topic", "partition", "offset", "timestamp", "key", "value", "headers"];
    wanted.sort_unstable();
    assert_eq!(members, wanted, "in whatever order the parser keeps");
    // Each record is where its acknowledgement said, with what the line held.
    for (acked, (key, value)) in
        acked.iter().zip([("a", "1"), ("b", "x:y"), ("a", ""), ("c", "//4="), ("d", "last")])
    {
        let record = read
            .iter()
            .find(|line| line["partition"] == acked["partition"] && line["offset"] == acked["offset"])
            .expect("an acknowledged record is there");
        assert_eq!((&record["key"], &record["value"]), (&key.into(), &value.into()));
        assert_eq!(record["timestamp"], acked["timestamp"]);
        assert_eq!(record["headers"], serde_json::json!([{"name": "source", "value": "test"}]));
        let encoding = record.get("value_encoding").and_then(Value::as_str);
        assert_eq!(encoding, (key == "c").then_some("base64"));
    }
}

#[test]
fn an_offset_beyond_the_end_is_refused() {
    let shell = Shell::new();
    shell.run("topic create orders --partitions 1").ok();
    shell.run_with("produce orders", b"one\ntwo").ok();
    assert_eq!(shell.run("consume orders --from offset:2").ok().stdout, "");
    shell.run("consume orders --from offset:99").refused(1, "offset 99 is beyond the end of topic orders");
}

#[test]
fn acknowledgements_are_printed_while_the_input_is_still_open() {
    let shell = Shell::new();
    shell.run("topic create orders").ok();
    let mut child = shell.spawn("produce orders --output json");
    let mut input = child.stdin.take().expect("piped");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    for offset in 0..3 {
        writeln!(input, "line {offset}").unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let acked: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(acked["offset"], offset);
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_line_that_cannot_be_sent_ends_the_input_and_is_named() {
    let shell = Shell::new();
    shell.run("topic create orders").ok();
    let done = shell.run_with("produce orders --key-separator : --output json", b"a:1\nno separator\nb:2\n");
    done.refused(1, "line 2");
    assert_eq!(done.lines().len(), 1, "what was sent before is acknowledged");

    let long = vec![b'x'; 1_100_000];
    shell.run_with("produce orders", &long).refused(1, "1048576");
    shell.run_with("produce orders --partition 7", b"x\n").refused(1, "7");
    shell.run_with("produce orders --ack written", b"x\n").refused(1, "allow-written");
    shell.run("produce nowhere").refused(1, "nowhere");
    shell.run("produce orders --file /nonexistent/lines").refused(1, "/nonexistent/lines");
    assert_eq!(shell.run("consume orders").ok().lines().len(), 1);
}

#[test]
fn reading_starts_and_ends_where_it_is_told() {
    let shell = Shell::new();
    shell.run("topic create orders --partitions 2").ok();
    let numbers: String = (0..1000).map(|number| format!("{}:{number}\n", number % 10)).collect();
    shell.run_with("produce orders --key-separator :", numbers.as_bytes()).ok();

    let count = |line: &str| shell.run(line).ok().lines().len();
    assert_eq!(count("consume orders"), 1000);
    assert_eq!(count("consume orders --from end"), 0);
    assert_eq!(count("consume orders --count 7"), 7);
    assert_eq!(count("consume orders --count 0"), 0);
    shell.run("consume orders --from offset:1000000").refused(1, "beyond the end");
    assert_eq!(count("consume orders --from time:2000-01-01T00:00:00Z"), 1000);
    assert_eq!(count("consume orders --from time:2999-01-01T00:00:00Z"), 0);
    let first = count("consume orders --partition 0");
    assert_eq!(first + count("consume orders --partition 1"), 1000);
    assert_eq!(count("consume orders --partition 0 --from offset:10"), first - 10);
    shell.run("consume orders --partition 2").refused(1, "no partition 2");
    shell.run("consume nowhere").refused(1, "nowhere");

    let table = shell.run("consume orders --output table --count 1").ok().stdout;
    assert_eq!(table.trim_end().split('\t').count(), 5, "{table}");
}

#[test]
fn a_group_goes_on_where_it_stopped() {
    let shell = Shell::new();
    shell.run("topic create orders --partitions 3").ok();
    let numbers: String = (0..300).map(|number| format!("{}:{number}\n", number % 20)).collect();
    shell.run_with("produce orders --key-separator :", numbers.as_bytes()).ok();

    let mut seen: Vec<String> = Vec::new();
    for line in ["consume orders --group readers --count 100", "consume orders --group readers"] {
        let lines = shell.run(line).ok().lines();
        seen.extend(lines.iter().map(|line| line["value"].as_str().unwrap().to_owned()));
    }
    assert_eq!(seen.len(), 300, "each record once over both runs");
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 300);
    assert_eq!(shell.run("consume orders --group readers").ok().lines().len(), 0);

    let described = shell.run("group describe readers --output json").ok().lines().remove(0);
    assert_eq!((&described["kind"], &described["lag"]), (&"consumer".into(), &0.into()));
    shell.run("group seek readers --topic orders --to beginning").ok();
    assert_eq!(shell.run("consume orders --group readers").ok().lines().len(), 300);
    shell.run("group delete readers").ok();
    shell.run("group describe readers").refused(1, "readers");
}

#[test]
fn a_share_group_is_made_altered_kicked_and_shown_with_every_count() {
    let shell = Shell::new();
    shell.run("topic create orders").ok();
    shell.run_with("produce orders", b"one\ntwo").ok();
    let settings = "--config ordering=key --config max-failures=5 --config class.io.max-failures=3";
    shell.run(&format!("group create pay --share --topic orders {settings}")).ok();
    shell.run("group alter pay --config jitter=0 --config on-exhausted=hold --config lease=45s").ok();
    shell.run("group alter pay --config jitter=2").refused(1, "from 0 to 1");
    shell.run("group alter pay --config max-fails=2").refused(1, "max-failures");
    let kicked = shell.run("group kick pay --topic orders --output json").ok().lines().remove(0);
    assert_eq!((&kicked["group"], &kicked["records"]), (&"pay".into(), &0.into()));
    shell.run("group kick pay --topic elsewhere").refused(1, "elsewhere");
    let shown = shell.run("group describe pay --output json").ok().lines().remove(0);
    let counts = [
        ("lag", 2),
        ("available", 2),
        ("leased", 0),
        ("scheduled", 0),
        ("held", 0),
        ("exhausted", 0),
        ("parked", 0),
        ("acked", 0),
        ("dead_lettered", 0),
        ("discarded", 0),
        ("skipped", 0),
        ("expired", 0),
        ("deliveries", 0),
        ("failures", 0),
    ];
    for (name, count) in counts {
        assert_eq!(shown[name], count, "{name}");
        assert!(shown["partitions"][0][name].is_u64(), "{name} of a partition");
    }
    assert!(shown["oldest_unsettled_ms"].is_u64() && shown["outage"].is_null());
    for (key, value) in [("lease", "45s"), ("on-exhausted", "hold"), ("outage-guard", "on")] {
        assert_eq!(shown["config"][key], value);
    }
    assert_eq!(shown["config"]["class.io.max-failures"], "3");
}

#[test]
fn following_shows_new_records_and_ends_well_on_a_signal() {
    let shell = Shell::new();
    shell.run("topic create orders").ok();
    let mut child = shell.spawn("consume orders --follow --group followers");
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    for value in ["one", "two"] {
        shell.run_with("produce orders", value.as_bytes()).ok();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["value"], value);
    }
    terminate(&child);
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    let done = finish(child);
    assert_eq!((done.code, rest.as_str()), (Some(0), ""), "{}", done.stderr);
    assert_eq!(
        shell.run("consume orders --group followers").ok().lines().len(),
        0,
        "what was shown is committed"
    );
}

#[test]
fn a_reader_that_goes_away_ends_a_command_quietly() {
    let shell = Shell::new();
    shell.run("topic create orders").ok();
    let lines: String = (0..200_000).map(|number| format!("{number}\n")).collect();
    shell.run_with("produce orders", lines.as_bytes()).ok();
    for line in ["consume orders", "consume orders --output table", "produce orders --output json"] {
        let mut child = shell.spawn(line);
        let mut input = child.stdin.take().expect("piped");
        let lines = lines.clone();
        let writer = std::thread::spawn(move || input.write_all(lines.as_bytes()).is_ok());
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        output.read_line(&mut String::new()).unwrap();
        drop(output);
        let done = finish(child);
        assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{line}");
        writer.join().unwrap();
    }
}

#[test]
fn topics_and_groups_are_managed() {
    let shell = Shell::new();
    shell.run("topic create orders --partitions 3 --config segment.bytes=1MiB").ok();
    shell.run("topic create orders").refused(1, "exists");
    shell.run("topic create other --config segment-byte=1MiB").refused(1, "segment.bytes");
    shell.run("topic create bad/name").refused(1, "bad/name");
    shell.run("topic alter orders --config allow-written=true").ok();
    shell.run_with("produce orders --ack written --output json", b"x\n").ok();
    let topic = shell.run("topic describe orders --output json").ok().lines().remove(0);
    assert_eq!(topic["config"]["segment.bytes"], "1048576");
    assert_eq!(topic["config"]["allow-written"], "true");
    assert_eq!(topic["offsets"].as_array().unwrap().len(), 3);

    shell.run("group create payment --topic orders").refused(2, "--share");
    shell.run("group create payment --share --topic orders --config lease=5s --from end").ok();
    shell.run("group create payment --share --topic orders").refused(1, "exists");
    shell.run("group pause payment").ok();
    let group = shell.run("group describe payment --output json").ok().lines().remove(0);
    assert_eq!((&group["kind"], &group["paused"], &group["lag"]), (&"share".into(), &true.into(), &0.into()));
    shell.run("group resume payment").ok();
    shell.run("group alter payment --config lease=7s").ok();
    shell.run("group seek payment --topic orders --to beginning").ok();
    let group = shell.run("group describe payment --output json").ok().lines().remove(0);
    assert_eq!((&group["config"]["lease"], &group["lag"]), (&"7s".into(), &1.into()));
    assert_eq!(shell.run("group list --output json").ok().lines()[0][0]["group"], "payment");
    assert!(shell.run("group describe payment").ok().stdout.contains("config lease=7s"));

    let letters = shell.run("dlq list --output json").ok().lines();
    assert_eq!(letters[0][0]["topic"], "dlq.payment.orders");
    shell.run("dlq show dlq.payment.orders").ok();
    shell.run("dlq show orders").refused(1, "dlq list");
    shell.run("dlq redrive dlq.payment.orders").ok();
    shell.run("dlq redrive dlq.nobody.orders").refused(1, "dlq list");
    shell.run("dlq purge --group payment").ok();
    shell.run("dlq redrive").refused(2, "--group");

    shell.run("group delete payment").ok();
    shell.run("topic delete orders").ok();
    shell.run("topic describe orders").refused(1, "orders");
}

#[test]
fn the_broker_says_how_it_is() {
    let shell = Shell::new();
    let status = &shell.run("status --output json").ok().lines()[0];
    assert_eq!((&status["condition"], &status["reason"]), (&json!("ok"), &json!("")));
    assert!(status["disk_available_bytes"].as_u64() > status["disk_low_water_bytes"].as_u64(), "{status}");
    assert_eq!((&status["damaged_ranges"], &status["damaged"]), (&json!(0), &json!([])));
    let text = shell.run("status").ok().stdout;
    for part in ["condition   ok", "GiB available", "checkpoint  before this run", "damaged     0 ranges"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_broker_that_is_not_there_is_told_apart() {
    felucca_binary();
    let started = std::time::Instant::now();
    let done = finish(
        command("topic list --broker 127.0.0.1:1 --timeout 300ms")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    done.refused(3, "127.0.0.1:1");
    assert!(started.elapsed().as_secs() < 8, "well before the default of 10 s");
}

fn refused_start(arguments: &str, environment: &[(&str, &str)], data: &Path) -> String {
    let child = command("serve --listen 127.0.0.1:0")
        .arg("--data-dir")
        .arg(data)
        .args(arguments.split_whitespace())
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let done = finish(child);
    assert!(matches!(done.code, Some(1 | 2)), "{:?} {}", done.code, done.stderr);
    assert_eq!(done.stdout, "");
    done.stderr
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let data = tempfile::tempdir().unwrap();
    let config = data.path().join("felucca.toml");
    std::fs::write(&config, "[journal]\nsync-intervall = \"1s\"\n").unwrap();
    let with_config = format!("--config {}", config.display());
    for (arguments, environment, said) in [
        ("--max-connections 0", None, "from 1 to 1000000"),
        ("--sesion-timeout 5s", None, "--session-timeout"),
        ("", Some(("FELUCCA_SERVER_OPEN_FILE", "20")), "FELUCCA_SERVER_OPEN_FILES"),
        ("--config /nonexistent.toml", None, "/nonexistent.toml"),
        (&with_config, None, "journal.sync-interval"),
    ] {
        let environment: Vec<_> = environment.into_iter().collect();
        let stderr = refused_start(arguments, &environment, &data.path().join("data"));
        assert!(stderr.contains(said), "{arguments}: {stderr}");
    }
    let child =
        command("serve --listen 0.0.0.0:0").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    finish(child).refused(1, "--insecure");

    let shell = Shell::new();
    let stderr = refused_start("", &[], shell.data.path());
    assert!(stderr.contains(&shell.broker.id().to_string()), "a locked directory names its owner: {stderr}");
}

#[test]
fn files_are_looked_into_without_a_broker() {
    let shell = Shell::new();
    shell.run("topic create orders --config segment.bytes=64KiB").ok();
    let lines: String = (0..20_000).map(|number| format!("record number {number}\n")).collect();
    shell.run_with("produce orders", lines.as_bytes()).ok();
    let Shell { broker, data } = shell;
    assert!(broker.stop());
    let offline = |line: &str| {
        let child = command(line).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        finish(child.expect("the command starts"))
    };
    let dir = data.path().display();

    let frames = offline(&format!("journal dump --data-dir {dir} --events --output json")).ok().lines();
    let text = offline(&format!("journal dump --data-dir {dir} --events")).ok().stdout;
    for event in ["TopicCreated", "Appended", "Booted", "Stopped"] {
        assert!(text.contains(event), "{event}");
    }
    let batches = frames.iter().filter_map(|frame| frame["batches"].as_array()).flatten();
    let records: u64 = batches.map(|batch| batch["records"].as_u64().unwrap()).sum();
    assert_eq!(records, 20_000);

    let verified = offline(&format!("log verify --data-dir {dir} --output json")).ok().lines();
    let (checkpoints, segments): (Vec<_>, Vec<_>) = verified.into_iter().partition(|one| one["lsn"].is_u64());
    assert_eq!(checkpoints.len(), 1, "{checkpoints:?}");
    assert!(segments.len() > 2, "{} segments", segments.len());
    let records: u64 = segments.iter().map(|segment| segment["records"].as_u64().unwrap()).sum();
    assert_eq!(records, 20_000);
    let file = segments[0]["file"].as_str().unwrap();
    let first = offline(&format!("log dump {file} --output json")).ok().lines().remove(0);
    assert_eq!((&first["base_offset"], &first["position"]), (&0.into(), &0.into()));
    let record = offline(&format!("log dump {file} --records --output json")).ok().lines().remove(0);
    assert_eq!(record["value"], "record number 0");

    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
    let done = offline(&format!("log verify --data-dir {dir}"));
    done.refused(1, "1 segment is damaged");
    assert!(done.stdout.contains(&format!("DAMAGED  {file}: position ")), "{}", done.stdout);
    offline("log dump /nonexistent/file.log").refused(1, "/nonexistent/file.log");
    offline("journal dump --data-dir /nonexistent").refused(1, "/nonexistent/journal");
}

#[test]
fn completions_are_printed_for_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let child =
            command(&format!("completions {shell}")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let done = finish(child.unwrap()).ok();
        assert!(done.stdout.contains("redrive"), "{shell}");
    }
}

/// Runs the shell commands of README.md's example, word for word, but for the installation.
#[test]
fn the_readme_example_works() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let (_, rest) = readme.split_once("```console\n").expect("the example");
    let (example, _) = rest.split_once("```").expect("its end");
    let commands: Vec<&str> = example
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .filter(|line| !line.starts_with("cargo "))
        .collect();
    assert!(commands.len() >= 5, "{commands:?}");

    // The example has the default port; a test has one that is free.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let directory = tempfile::tempdir().unwrap();
    let bin = felucca_binary().parent().expect("its directory");
    let path = std::env::join_paths(
        std::iter::once(bin.to_owned())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    );
    let script = format!("set -e\ntrap 'kill $!' EXIT\n{}\n", commands.join("\n"));
    let child = Command::new("sh")
        .args(["-c", &script])
        .current_dir(directory.path())
        .env("PATH", path.unwrap())
        .env("FELUCCA_BROKER", &address)
        .env("FELUCCA_SERVER_LISTEN", &address)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let done = finish(child).ok();
    assert!(done.stdout.contains(&format!("listening on {address}")), "{}", done.stdout);
    assert!(
        done.stdout.contains(r#""key":"customer-1","value":"two books","headers":[]}"#),
        "{}",
        done.stdout
    );
    assert!(done.stdout.contains("config ordering=key"), "{}", done.stdout);
}
