# Helpers for daily work; `just` lists them.

default:
    @just --list --unsorted

# What CI runs, from beginning to end.
ci:
    .ci/run

# The quick part of it, before a commit.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --all-features -- -D warnings
    cargo deny check --hide-inclusion-graph bans licenses sources

# Formats everything.
fmt:
    cargo fmt --all

# The tests of one crate: `just test felucca-broker journal`.
test crate *filter:
    cargo test -p {{ crate }} {{ filter }}

# All tests.
test-all:
    cargo test --workspace

# A broker on this machine, its data in ./felucca-data.
serve *flags:
    cargo run --release -p felucca-broker -- serve {{ flags }}

# The sample services on all purchases; `just orders --chaos` kills processes meanwhile.
orders *flags:
    cargo run --release -p order-flow -- {{ flags }}

# Measures the broker, peers and the machine; `just bench --quick W1 --peer felucca --peer redis` a part of it in seconds.
bench *flags:
    cargo build --release -p felucca-broker -p felucca-bench --features felucca-bench/peers
    cargo run --release -p felucca-bench --features peers -- run {{ flags }}

# The documentation of every crate, in a browser.
doc:
    cargo doc --workspace --no-deps --document-private-items --open

# Writes docs/configuration.md from the table of settings.
docs-config:
    UPDATE_DOCS=1 cargo test -p felucca-broker --test documentation

# Regenerates the batches that Apache's Kafka library writes (needs a JDK and Maven).
kafka-fixtures:
    tests/fixtures/kafka/generate.sh tests/fixtures/kafka/data

# Counts instructions of hot work against the baseline; `just instructions --write` makes a new one.
instructions *flags:
    benches/instructions.sh {{ flags }}
