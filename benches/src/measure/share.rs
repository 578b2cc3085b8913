//! Working through records with a group whose members share them: each is leased and acknowledged by itself, and each
//! acknowledgement is looked at. How many travel together underneath is the client's business.

use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::produce::Filling;
use super::window::{Opening, Span, Window};
use super::{Session, create_topic, join, unique};
use crate::driver::{Driver, Members, Progress};
use crate::row::Row;
use crate::workload::{Share, Way};

/// Longest time in which records are produced. As faster servers take in more, they have more to hand out.
const FILL_TIME: Duration = Duration::from_secs(8);
/// Times the records and the time for producing them, for a server that would be through with fewer too soon.
const MORE: u32 = 4;

pub(super) async fn measure<D: Driver>(
    session: &Session,
    work: &Share,
    members: u32,
    way: Way,
) -> anyhow::Result<Row> {
    let driver = Arc::new(D::open(&session.address, session.level).await?);
    let (mut row, mut opening) = measure_with(session, &driver, work, members, way, 1).await?;
    if !opening.is_steady() {
        (row, opening) = measure_with(session, &driver, work, members, way, MORE).await?;
    }
    opening.check()?;
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was acknowledged");
    Ok(row)
}

/// Records produced at the most, of so many that the workload says.
pub(crate) fn most_records(records: u64) -> u64 {
    records * u64::from(1 + MORE)
}

async fn measure_with<D: Driver>(
    session: &Session,
    driver: &Arc<D>,
    work: &Share,
    members: u32,
    way: Way,
    times: u32,
) -> anyhow::Result<(Row, Opening)> {
    let topic = create_topic(&**driver, work.partitions).await?;
    let filling = Filling {
        records: session.effort.records(work.records) * u64::from(times),
        longest: FILL_TIME * times,
        record_bytes: work.record_bytes,
        batch_bytes: work.batch_bytes,
        keys: way.keys,
    };
    let records = filling.fill(&**driver, &topic).await?;
    let group = unique("bench-group");
    let prefetch = work.prefetch;
    let everyone = move |index| Members { index, count: members, prefetch, way };
    driver.create_group(&topic, &group, everyone(0)).await?;

    let window = Arc::new(Window::new(members as usize));
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for index in 0..members {
        let progress = Progress { window: window.clone(), task: index as usize, stopped: stopped.clone() };
        let (driver, topic, group) = (driver.clone(), topic.clone(), group.clone());
        tasks.spawn(async move { driver.work(&topic, &group, everyone(index), progress).await });
    }
    // The last that is leased would be acknowledged within the window without having been leased there.
    let held = if session.effort.shortest.is_zero() { 0 } else { u64::from(members) * u64::from(prefetch) };
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        warm_up_units: 0,
        measured: session.effort.measured(work.seconds),
        most: records.saturating_sub(held),
    };
    let (row, opening) = window.observe(session, &span, work.record_bytes as u64).await;
    stop.send_replace(true);
    join(tasks).await?;
    session.discard(&**driver, &topic, &[group]).await?;
    Ok((row, opening))
}
