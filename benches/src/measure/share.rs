//! Working through records with a share group: each is leased and acknowledged by itself, and each acknowledgement is looked
//! at. How many travel together underneath is the client's business.

use std::sync::Arc;

use anyhow::{Context, ensure};
use felucca_client::{Client, Delivery, Outcome, SettleResult, ShareConsumer};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::window::{Span, Window};
use super::{Session, Topic, join, unique};
use crate::row::Row;
use crate::workload::{Ack, Receive, Share};

pub(super) async fn measure(
    session: &Session,
    work: &Share,
    members: u32,
    receive: Receive,
) -> anyhow::Result<Row> {
    let records = session.effort.records(work.records);
    let topic = Topic::create(session, work.partitions, Ack::Written).await?;
    topic.fill(records, work.record_bytes, work.batch_bytes, Ack::Written).await?;
    let group = unique("bench-group");
    topic.client.admin().create_share_group(&group, &[&topic.name], &[]).await?;

    let window = Arc::new(Window::new(members as usize));
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for task in 0..members as usize {
        let client = Client::connect(topic.address.clone()).await?;
        let member = client
            .share_consumer(&group)
            .prefetch(work.prefetch)
            .concurrency(work.prefetch as usize)
            .build()
            .await?;
        match receive {
            Receive::Next => tasks.spawn(take(member, work.prefetch, window.clone(), task, stopped.clone())),
            Receive::Worker => tasks.spawn(handle(member, window.clone(), task, stopped.clone())),
        };
    }
    let span = Span {
        warm_up: session.effort.warm_up(work.warm_up_seconds),
        measured: session.effort.measured(work.seconds),
        most: records,
    };
    let row = window.observe(session, &span, work.record_bytes as u64).await;
    stop.send_replace(true);
    join(tasks).await?;
    ensure!(row.records.is_some_and(|records| records > 0), "nothing was acknowledged");
    topic.discard(session, &[group]).await?;
    Ok(Row { ack: Some(Ack::Synced), ..row })
}

/// A caller with so many acknowledgements under way.
async fn take(
    mut member: ShareConsumer,
    under_way: u32,
    window: Arc<Window>,
    task: usize,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut acks = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            Some(result) = acks.next(), if !acks.is_empty() => {
                done(result)?;
                window.count(task).add(1);
            }
            delivery = member.next(), if acks.len() < under_way as usize => acks.push(delivery?.ack()),
            _ = stopped.wait_for(|stopped| *stopped) => break,
        }
    }
    // What is under way has been sent; its answers are awaited, so that none is refused unseen.
    while let Some(result) = acks.next().await {
        done(result)?;
    }
    Ok(())
}

fn done(result: felucca_client::Result<SettleResult>) -> anyhow::Result<()> {
    let result = result?;
    ensure!(result.is_done(), "an acknowledgement was refused: {result:?}");
    Ok(())
}

/// The client's worker with a handler that has nothing to do. Counts handlers: their acknowledgements follow at once, and
/// the prefetch bounds how far they may be behind.
async fn handle(
    member: ShareConsumer,
    window: Arc<Window>,
    task: usize,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let handler = |_: Delivery| {
        let window = window.clone();
        async move {
            window.count(task).add(1);
            Outcome::Ack
        }
    };
    let shutdown = async move {
        let _dropped = stopped.wait_for(|stopped| *stopped).await;
    };
    let report = member.run(handler, shutdown).await.context("the worker ended")?;
    ensure!(report.lost == 0 && report.nacked == 0, "not everything was acknowledged: {report:?}");
    Ok(())
}
