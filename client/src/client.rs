//! The client: one connection, and what is known of topics.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use felucca_protocol::{Api, ErrorCode, message};
use parking_lot::Mutex;

use crate::admin::{Admin, Topic};
use crate::consumer::ConsumerBuilder;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::producer::ProducerBuilder;
use crate::share::ShareConsumerBuilder;

/// A connection to a broker that finds its way back by itself. Cheap to clone; all clones share it. The connection ends when
/// the last clone is dropped, and what was built from it.
///
/// ```no_run
/// use std::time::Duration;
/// use felucca_client::{Client, Result};
///
/// # async fn example() -> Result<()> {
/// let client = Client::builder("127.0.0.1:7650")
///     .client_name("billing")
///     .request_timeout(Duration::from_secs(5))
///     .connect()
///     .await?;
/// for topic in client.admin().topics().await? {
///     println!("{} has {} partitions", topic.name, topic.partitions);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) link: Link,
    topics: Arc<Mutex<Topics>>,
}

#[derive(Debug, Default)]
struct Topics {
    by_name: HashMap<Arc<str>, TopicRef>,
    by_id: HashMap<Bytes, TopicRef>,
}

/// What producing and consuming need to know of a topic.
#[derive(Clone, Debug)]
pub(crate) struct TopicRef {
    pub(crate) name: Arc<str>,
    pub(crate) id: Bytes,
    pub(crate) partitions: u32,
}

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    address: String,
    client_name: String,
    request_timeout: Duration,
}

impl ClientBuilder {
    /// The name that the broker's logs show.
    #[must_use]
    pub fn client_name(mut self, name: impl Into<String>) -> Self {
        self.client_name = name.into();
        self
    }

    /// How long a call waits for its answer, reconnects included; default 10 s.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Connects, trying for the request timeout. Afterwards the client reconnects for as long as it lives. Dropping the future
    /// ends the attempt. To be called within a tokio runtime.
    ///
    /// # Errors
    /// Why the last try failed. A broker that refuses this client (its version, say) is not tried again.
    pub async fn connect(self) -> Result<Client> {
        let link = Link::start(self.address, self.client_name, self.request_timeout);
        link.connected(self.request_timeout).await?;
        Ok(Client { link, topics: Arc::default() })
    }
}

impl Client {
    /// Connects to `host:port` with default settings. See [`ClientBuilder::connect`].
    ///
    /// # Errors
    /// The broker could not be reached within 10 s.
    pub async fn connect(address: impl Into<String>) -> Result<Self> {
        Self::builder(address).connect().await
    }

    /// Settings for a connection to `host:port`.
    pub fn builder(address: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            address: address.into(),
            client_name: "felucca-client".to_owned(),
            request_timeout: Duration::from_secs(10),
        }
    }

    /// Topics, groups, dead letters.
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// Sends records.
    pub fn producer(&self) -> ProducerBuilder {
        ProducerBuilder::new(self.clone())
    }

    /// Reads records in order.
    pub fn consumer(&self) -> ConsumerBuilder {
        ConsumerBuilder::new(self.clone())
    }

    /// Works through records one by one with the other members of a share group.
    pub fn share_consumer(&self, group: impl Into<String>) -> ShareConsumerBuilder {
        ShareConsumerBuilder::new(self.clone(), group.into())
    }

    /// The topic by name, from memory when it is known.
    pub(crate) async fn topic(&self, name: &str) -> Result<TopicRef> {
        let known = self.topics.lock().by_name.get(name).cloned();
        match known {
            Some(known) => Ok(known),
            None => self.look_up(name).await,
        }
    }

    /// The topic by name, as the broker knows it now.
    pub(crate) async fn look_up(&self, name: &str) -> Result<TopicRef> {
        let unknown = || Error::broker(ErrorCode::UnknownTopic, format!("topic {name:?} does not exist"));
        let request = message::Metadata { topics: vec![name.to_owned()] };
        let (reply, _): (message::MetadataReply, _) =
            self.link.ask_until(Api::Metadata, &request, Vec::new()).await?;
        let topic = reply.topics.into_iter().find(|topic| topic.name == name).ok_or_else(unknown)?;
        Ok(self.remember(Topic::from_message(topic)))
    }

    /// The topic by id; the broker is asked for all topics when it is not known.
    pub(crate) async fn topic_by_id(&self, id: &Bytes) -> Result<TopicRef> {
        if let Some(known) = self.topics.lock().by_id.get(id) {
            return Ok(known.clone());
        }
        let (reply, _): (message::MetadataReply, _) =
            self.link.ask_until(Api::Metadata, &message::Metadata { topics: Vec::new() }, Vec::new()).await?;
        for topic in reply.topics {
            self.remember(Topic::from_message(topic));
        }
        let known = self.topics.lock().by_id.get(id).cloned();
        known.ok_or_else(|| Error::broker(ErrorCode::UnknownTopic, "a topic that was deleted"))
    }

    fn remember(&self, topic: Topic) -> TopicRef {
        let topic = TopicRef { name: topic.name.into(), id: topic.id, partitions: topic.partitions };
        let mut topics = self.topics.lock();
        if let Some(before) = topics.by_name.insert(topic.name.clone(), topic.clone())
            && before.id != topic.id
        {
            topics.by_id.remove(&before.id);
        }
        topics.by_id.insert(topic.id.clone(), topic.clone());
        topic
    }

    /// Forgets a topic that turned out to be gone.
    pub(crate) fn forget_id(&self, id: &Bytes) {
        let mut topics = self.topics.lock();
        if let Some(topic) = topics.by_id.remove(id) {
            topics.by_name.remove(&topic.name);
        }
    }
}
