//! Working through records with a group whose members share them: each is leased and acknowledged by itself, and each
//! acknowledgement is looked at. How many travel together underneath is the client's business.

use std::sync::Arc;

use anyhow::ensure;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::window::{Span, Window};
use super::{Session, create_topic, join, produce, unique};
use crate::driver::{Driver, Members, Progress};
use crate::row::Row;
use crate::workload::{Share, Way};

pub(super) async fn measure<D: Driver>(
    session: &Session,
    work: &Share,
    members: u32,
    way: Way,
) -> anyhow::Result<Row> {
    let driver = Arc::new(D::open(&session.address, session.level).await?);
    let topic = create_topic(&*driver, work.partitions).await?;
    let records = session.effort.records(work.records);
    let (size, batch) = (work.record_bytes, work.batch_bytes);
    let records = produce::fill(&*driver, &topic, records, size, batch, way.keys).await?;
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
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        warm_up_units: 0,
        measured: session.effort.measured(work.seconds),
        most: records,
    };
    let (row, _) = window.observe(session, &span, work.record_bytes as u64).await;
    stop.send_replace(true);
    join(tasks).await?;
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was acknowledged");
    session.discard(&*driver, &topic, &[group]).await?;
    Ok(row)
}
