//! The email service: writes to the customer when an order was created and when its payment ended.
//!
//! It works on `orders` and `payments` in share group `email`, without order: a mail depends on no other. Each event is
//! one mail; an event that comes again, because it was handed out before a crash or published twice, is known by its id.
//!
//! Crash windows:
//! - *before the mail is out*: the event is delivered again and the mail is sent then;
//! - *between the mail and the note in our database*: into the mailbox directory, the mail is found there under the
//!   event's id and not written twice: exactly once. Over SMTP nobody can know whether the server took the mail, so it is
//!   sent again under the same Message-ID: at least once, as SMTP allows;
//! - *between the note and the acknowledgement*: the event is delivered again, found in the database, and acknowledged.

mod compose;
pub(crate) mod mailbox;
pub(crate) mod store;

use std::path::PathBuf;

use anyhow::Context as _;
use felucca_client::{ConsumedRecord, Nack, Outcome};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};

pub(crate) use compose::message_id;

use crate::events::{self, Envelope};
use crate::{service, topology};
use mailbox::Mailbox;
use store::Store;

#[derive(Debug, clap::Args)]
pub(crate) struct EmailArgs {
    /// Address of the broker.
    #[arg(long)]
    broker: String,
    /// The service's database file.
    #[arg(long)]
    database: PathBuf,
    /// Directory for the mails when there is no SMTP server.
    #[arg(long)]
    mailbox: PathBuf,
    /// SMTP server to send through, for example `smtp://localhost:25`.
    #[arg(long, env = "SMTP_URL")]
    smtp_url: Option<String>,
    /// Mails worked on at once.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Name of this instance; an instance that comes back under its name keeps what it was working on.
    #[arg(long, default_value = "email-1")]
    member: String,
    /// Stop when standard input closes.
    #[arg(long)]
    end_with_parent: bool,
}

/// Runs the service until it is told to stop; mails that are on their way are finished first.
pub(crate) async fn run(args: EmailArgs) -> anyhow::Result<()> {
    let stop = service::shutdown_token(args.end_with_parent)?;
    let route = match &args.smtp_url {
        Some(url) => Route::Smtp(smtp_transport(url)?),
        None => Route::Mailbox(Mailbox::open(&args.mailbox).context("cannot open the mailbox")?),
    };
    let mails =
        Mails { store: Store::open(&args.database).context("cannot open the email database")?, route };
    let client = tokio::select! {
        client = service::connect(&args.broker, "email") => client?,
        () = stop.cancelled() => return Ok(()),
    };
    let worker = client
        .share_consumer(topology::EMAIL_GROUP)
        .member_id(args.member)
        .concurrency(args.concurrency)
        .build()
        .await?;
    service::announce_ready()?;
    let report = worker
        .run(
            |delivery| {
                let mails = mails.clone();
                async move { mails.handle(&delivery).await }
            },
            stop.cancelled_owned(),
        )
        .await?;
    tracing::info!(?report, "stopped");
    Ok(())
}

/// A connection pool for `smtp://host[:port]`.
fn smtp_transport(url: &str) -> anyhow::Result<AsyncSmtpTransport<Tokio1Executor>> {
    let server = url
        .strip_prefix("smtp://")
        .map(|server| server.trim_end_matches('/'))
        .filter(|server| !server.is_empty() && !server.contains(['@', '/']))
        .with_context(|| {
            format!("`{url}` is not smtp://host[:port]; the sample speaks neither TLS nor passwords")
        })?;
    let (host, port) = match server.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().with_context(|| format!("`{port}` is not a port"))?),
        None => (server, lettre::transport::smtp::SMTP_PORT),
    };
    Ok(AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(host).port(port).build())
}

/// Where mails go.
#[derive(Clone, Debug)]
enum Route {
    Smtp(AsyncSmtpTransport<Tokio1Executor>),
    Mailbox(Mailbox),
}

#[derive(Clone, Debug)]
struct Mails {
    store: Store,
    route: Route,
}

impl Mails {
    async fn handle(&self, record: &ConsumedRecord) -> Outcome {
        let envelope = match Envelope::from_record(record) {
            Ok(envelope) => envelope,
            Err(error) => return Outcome::reject("undecodable", error.to_string()),
        };
        let message = match compose::compose(&envelope) {
            Ok(message) => message,
            Err(error) => return Outcome::reject("no-mail", format!("{error:#}")),
        };
        match self.send_once(&envelope, message).await {
            Ok(()) => Outcome::Ack,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), event = %envelope.id, "no mail sent, will try again");
                let reason = format!("{error:#}");
                Outcome::Nack(Nack { class: "send-failed".to_owned(), reason, ..Nack::default() })
            }
        }
    }

    async fn send_once(&self, envelope: &Envelope, message: Message) -> anyhow::Result<()> {
        if self.store.was_sent(envelope.id).await? {
            return Ok(());
        }
        match &self.route {
            Route::Smtp(transport) => {
                transport.send(message).await.context("the SMTP server")?;
            }
            Route::Mailbox(mailbox) => {
                let (mailbox, event_id) = (mailbox.clone(), envelope.id);
                tokio::task::spawn_blocking(move || mailbox.deliver(event_id, &message.formatted()))
                    .await
                    .context("writing the mail")?
                    .context("the mailbox")?;
            }
        }
        self.store.note_sent(envelope, events::now()).await?;
        Ok(())
    }
}
