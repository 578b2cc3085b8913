//! A broker that does what a test tells it, one frame at a time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{self, BatchBuilder};
use felucca_protocol::frame::{self, Frame, Kind};
use felucca_protocol::{Api, ErrorCode, message};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::Client;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Fails the test when it takes too long.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

/// A short wait after which nothing is expected to have happened.
pub(crate) const QUIET: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct FakeBroker {
    listener: TcpListener,
    pub(crate) welcome: message::Welcome,
}

impl FakeBroker {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let welcome = message::Welcome {
            version: 1,
            server_name: "fake".to_owned(),
            boot_epoch: 1,
            max_frame_bytes: 16 << 20,
            max_batch_bytes: 1 << 20,
            max_record_bytes: 1 << 20,
            session_timeout_ms: 10_000,
            ..Default::default()
        };
        Self { listener, welcome }
    }

    /// A connected client and the broker's end of its connection.
    pub(crate) async fn client(&self) -> (Client, FakeConnection) {
        let builder = Client::builder(self.address()).request_timeout(Duration::from_secs(5));
        let (client, connection) = tokio::join!(builder.connect(), self.accept());
        (client.unwrap(), connection)
    }

    pub(crate) fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }

    /// The next connection, after its handshake.
    pub(crate) async fn accept(&self) -> FakeConnection {
        let mut connection = self.accept_silently().await;
        let hello = connection.frame().await.unwrap();
        assert_eq!(hello.api, u8::from(Api::Hello));
        connection.send(Kind::Reply, Api::Hello, hello.correlation, &self.welcome, &[]).await;
        connection
    }

    /// The next connection, before its handshake.
    pub(crate) async fn accept_silently(&self) -> FakeConnection {
        let (socket, _) = soon(self.listener.accept()).await.unwrap();
        FakeConnection { socket, buffer: BytesMut::new() }
    }
}

/// A request that was received.
#[derive(Debug)]
pub(crate) struct Asked<M> {
    pub(crate) api: Api,
    pub(crate) correlation: u64,
    pub(crate) message: M,
    pub(crate) payload: Bytes,
}

#[derive(Debug)]
pub(crate) struct FakeConnection {
    socket: TcpStream,
    buffer: BytesMut,
}

impl FakeConnection {
    async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer, u32::MAX).unwrap() {
                return Some(frame);
            }
            match soon(self.socket.read_buf(&mut self.buffer)).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The next request but pings, which are answered; `None` when the client closed the connection.
    pub(crate) async fn request(&mut self) -> Option<Frame> {
        loop {
            let frame = self.frame().await?;
            if frame.api != u8::from(Api::Ping) {
                return Some(frame);
            }
            self.send(Kind::Reply, Api::Ping, frame.correlation, &message::Empty {}, &[]).await;
        }
    }

    /// The next request, which must be this one.
    pub(crate) async fn expect<M: Message + Default>(&mut self, api: Api) -> Asked<M> {
        let frame = self.request().await.expect("a request");
        assert_eq!(Api::try_from(frame.api).unwrap(), api);
        let message = frame.decode_message().unwrap();
        Asked { api, correlation: frame.correlation, message, payload: frame.payload.freeze() }
    }

    /// The next request, which must be this one; credit on the way is ignored.
    pub(crate) async fn expect_past_credit<M: Message + Default>(&mut self, api: Api) -> Asked<M> {
        loop {
            let frame = self.request().await.expect("a request");
            if frame.api == u8::from(Api::Credit) && api != Api::Credit {
                continue;
            }
            assert_eq!(Api::try_from(frame.api).unwrap(), api);
            let message = frame.decode_message().unwrap();
            return Asked { api, correlation: frame.correlation, message, payload: frame.payload.freeze() };
        }
    }

    /// Nothing is asked for a while.
    pub(crate) async fn expect_quiet(&mut self) {
        let asked = timeout(QUIET, self.request()).await;
        assert!(asked.is_err(), "{asked:?}");
    }

    pub(crate) async fn reply<M>(&mut self, asked: &Asked<M>, reply: &impl Message) {
        self.send(Kind::Reply, asked.api, asked.correlation, reply, &[]).await;
    }

    pub(crate) async fn refuse<M>(&mut self, asked: &Asked<M>, code: ErrorCode) {
        let error = message::Error::new(code, "as the test says");
        self.send(Kind::Error, asked.api, asked.correlation, &error, &[]).await;
    }

    pub(crate) async fn push(&mut self, api: Api, subscription: u64, push: &impl Message, payload: &[u8]) {
        self.send(Kind::Push, api, subscription, push, payload).await;
    }

    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn send(
        &mut self,
        kind: Kind,
        api: Api,
        correlation: u64,
        message: &impl Message,
        payload: &[u8],
    ) {
        let mut bytes = BytesMut::new();
        frame::encode(&mut bytes, kind, api, correlation, message, payload.len());
        bytes.extend_from_slice(payload);
        // A client that hung up is what some tests are about.
        let _gone = self.socket.write_all(&bytes).await;
    }

    // ---- Exchanges that many tests begin with ----

    /// Answers a question for a topic.
    pub(crate) async fn metadata(&mut self, name: &str, partitions: u32) {
        let asked = self.expect_past_credit::<message::Metadata>(Api::Metadata).await;
        let topics = vec![topic(name, partitions)];
        self.reply(&asked, &message::MetadataReply { topics, errors: Vec::new() }).await;
    }

    pub(crate) async fn init_producer(&mut self, producer_id: u64) {
        let asked = self.expect::<message::InitProducer>(Api::InitProducer).await;
        self.reply(&asked, &message::InitProducerReply { producer_id, producer_epoch: 0 }).await;
    }
}

pub(crate) fn topic_id(name: &str) -> Bytes {
    let mut id = [0; 16];
    id[..name.len().min(16)].copy_from_slice(&name.as_bytes()[..name.len().min(16)]);
    Bytes::copy_from_slice(&id)
}

pub(crate) fn topic(name: &str, partitions: u32) -> message::Topic {
    message::Topic { name: name.to_owned(), id: topic_id(name), partitions, ..Default::default() }
}

/// A batch of records whose values are their offsets.
pub(crate) fn numbered(offsets: std::ops::Range<u64>) -> Bytes {
    let mut builder = BatchBuilder::new();
    for offset in offsets.clone() {
        builder.push(0, None, Some(offset.to_string().as_bytes()), &[]).unwrap();
    }
    let mut bytes = builder.finish();
    batch::assign(&mut bytes, offsets.start, 0);
    bytes.freeze()
}
