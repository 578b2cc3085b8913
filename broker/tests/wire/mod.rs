//! The other end of a connection: frames by hand, apart from the client crate.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use felucca_broker::settings::{ByteSize, JournalSettings, ServerSettings};
use felucca_protocol::batch::{self, BatchBuilder, Record};
use felucca_protocol::frame::{self, Frame, Kind};
use felucca_protocol::{Api, ErrorCode, message as msg};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn settings(dir: &Path) -> ServerSettings {
    let defaults = ServerSettings::default();
    ServerSettings {
        data_dir: dir.to_path_buf(),
        listen: "127.0.0.1:0".parse().unwrap(),
        journal: JournalSettings {
            first_file_bytes: ByteSize::mib(1),
            file_bytes: ByteSize::mib(8),
            ..defaults.journal
        },
        ..defaults
    }
}

/// A batch of `count` records with the values "value N".
pub(crate) fn batch_of(first: u64, count: u64) -> BytesMut {
    let mut builder = BatchBuilder::new();
    for at in first..first + count {
        builder.push(1_700_000_000_000, Some(b"key"), Some(format!("value {at}").as_bytes()), &[]).unwrap();
    }
    builder.finish()
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: TcpStream,
    input: BytesMut,
    output: BytesMut,
    next: u64,
    pushes: VecDeque<Frame>,
}

/// A lease: boot epoch, sequence, topic, partition, offset.
pub(crate) type Lease = (u64, u64, Bytes, u32, u64);

impl Connection {
    pub(crate) async fn bare(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        Self { socket, input: BytesMut::new(), output: BytesMut::new(), next: 1, pushes: VecDeque::new() }
    }

    pub(crate) async fn open(address: SocketAddr) -> Self {
        let mut connection = Self::bare(address).await;
        let hello = msg::Hello {
            min_version: 1,
            max_version: 1,
            client_name: "test".to_owned(),
            ..Default::default()
        };
        let welcome: msg::Welcome = connection.call(Api::Hello, &hello).await.unwrap();
        assert_eq!(welcome.version, 1);
        connection
    }

    pub(crate) fn send_raw(&mut self, api: u8, message: &[u8], payload: &[u8]) -> u64 {
        let correlation = self.next;
        self.next += 1;
        frame::encode_header(&mut self.output, Kind::Request, api, correlation, message.len(), payload.len());
        self.output.extend_from_slice(message);
        self.output.extend_from_slice(payload);
        correlation
    }

    pub(crate) fn send(&mut self, api: Api, message: &impl Message, payload: &[u8]) -> u64 {
        self.send_raw(api.into(), &message.encode_to_vec(), payload)
    }

    pub(crate) async fn flush(&mut self) {
        let output = self.output.split();
        self.raw(&output).await;
    }

    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn next_frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = frame::decode(&mut self.input, u32::MAX).unwrap() {
                return Some(frame);
            }
            self.input.reserve(1 << 16);
            let read =
                timeout(PATIENCE, self.socket.read_buf(&mut self.input)).await.expect("an answer in time");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// The next frame of any kind; `None` at the end.
    pub(crate) async fn try_receive(&mut self) -> Option<Frame> {
        self.next_frame().await
    }

    /// The next frame that is no push.
    pub(crate) async fn receive(&mut self) -> Frame {
        loop {
            let frame = self.next_frame().await.expect("a frame before the end");
            if frame.kind != Kind::Push {
                return frame;
            }
            self.pushes.push_back(frame);
        }
    }

    pub(crate) async fn push(&mut self) -> Frame {
        match self.pushes.pop_front() {
            Some(frame) => frame,
            None => {
                let frame = self.next_frame().await.expect("a push before the end");
                assert_eq!(frame.kind, Kind::Push);
                frame
            }
        }
    }

    async fn exchange(
        &mut self,
        api: Api,
        message: &impl Message,
        payload: &[u8],
    ) -> Result<Frame, msg::Error> {
        let correlation = self.send(api, message, payload);
        self.flush().await;
        let frame = self.receive().await;
        assert_eq!((frame.correlation, frame.api), (correlation, u8::from(api)));
        match frame.kind {
            Kind::Reply => Ok(frame),
            _ => Err(frame.decode_message().unwrap()),
        }
    }

    pub(crate) async fn call<R: Message + Default>(
        &mut self,
        api: Api,
        message: &impl Message,
    ) -> Result<R, msg::Error> {
        self.exchange(api, message, &[]).await.map(|frame| frame.decode_message().unwrap())
    }

    /// Reads to the end of the connection.
    pub(crate) async fn end(&mut self) {
        while self.next_frame().await.is_some() {}
    }

    /// The error after which the connection ends.
    pub(crate) async fn last_error(&mut self) -> ErrorCode {
        let frame = self.receive().await;
        assert_eq!(frame.kind, Kind::Error);
        self.end().await;
        frame.decode_message::<msg::Error>().unwrap().error_code()
    }

    pub(crate) async fn create_topic(&mut self, name: &str, partitions: u32) -> Bytes {
        let request = msg::CreateTopic { name: name.to_owned(), partitions, ..Default::default() };
        let reply: msg::TopicReply = self.call(Api::CreateTopic, &request).await.unwrap();
        reply.topic.unwrap().id
    }

    pub(crate) async fn topic(&mut self, name: &str) -> Bytes {
        let request = msg::Metadata { topics: vec![name.to_owned()] };
        let reply: msg::MetadataReply = self.call(Api::Metadata, &request).await.unwrap();
        reply.topics[0].id.clone()
    }

    fn produce_request(topic: &Bytes, partition: u32, level: msg::Level, batch: &[u8]) -> msg::Produce {
        let entry = msg::ProduceEntry { topic_id: topic.clone(), partition, length: batch.len() as u32 };
        msg::Produce { level: level.into(), entries: vec![entry] }
    }

    pub(crate) fn send_produce(&mut self, topic: &Bytes, partition: u32, batch: BytesMut) -> u64 {
        let request = Self::produce_request(topic, partition, msg::Level::Synced, &batch);
        self.send(Api::Produce, &request, &batch)
    }

    pub(crate) async fn try_produce(
        &mut self,
        topic: &Bytes,
        partition: u32,
        batch: BytesMut,
    ) -> Result<msg::ProduceResult, msg::Error> {
        let request = Self::produce_request(topic, partition, msg::Level::Synced, &batch);
        let frame = self.exchange(Api::Produce, &request, &batch).await?;
        Ok(frame.decode_message::<msg::ProduceReply>().unwrap().results.remove(0))
    }

    pub(crate) async fn produce(
        &mut self,
        topic: &Bytes,
        partition: u32,
        level: msg::Level,
        batch: BytesMut,
    ) -> msg::ProduceResult {
        let request = Self::produce_request(topic, partition, level, &batch);
        let frame = self.exchange(Api::Produce, &request, &batch).await.unwrap();
        frame.decode_message::<msg::ProduceReply>().unwrap().results.remove(0)
    }

    /// Produces while a subscription is open on this connection.
    pub(crate) async fn produce_apart(&mut self, topic: &Bytes, partition: u32, batch: BytesMut) {
        let mut other = Self::open(self.socket.peer_addr().unwrap()).await;
        other.produce(topic, partition, msg::Level::Synced, batch).await;
    }

    pub(crate) async fn fetch(
        &mut self,
        topic: &Bytes,
        partition: u32,
        offset: u64,
        max_wait_ms: u32,
    ) -> (msg::FetchReply, Bytes) {
        let request =
            msg::Fetch { topic_id: topic.clone(), partition, offset, max_bytes: 8 << 20, max_wait_ms };
        let frame = self.exchange(Api::Fetch, &request, &[]).await.unwrap();
        (frame.decode_message().unwrap(), frame.payload.freeze())
    }

    /// Offsets of the next `count` pushed records.
    pub(crate) async fn pushed(&mut self, subscription: u64, count: usize) -> Vec<u64> {
        let mut offsets = Vec::new();
        while offsets.len() < count {
            let frame = self.push().await;
            assert_eq!((frame.api, frame.correlation), (u8::from(Api::Records), subscription));
            for batch in batch::split(&frame.payload.freeze()) {
                offsets.extend(batch::records(&batch.unwrap()).unwrap().map(|record| record.unwrap().offset));
            }
        }
        offsets
    }

    pub(crate) async fn create_share_group(&mut self, group: &str, topic: &str) {
        let request = msg::CreateShareGroup {
            group: group.to_owned(),
            topics: vec![topic.to_owned()],
            ..Default::default()
        };
        self.call::<msg::Empty>(Api::CreateShareGroup, &request).await.unwrap();
    }

    pub(crate) async fn share_subscribe(
        &mut self,
        subscription: u64,
        group: &str,
        member: &str,
        records: u32,
    ) {
        let request = msg::ShareSubscribe {
            subscription,
            group: group.to_owned(),
            member_id: member.to_owned(),
            credit_records: records,
            credit_bytes: 1 << 20,
            held: Vec::new(),
        };
        self.call::<msg::Empty>(Api::ShareSubscribe, &request).await.unwrap();
        assert!(self.pushes.is_empty(), "nothing is pushed before the reply");
    }

    /// The next push of leased records.
    pub(crate) async fn leased(&mut self, subscription: u64) -> (Vec<Lease>, Vec<Record>) {
        let frame = self.push().await;
        assert_eq!((frame.api, frame.correlation), (u8::from(Api::LeasedRecords), subscription));
        let push: msg::LeasedRecords = frame.decode_message().unwrap();
        let payload = frame.payload.freeze();
        let records: Vec<Record> = batch::split(&payload)
            .flat_map(|batch| batch::records(&batch.unwrap()).unwrap())
            .map(Result::unwrap)
            .collect();
        let leases = records
            .iter()
            .zip(push.first_sequence..)
            .map(|(record, sequence)| {
                (push.boot_epoch, sequence, push.topic_id.clone(), push.partition, record.offset)
            })
            .collect();
        (leases, records)
    }

    pub(crate) async fn settle(
        &mut self,
        group: &str,
        member: &str,
        leases: &[Lease],
        outcomes: &[msg::Outcome],
    ) -> Vec<msg::SettleResult> {
        let batches = leases
            .iter()
            .zip(outcomes)
            .map(|((boot_epoch, sequence, topic_id, partition, offset), outcome)| msg::SettleBatch {
                topic_id: topic_id.clone(),
                partition: *partition,
                boot_epoch: *boot_epoch,
                settlements: vec![msg::Settlement {
                    offset: *offset,
                    sequence: *sequence,
                    outcome: (*outcome).into(),
                    detail: None,
                }],
            })
            .collect();
        let request = msg::Settle {
            group: group.to_owned(),
            member_id: member.to_owned(),
            batches,
            level: msg::Level::Synced.into(),
        };
        self.call::<msg::SettleReply>(Api::Settle, &request).await.unwrap().results
    }

    /// Redrives all letters of a group and source topic; answers how that ended.
    pub(crate) async fn redrive(
        &mut self,
        group: &str,
        source_topic: &str,
        target: msg::RedriveTarget,
    ) -> msg::RedriveReply {
        let spec = msg::RedriveSpec {
            group: group.to_owned(),
            source_topic: source_topic.to_owned(),
            target: target.into(),
            ..Default::default()
        };
        let request = msg::Redrive { id: "all".to_owned(), spec: Some(spec), dry_run: false };
        let ended = async {
            loop {
                let redrive: msg::RedriveReply = self.call(Api::Redrive, &request).await.unwrap();
                if redrive.state() == msg::RedriveState::Done {
                    return redrive;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, ended).await.expect("the redrive in time")
    }

    /// The group's only dead-letter topic, once it has so many pending letters.
    pub(crate) async fn dead_letters(&mut self, group: &str, pending: u64) -> msg::DeadLetterTopic {
        let all = async {
            loop {
                let request = msg::ListDeadLetters { group: group.to_owned() };
                let mut reply: msg::ListDeadLettersReply =
                    self.call(Api::ListDeadLetters, &request).await.unwrap();
                let topic = reply.topics.remove(0);
                if topic.pending == pending {
                    return topic;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, all).await.expect("the letters in time")
    }
}
