//! Share groups at their limits and what each record costs, in the engine alone and at full length:
//! `cargo run --release -p felucca-tests --bin share-bounds [NAME…]`, with the names of parts to run, all by default. What
//! the figures mean is in docs/share-groups.md. Exits with a panic when something is not bounded as it should be.

use std::io::{self, Write};
use std::process::Command;

use felucca_tests::share_bounds::{self as bounds, Load, Window};

/// As the broker has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Part = fn(&mut dyn Write) -> io::Result<()>;

const PARTS: [(&str, Part); 8] = [
    ("limits", limits),
    ("throughput", throughput),
    ("stuck-record", stuck_record),
    ("retry", retry),
    ("stuck-key", stuck_key),
    ("expiry", expiry),
    ("members", members),
    ("idle-groups", idle_groups),
];

fn main() -> io::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let [name] = &wanted[..]
        && let Some((name, run)) = PARTS.into_iter().find(|(known, _)| known == name)
    {
        let mut out = io::stdout().lock();
        writeln!(out, "## {name}")?;
        run(&mut out)?;
        return writeln!(out);
    }
    // Each in a process of its own: resident memory is the process's.
    let all = || PARTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for name in if wanted.is_empty() { all() } else { wanted } {
        if PARTS.iter().all(|(known, _)| *known != name) {
            return Err(io::Error::other(format!(
                "no part {name:?}; there are {:?}",
                PARTS.map(|(name, _)| name)
            )));
        }
        let status = Command::new(std::env::current_exe()?).arg(&name).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("{name}: {status}")));
        }
    }
    Ok(())
}

fn limits(out: &mut dyn Write) -> io::Result<()> {
    bounds::a_full_table_stops_new_records_only();
    bounds::a_spent_budget_slows_new_records_down();
    bounds::a_group_goes_on_above_what_was_deleted();
    bounds::frames_stay_small_when_many_leases_end_at_once();
    bounds::an_idle_group_forgets();
    writeln!(out, "hold")
}

/// However many members there are, and whether they settle one by one or many at once: at least a third of the best of its
/// ordering; and in key order at least half of what there is without.
fn throughput(out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "ordering  members  per request  records/s  ns/record  journal bytes/record")?;
    let mut costs: Vec<(Load, f64)> = Vec::new();
    for keys in [0, 10_000] {
        for members in [1, 16, 256] {
            for per_request in [1, 64] {
                let load = Load { records: 2_000_000, members, keys, per_request };
                let cost = bounds::throughput(load);
                costs.push((load, cost.per_second()));
                writeln!(
                    out,
                    "{:<8}  {members:>7}  {per_request:>11}  {:>9.0}  {:>9.0}  {:>20.1}",
                    if keys == 0 { "none" } else { "key" },
                    cost.per_second(),
                    1e9 / cost.per_second(),
                    cost.frame_bytes as f64 / cost.records as f64,
                )?;
            }
        }
    }
    for (load, per_second) in &costs {
        let of_ordering = costs.iter().filter(|(other, _)| other.keys == load.keys);
        let best = of_ordering.map(|(_, speed)| *speed).fold(0.0, f64::max);
        assert!(per_second * 3.0 >= best, "{load:?}: {per_second:.0}/s beside {best:.0}/s");
        let is_same = |other: &Load| (other.members, other.per_request) == (load.members, load.per_request);
        let unordered = costs.iter().find(|(other, _)| other.keys == 0 && is_same(other));
        let (_, unordered) = unordered.expect("the unordered loads were measured first");
        assert!(
            per_second * 2.0 >= *unordered,
            "{load:?}: {per_second:.0}/s beside {unordered:.0}/s unordered"
        );
    }
    Ok(())
}

/// Shows a long run. After its beginning memory may grow by 5 % (the allocator gives back what the beginning took), and
/// speed may differ by 10 %: of the middle half, as others use the machine too.
fn windows(out: &mut dyn Write, windows: &[Window]) -> io::Result<()> {
    const MIB: f64 = 1_048_576.0;
    for window in windows {
        let (resident, charged) = (window.resident as f64 / MIB, window.charged as f64 / MIB);
        let per_second = window.per_second;
        writeln!(out, "{per_second:>9.0} records/s, {resident:.1} MiB resident, {charged:.2} MiB charged")?;
    }
    let later = &windows[2..];
    let most = later.iter().map(|window| window.resident).max().unwrap_or(0);
    let growth = (most as f64 / windows[1].resident as f64 - 1.0) * 100.0;
    let mut speeds: Vec<f64> = later.iter().map(|window| window.per_second).collect();
    speeds.sort_by(f64::total_cmp);
    let middle = &speeds[speeds.len() / 4..speeds.len() - speeds.len() / 4];
    let mean = middle.iter().sum::<f64>() / middle.len() as f64;
    let spread = middle.iter().map(|speed| (speed / mean - 1.0).abs()).fold(0.0, f64::max) * 100.0;
    writeln!(out, "after the second: resident {growth:+.1} % at most, speed ±{spread:.1} %")?;
    assert!(growth <= 5.0, "memory is not flat");
    assert!(spread <= 10.0, "throughput is not flat");
    Ok(())
}

fn stuck_record(out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "10,000,000 acks above a record that fails again and again, by tenths:")?;
    windows(out, &bounds::acks_above_a_stuck_record(10_000_000))
}

fn retry(out: &mut dyn Write) -> io::Result<()> {
    let retry = bounds::a_partition_in_retry(1_000_000);
    writeln!(out, "1,000,000 records wait for their next attempt:")?;
    writeln!(out, "{:.0} B resident each, {:.0} B charged", retry.resident_each, retry.charged_each)?;
    let (failed, retried) = (retry.failed_per_second, retry.retried_per_second);
    writeln!(out, "{failed:.0} leased and failed/s, {retried:.0} due, leased and acked/s")?;
    retry.assert_bounded();
    Ok(())
}

fn stuck_key(out: &mut dyn Write) -> io::Result<()> {
    let stuck = bounds::one_stuck_key(1_000_000);
    writeln!(out, "1,000,000 records of 100 keys flow while as many wait behind one of theirs, by tenths:")?;
    windows(out, &stuck.windows)?;
    writeln!(
        out,
        "{} offsets kept at most; then {:.0} of the key one by one/s",
        stuck.parked, stuck.drained_per_second
    )?;
    stuck.assert_bounded();
    Ok(())
}

fn expiry(out: &mut dyn Write) -> io::Result<()> {
    let spread = bounds::leases_that_expire_together(10_000);
    let most = spread.iter().copied().max().unwrap_or(0);
    writeln!(out, "10,000 leases expire in one millisecond; then 10 members have 500 credits each:")?;
    writeln!(out, "at most {most} records in 10 ms; per 100 ms: {:?}", {
        spread.chunks(10).map(|part| part.iter().sum::<usize>()).collect::<Vec<_>>()
    })?;
    bounds::assert_spread(&spread);
    Ok(())
}

fn members(out: &mut dyn Write) -> io::Result<()> {
    let few = bounds::members_come_and_go(100);
    let many = bounds::members_come_and_go(10_000);
    writeln!(out, "members with 10 leases each, one of them:")?;
    for (name, members) in [("of 100", few), ("of 10,000", many)] {
        writeln!(out, "{name}: comes back in {:?}, is lost in {:?}", members.returned, members.lost)?;
    }
    many.assert_like(&few);
    Ok(())
}

fn idle_groups(out: &mut dyn Write) -> io::Result<()> {
    let idle = bounds::idle_groups(10_000);
    writeln!(out, "10,000 groups without members on one partition:")?;
    writeln!(out, "{:.0} B resident each", idle.resident_each)?;
    writeln!(out, "a turn with one append: {:?} without them, {:?} with them", idle.turn_alone, idle.turn)?;
    idle.assert_bounded();
    Ok(())
}
