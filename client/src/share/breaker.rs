//! A circuit breaker around a handler: while what the handler depends on is down, records are left alone instead of failing
//! one after the other.
//!
//! *Closed*, everything passes. After so many failures in a row it is *open*: not ready, for a pause. Then it is *half open*:
//! ready for one record. When that one succeeds the breaker closes; when it fails the pause doubles.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};
use tower_layer::Layer;
use tower_service::Service;

use super::handler::HandlerFn;
use super::outcome::Outcome;

/// A tower layer that keeps records away from a handler while what it depends on is down. A worker whose handler is not ready
/// pauses its subscription, so the records are free for other members meanwhile and lose no attempts.
///
/// ```no_run
/// use std::time::Duration;
/// use felucca_client::{Breaker, Client, Delivery, Nack, Result};
///
/// # async fn charge(_: &Delivery) -> std::result::Result<(), String> { Ok(()) }
/// # async fn example(client: Client, shutdown: impl Future<Output = ()>) -> Result<()> {
/// let worker = client.share_consumer("payment").build().await?;
/// let handler = |delivery: Delivery| async move {
///     charge(&delivery).await.map_err(|error| Nack::new("gateway-down", error))
/// };
/// let breaker = Breaker::new(5).classes(["gateway-down"]).pause(Duration::from_secs(1), Duration::from_secs(30));
/// worker.serve(breaker.guard(handler), shutdown).await?;
/// # Ok(())
/// # }
/// ```
///
/// With more layers, say tower's timeout and rate limit: `ServiceBuilder::new().layer(breaker).rate_limit(100,
/// second).service(HandlerFn(handler))`.
#[derive(Clone, Debug)]
pub struct Breaker {
    failures: u32,
    classes: Vec<String>,
    pause: Duration,
    longest: Duration,
}

impl Breaker {
    /// Opens after so many failures in a row, at least one, without a success between them.
    ///
    /// A failure is a nack, an error of the service, or a call that was dropped before its end (it took too long, or
    /// panicked). A success is an acknowledgement, a completion, or a rejection, for that too the handler could decide. A
    /// release is neither.
    pub fn new(failures: u32) -> Self {
        Self {
            failures: failures.max(1),
            classes: Vec::new(),
            pause: Duration::from_secs(1),
            longest: Duration::from_secs(30),
        }
    }

    /// Only nacks of these classes are failures; of the others nothing is concluded. Default: all are.
    #[must_use]
    pub fn classes<C: Into<String>>(mut self, classes: impl IntoIterator<Item = C>) -> Self {
        self.classes = classes.into_iter().map(Into::into).collect();
        self
    }

    /// How long it stays open before the next record is tried: `first`, doubled each time up to `longest`. Default 1 s and
    /// 30 s.
    #[must_use]
    pub fn pause(mut self, first: Duration, longest: Duration) -> Self {
        (self.pause, self.longest) = (first, longest.max(first));
        self
    }

    /// This breaker around a closure, for [`ShareConsumer::serve`](crate::ShareConsumer::serve).
    pub fn guard<H>(self, handler: H) -> Guarded<HandlerFn<H>> {
        self.layer(HandlerFn(handler))
    }

    /// What the outcomes of a call say.
    fn judge(&self, outcomes: &[Outcome]) -> Verdict {
        let failed = |outcome: &Outcome| match outcome {
            Outcome::Nack(nack) => self.classes.is_empty() || self.classes.contains(&nack.class),
            _ => false,
        };
        let succeeded =
            |outcome: &Outcome| matches!(outcome, Outcome::Ack | Outcome::Complete(_) | Outcome::Reject(_));
        if outcomes.iter().any(succeeded) {
            Verdict::Success
        } else if outcomes.iter().any(failed) {
            Verdict::Failure
        } else {
            Verdict::Nothing
        }
    }
}

impl<S> Layer<S> for Breaker {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        let circuit = Circuit { state: State::Closed { failures: 0 }, waker: None };
        let shared = Arc::new(Shared { breaker: self.clone(), circuit: Mutex::new(circuit) });
        Guarded { inner, shared, waiting: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Success,
    Failure,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
        pause: Duration,
    },
    /// One call is let through; `pause` was the last.
    HalfOpen {
        called: bool,
        pause: Duration,
    },
}

#[derive(Debug)]
struct Circuit {
    state: State,
    /// Waits for the trial's end.
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Shared {
    breaker: Breaker,
    circuit: Mutex<Circuit>,
}

impl Shared {
    /// A call ended. Only the trial speaks while the circuit is not closed: the others began before it opened.
    fn ended(&self, trial: bool, verdict: Verdict, now: Instant) {
        let mut circuit = self.circuit.lock();
        let open = |pause| State::Open { until: now + pause, pause };
        circuit.state = match (circuit.state, verdict) {
            (State::Closed { .. }, Verdict::Success) => State::Closed { failures: 0 },
            (State::Closed { failures }, Verdict::Failure) if failures + 1 >= self.breaker.failures => {
                tracing::warn!(
                    failures = failures + 1,
                    "too many failures in a row: no more records for now"
                );
                open(self.breaker.pause)
            }
            (State::Closed { failures }, Verdict::Failure) => State::Closed { failures: failures + 1 },
            (State::HalfOpen { .. }, Verdict::Success) if trial => {
                tracing::info!("the first success after failures: records are taken again");
                State::Closed { failures: 0 }
            }
            (State::HalfOpen { pause, .. }, Verdict::Failure) if trial => {
                open((pause * 2).min(self.breaker.longest))
            }
            (State::HalfOpen { pause, .. }, Verdict::Nothing) if trial => {
                State::HalfOpen { called: false, pause }
            }
            (unchanged, _) => unchanged,
        };
        if let Some(waker) = circuit.waker.take() {
            waker.wake();
        }
    }
}

/// A service behind a [`Breaker`]. It is ready when the circuit lets a call through and the service is ready.
#[derive(Debug)]
pub struct Guarded<S> {
    inner: S,
    shared: Arc<Shared>,
    /// Until the pause is over.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Guarded<S> {
    fn poll_circuit(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let until = {
                let mut circuit = self.shared.circuit.lock();
                match circuit.state {
                    State::Closed { .. } | State::HalfOpen { called: false, .. } => return Poll::Ready(()),
                    State::HalfOpen { called: true, .. } => {
                        circuit.waker = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    State::Open { until, pause } if until <= Instant::now() => {
                        circuit.state = State::HalfOpen { called: false, pause };
                        continue;
                    }
                    State::Open { until, .. } => until,
                }
            };
            ready!(self.waiting.insert(Box::pin(sleep_until(until))).as_mut().poll(cx));
        }
    }
}

impl<S, R> Service<R> for Guarded<S>
where
    S: Service<R>,
    S::Response: AsRef<[Outcome]>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<S::Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        ready!(self.poll_circuit(cx));
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let trial = {
            let mut circuit = self.shared.circuit.lock();
            match &mut circuit.state {
                State::HalfOpen { called, .. } => !std::mem::replace(called, true),
                State::Closed { .. } | State::Open { .. } => false,
            }
        };
        let mut report = Report { shared: self.shared.clone(), trial, verdict: Verdict::Failure };
        let call = self.inner.call(request);
        async move {
            let result = call.await;
            if let Ok(response) = &result {
                report.judge(response.as_ref());
            }
            result
        }
        .boxed()
    }
}

/// Tells the circuit how a call ended, also when it was dropped.
#[derive(Debug)]
struct Report {
    shared: Arc<Shared>,
    trial: bool,
    verdict: Verdict,
}

impl Report {
    fn judge(&mut self, outcomes: &[Outcome]) {
        self.verdict = self.shared.breaker.judge(outcomes);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.shared.ended(self.trial, self.verdict, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::poll_fn;

    use super::super::delivery::Nack;
    use super::*;

    /// Answers what it is asked to; `None` never.
    #[derive(Debug)]
    struct Echo;

    impl Service<Option<Outcome>> for Echo {
        type Response = Outcome;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Outcome, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, outcome: Option<Outcome>) -> Self::Future {
            async move {
                match outcome {
                    Some(outcome) => Ok(outcome),
                    None => std::future::pending().await,
                }
            }
            .boxed()
        }
    }

    const FIRST: Duration = Duration::from_millis(40);
    const LONGEST: Duration = Duration::from_millis(120);

    fn guarded() -> Guarded<Echo> {
        Breaker::new(2).classes(["down"]).pause(FIRST, LONGEST).layer(Echo)
    }

    fn down() -> Option<Outcome> {
        Some(Nack::new("down", "no answer").into())
    }

    async fn is_ready(service: &mut Guarded<Echo>) -> bool {
        poll_fn(|cx| Poll::Ready(service.poll_ready(cx).is_ready())).await
    }

    async fn call(service: &mut Guarded<Echo>, outcome: Option<Outcome>) {
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        service.call(outcome).await.unwrap();
    }

    #[tokio::test]
    async fn it_opens_after_failures_in_a_row_and_pauses_longer_each_time() {
        let mut service = guarded();
        call(&mut service, down()).await;
        call(&mut service, Some(Outcome::Ack)).await;
        call(&mut service, down()).await;
        call(&mut service, Some(Outcome::nack("of another class"))).await;
        call(&mut service, Some(Outcome::Release)).await;
        assert!(is_ready(&mut service).await, "not in a row");
        call(&mut service, down()).await;
        for pause in [FIRST, FIRST * 2, LONGEST, LONGEST] {
            assert!(!is_ready(&mut service).await);
            let since = Instant::now();
            call(&mut service, down()).await;
            // The pause began a little before.
            assert!(since.elapsed() + FIRST / 2 >= pause, "{:?}", since.elapsed());
        }
        call(&mut service, Some(Outcome::reject("class", "the dependency has spoken"))).await;
        assert!(is_ready(&mut service).await);
    }

    #[tokio::test]
    async fn half_open_it_lets_one_call_through_and_wakes_who_waits_for_it() {
        let mut service = guarded();
        // Two that began before: what they say later changes nothing.
        let late = [service.call(Some(Outcome::Ack)), service.call(down())];
        call(&mut service, down()).await;
        call(&mut service, down()).await;
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        let trial = service.call(Some(Outcome::Ack));
        assert!(!is_ready(&mut service).await);
        for late in late {
            late.await.unwrap();
        }
        assert!(!is_ready(&mut service).await, "only the trial speaks");
        let (ready, _) = tokio::join!(poll_fn(|cx| service.poll_ready(cx)), trial);
        ready.unwrap();
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_failed_and_a_trial_without_verdict_is_made_again() {
        let mut service = guarded();
        drop(service.call(None));
        drop(service.call(None));
        assert!(!is_ready(&mut service).await);
        call(&mut service, Some(Outcome::Release)).await;
        assert!(is_ready(&mut service).await, "for the next trial");
        drop(service.call(None));
        assert!(!is_ready(&mut service).await);
    }
}
