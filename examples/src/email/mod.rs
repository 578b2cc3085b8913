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
use felucca_client::{Client, ConsumedRecord, Delivery, Nack, Outcome, Reject, ShareConsumer, WorkerReport};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use tokio_util::sync::CancellationToken;

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
    let worker = worker(&client, args.member, args.concurrency).await?;
    service::announce_ready()?;
    let report = mails.work(worker, stop).await?;
    tracing::info!(?report, "stopped");
    Ok(())
}

/// Joins the email group.
pub(crate) async fn worker(
    client: &Client,
    member: String,
    concurrency: usize,
) -> felucca_client::Result<ShareConsumer> {
    client.share_consumer(topology::EMAIL_GROUP).member_id(member).concurrency(concurrency).build().await
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
pub(crate) enum Route {
    Smtp(AsyncSmtpTransport<Tokio1Executor>),
    Mailbox(Mailbox),
}

/// What the service works with.
#[derive(Clone, Debug)]
pub(crate) struct Mails {
    pub(crate) store: Store,
    pub(crate) route: Route,
}

impl Mails {
    /// Writes mails until `stop`, and then to the end of those that have been begun.
    pub(crate) async fn work(
        self,
        worker: ShareConsumer,
        stop: CancellationToken,
    ) -> felucca_client::Result<WorkerReport> {
        let handler = |delivery: Delivery| {
            let mails = self.clone();
            async move { mails.handle(&delivery).await }
        };
        worker.run(handler, stop.cancelled_owned()).await
    }

    async fn handle(&self, record: &ConsumedRecord) -> Outcome {
        let envelope = match Envelope::from_record(record) {
            Ok(envelope) => envelope,
            Err(error) => return Reject::undecodable(error).into(),
        };
        let message = match compose::compose(&envelope) {
            Ok(message) => message,
            Err(error) => return Outcome::reject("no-mail", format!("{error:#}")),
        };
        match self.send_once(&envelope, message).await {
            Ok(()) => Outcome::Ack,
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), event = %envelope.id, "no mail sent, will try again");
                Nack::new("send-failed", format!("{error:#}")).into()
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    use super::*;
    use crate::events::{Event, PaymentFailed, TraceParent};

    /// As much of an SMTP server as a mail takes; it accepts the connection's mail or refuses it for the moment.
    async fn smtp_session(
        stream: TcpStream,
        accepts: bool,
        taken: &mpsc::Sender<String>,
    ) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        stream.write_all(b"220 test\r\n").await?;
        let mut line = String::new();
        while stream.read_line(&mut line).await? > 0 {
            let answer = match line.split_whitespace().next().unwrap_or_default() {
                "MAIL" if !accepts => "451 not now\r\n",
                "DATA" => {
                    stream.write_all(b"354 go on\r\n").await?;
                    let mut mail = String::new();
                    while !mail.ends_with("\r\n.\r\n") {
                        stream.read_line(&mut mail).await?;
                    }
                    taken.send(mail).await.ok();
                    "250 taken\r\n"
                }
                _ => "250 ok\r\n",
            };
            stream.write_all(answer.as_bytes()).await?;
            line.clear();
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_mail_goes_out_over_smtp_and_not_again_once_that_is_noted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("smtp://{}", listener.local_addr().unwrap());
        let (taken, mut mails_taken) = mpsc::channel(8);
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await?;
                smtp_session(stream, connection > 0, &taken).await?;
            }
            std::io::Result::Ok(())
        });
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("sent.db")).unwrap();
        let mails = Mails { store, route: Route::Smtp(smtp_transport(&url).unwrap()) };
        let event = Event::PaymentFailed(PaymentFailed {
            order_id: uuid::Uuid::from_u128(7),
            customer: "00004".to_owned(),
            cents: 2_933,
            reason: "insufficient funds".to_owned(),
        });
        let envelope = Envelope::new("/test", events::now(), TraceParent::generate(), event);
        let send = async || mails.send_once(&envelope, compose::compose(&envelope).unwrap()).await;

        let refused = send().await.unwrap_err();
        assert!(format!("{refused:#}").contains("not now"), "{refused:#}");
        send().await.unwrap();
        send().await.unwrap();
        let mail = mails_taken.recv().await.unwrap();
        assert!(mail.contains(&format!("Message-ID: {}", message_id(envelope.id))), "{mail}");
        assert!(mails_taken.try_recv().is_err(), "sent again");
    }

    #[test]
    fn only_plain_smtp_urls_are_taken() {
        assert!(smtp_transport("smtp://localhost").is_ok());
        assert!(smtp_transport("smtp://localhost:2525/").is_ok());
        for url in [
            "localhost:25",
            "smtps://localhost",
            "smtp://",
            "smtp://me:secret@localhost",
            "smtp://localhost:x",
        ] {
            assert!(smtp_transport(url).is_err(), "{url} was taken");
        }
    }
}
