//! `felucca work`: real commands on the records of a real broker.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![expect(clippy::disallowed_methods, reason = "these tests wait for other processes")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use felucca_tests::process::{BrokerProcess, felucca_binary};
use serde_json::Value;

struct Queue {
    broker: BrokerProcess,
    dir: tempfile::TempDir,
}

impl Queue {
    /// A topic `t` of one partition with these records, one per line, and a share group `g` on it.
    fn new(lines: &str, config: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let queue = Self { broker: BrokerProcess::start(&dir.path().join("data")), dir };
        queue.ok(&["topic", "create", "t", "--partitions", "1"]);
        let mut create = vec!["group", "create", "g", "--share", "--topic", "t"];
        config.iter().for_each(|setting| create.extend(["--config", setting]));
        queue.ok(&create);
        queue.produce(lines);
        queue
    }

    fn produce(&self, lines: &str) {
        let file = self.dir.path().join("lines");
        std::fs::write(&file, lines).unwrap();
        let file = file.to_str().unwrap();
        self.ok(&["produce", "t", "--file", file, "--key-separator", ":", "--header", "trace-id=x1"]);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(felucca_binary());
        command
            .args(arguments)
            .env("FELUCCA_BROKER", self.broker.address().to_string())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn work(&self, exec: &str, more: &[&str]) -> Command {
        let mut arguments = vec!["work", "t", "--share-group", "g", "--output", "json", "--exec", exec];
        arguments.extend(more);
        self.command(&arguments)
    }

    /// The counts of the group's one partition.
    fn counts(&self) -> Value {
        let group = self.ok(&["group", "describe", "g", "--output", "json"]);
        let group: Value = serde_json::from_str(&group).unwrap();
        let mut partitions = group["partitions"].as_array().unwrap().iter();
        partitions.find(|partition| partition["topic"] == "t").unwrap().clone()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The last line of standard error: the counts.
fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_str(text(&output.stderr).lines().next_back().unwrap()).unwrap()
}

fn signal(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

fn appears(path: &Path) {
    let since = Instant::now();
    while !path.exists() {
        assert!(since.elapsed() < Duration::from_secs(20), "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_command_has_the_value_on_its_input_and_the_rest_in_its_environment() {
    let queue = Queue::new("k1:one\nk2:two\n", &["ordering=key"]);
    let command = "echo \"$(cat) $FELUCCA_RECORD_TOPIC/$FELUCCA_RECORD_PARTITION/$FELUCCA_RECORD_OFFSET \
                   $FELUCCA_RECORD_KEY $FELUCCA_HEADER_TRACE_ID $FELUCCA_RECORD_DELIVERY_COUNT\"; \
                   test -n \"$FELUCCA_RECORD_LEASE\" && test \"$FELUCCA_RECORD_TIMESTAMP\" -gt 1000";
    let output = queue.work(command, &["--until-empty"]).output().unwrap();
    assert_eq!(report(&output)["acked"], 2);
    assert_eq!(text(&output.stdout), "one t/0/0 k1 x1 1\ntwo t/0/1 k2 x1 1\n");
    assert_eq!(queue.counts()["acked"], 2);
}

#[test]
fn the_end_of_a_command_acks_rejects_or_has_its_record_tried_again() {
    let queue =
        Queue::new("a:0\nb:65\nc:75\nd:3\ne:kill\nf:127\n", &["backoff-initial=100ms", "max-failures=2"]);
    // The second time all that failed succeeds, but for `d`.
    let command = "read v; echo asked for $v >&2; [ $FELUCCA_RECORD_DELIVERY_COUNT = 2 ] && [ $v != 3 ] && exit 0; \
                   [ $v = kill ] && kill -9 $$; exit $v";
    let output = queue.work(command, &["--until-empty", "--concurrency", "2"]).output().unwrap();
    let report = report(&output);
    let counts = ["acked", "rejected", "nacked"].map(|count| report[count].as_u64().unwrap());
    assert_eq!(counts, [4, 1, 5], "{}", text(&output.stderr));
    let letters = queue.ok(&["dlq", "show", "dlq.g.t", "--output", "json"]);
    let mut letters: Vec<Value> = letters.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    letters.sort_by_key(|letter| letter["key"].to_string());
    let header = |letter: &Value, name: &str| {
        let mut headers = letter["headers"].as_array().unwrap().iter();
        headers.find(|header| header["name"] == format!("__dlq.errors.{name}")).unwrap()["value"].clone()
    };
    assert_eq!(letters.len(), 2);
    for (letter, key, class, reason) in
        [(&letters[0], "b", "exit-65", "asked for 65"), (&letters[1], "d", "exit-3", "asked for 3")]
    {
        assert_eq!(letter["key"], key);
        assert_eq!((header(letter, "class"), header(letter, "message")), (class.into(), reason.into()));
    }
}

#[test]
fn a_lease_is_extended_while_the_command_runs() {
    let queue = Queue::new("a:1\n", &["lease=1s"]);
    let output = queue.work("sleep 3", &["--count", "1"]).output().unwrap();
    assert_eq!(report(&output)["acked"], 1);
    let counts = queue.counts();
    assert_eq!(
        (&counts["acked"], &counts["failures"], &counts["deliveries"]),
        (&1.into(), &0.into(), &1.into())
    );
}

#[test]
fn counted_records_are_all_that_is_taken() {
    let queue = Queue::new("a:1\nb:2\nc:3\nd:4\ne:5\n", &[]);
    let output = queue.work("cat", &["--count", "3", "--concurrency", "2"]).output().unwrap();
    assert_eq!(report(&output)["acked"], 3);
    let counts = queue.counts();
    assert_eq!((&counts["acked"], &counts["leased"], &counts["failures"]), (&3.into(), &0.into(), &0.into()));
}

#[test]
fn a_command_that_does_not_exist_ends_the_tool_and_costs_no_record_an_attempt() {
    let queue = Queue::new("a:1\nb:2\n", &["max-failures=1"]);
    let output = queue.work("no-such-command-anywhere", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("error: the command cannot be run: ") && said.contains("not found"), "{said}");
    let counts = queue.counts();
    assert_eq!((&counts["failures"], &counts["leased"], &counts["lag"]), (&0.into(), &0.into(), &2.into()));
}

#[test]
fn a_signal_lets_running_commands_finish_and_releases_the_rest() {
    let queue = Queue::new("a:1\nb:2\nc:3\n", &[]);
    let child = queue.work("touch began; sleep 1; echo finished", &[]).spawn().unwrap();
    appears(&queue.path("began"));
    signal(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!((report(&output)["acked"].as_u64(), text(&output.stdout)), (Some(1), "finished\n".to_owned()));
    let counts = queue.counts();
    assert_eq!((&counts["leased"], &counts["failures"], &counts["lag"]), (&0.into(), &0.into(), &2.into()));
}

#[test]
fn a_second_signal_stops_running_commands_too_and_their_records_are_tried_again() {
    let queue = Queue::new("a:1\n", &[]);
    let since = Instant::now();
    let child = queue.work("touch began; sleep 60", &[]).spawn().unwrap();
    appears(&queue.path("began"));
    signal(&child);
    std::thread::sleep(Duration::from_millis(300));
    signal(&child);
    let output = child.wait_with_output().unwrap();
    assert!(since.elapsed() < Duration::from_secs(30));
    assert_eq!(report(&output)["nacked"], 1);
    assert_eq!(queue.counts()["scheduled"], 1);
}

#[test]
fn a_group_with_other_topics_or_of_another_kind_is_refused() {
    let queue = Queue::new("a:1\n", &[]);
    queue.ok(&["topic", "create", "u", "--partitions", "1"]);
    queue.ok(&["group", "create", "two", "--share", "--topic", "t", "--topic", "u"]);
    for (group, said) in [("two", "works through topic u too"), ("none", "none")] {
        let output = queue.command(&["work", "t", "--share-group", group, "--exec", "cat"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(said), "{}", text(&output.stderr));
    }
    let output = queue.command(&["work", "u", "--share-group", "g", "--exec", "cat"]).output().unwrap();
    assert!(text(&output.stderr).contains("does not work through topic u"), "{}", text(&output.stderr));
}
