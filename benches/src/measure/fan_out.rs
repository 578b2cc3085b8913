//! One producer as fast as it can, and many readers that each want every record.
//!
//! What counts is what was delivered to all readers together within the window.

use std::sync::Arc;

use anyhow::ensure;
use bytes::Bytes;
use tokio::task::JoinSet;

use super::produce::Load;
use super::window::{Span, Window};
use super::{Session, create_topic, join, value};
use crate::driver::{Consumer, Driver, Gathering};
use crate::row::Row;
use crate::workload::FanOut;

pub(super) async fn measure<D: Driver>(session: &Session, work: &FanOut) -> anyhow::Result<Row> {
    let driver = D::open(&session.address, session.level).await?;
    let topic = create_topic(&driver, work.partitions).await?;
    let produced = Arc::new(Window::new(1));
    let delivered = Arc::new(Window::new(work.groups as usize));
    let mut readers = JoinSet::new();
    for task in 0..work.groups as usize {
        let consumer = driver.consumer(&topic, topic.share_of(0, 1)).await?;
        readers.spawn(read(consumer, delivered.clone(), task, work.record_bytes));
    }
    let gathering = Gathering { batch_bytes: work.batch_bytes, in_flight: work.in_flight, keys: 0 };
    let load = Load {
        value: value(work.record_bytes),
        in_flight: work.in_flight,
        block: None,
        window: produced.clone(),
        task: 0,
    };
    let mut sending = JoinSet::new();
    sending.spawn(load.run(driver.producer(&topic, 0, gathering).await?));
    let record_bytes = work.record_bytes as u64;
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        warm_up_units: 0,
        measured: session.effort.measured(work.seconds),
        most: session.effort.bytes(work.max_bytes) / record_bytes.max(1) * u64::from(work.groups),
    };
    let (row, opening) = delivered.observe(session, &span, record_bytes).await;
    produced.close();
    join(sending).await?;
    join(readers).await?;
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was delivered");
    opening.check()?;
    session.discard(&driver, &topic, &[]).await?;
    Ok(row)
}

async fn read<C: Consumer>(
    mut consumer: C,
    window: Arc<Window>,
    task: usize,
    record_bytes: usize,
) -> anyhow::Result<()> {
    let mut values: Vec<Bytes> = Vec::new();
    loop {
        tokio::select! {
            biased;
            () = window.over() => break,
            next = consumer.next(&mut values) => next?,
        }
        for value in &values {
            ensure!(value.len() == record_bytes, "a record of {} bytes", value.len());
        }
        window.count(task).add(values.len() as u64);
        values.clear();
    }
    consumer.close().await
}
