//! The message bus: subjects, queue groups, request and reply.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::BoxError;

/// Publishes and subscribes as one identity.
///
/// Subjects are dot-separated tokens without white space. In a subscription
/// `*` is any one token, and `>` at the end is one or more.
///
/// # Contract
///
/// - Messages of one publisher arrive at each subscriber in their order.
/// - Each message reaches one member of every queue group that matches;
///   a subscription without a group is a group of its own.
/// - A subscriber that does not read loses its subscription, never single
///   messages: its queue is bounded in bytes.
/// - `publish` returns to how many groups it was delivered, after the fact.
/// - What the identity may not do is [`Denied`](Error::Denied), both ways.
#[async_trait]
pub trait Bus: fmt::Debug + Send + Sync + 'static {
    /// Sends `payload` to whoever subscribes to `subject`.
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error>;

    /// Receives what is published on subjects that match `pattern`, sharing it
    /// with the other members of `queue`, if given. In force on return.
    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error>;

    /// Publishes, and waits for one reply.
    async fn request(&self, subject: &str, payload: Payload, limit: Duration) -> Result<Message, Error>;

    /// Waits until somebody subscribes to `subject`; `false` when `limit` ran out.
    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error>;
}

#[async_trait]
impl<T: Bus + ?Sized> Bus for Arc<T> {
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        (**self).publish(subject, payload).await
    }

    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error> {
        (**self).subscribe(pattern, queue).await
    }

    async fn request(&self, subject: &str, payload: Payload, limit: Duration) -> Result<Message, Error> {
        (**self).request(subject, payload, limit).await
    }

    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error> {
        (**self).wait_for_interest(subject, limit).await
    }
}

/// What is sent.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Payload {
    /// The body, in JSON where nothing else was agreed.
    pub data: Bytes,
    /// Headers: JSON values by name. `CN-Reply` is where to reply.
    pub headers: BTreeMap<String, serde_json::Value>,
}

impl Payload {
    /// A JSON body without headers.
    ///
    /// # Errors
    ///
    /// Values that JSON cannot hold, such as maps with keys that aren't text.
    pub fn json(value: &impl serde::Serialize) -> Result<Self, serde_json::Error> {
        Ok(Self { data: serde_json::to_vec(value)?.into(), headers: BTreeMap::new() })
    }

    /// Reads the body as JSON.
    ///
    /// # Errors
    ///
    /// Bodies that are not JSON of that shape.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.data)
    }
}

/// What arrived.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Message {
    /// The subject it was published on.
    pub subject: String,
    /// What was sent.
    pub payload: Payload,
    /// The subject to reply to, if the sender waits for a reply.
    pub reply: Option<String>,
}

impl Message {
    /// What it counts for in a queue that is bounded in bytes.
    pub fn queued_bytes(&self) -> usize {
        // What a message costs besides its text: a header is small, and a
        // queue of empty messages must be bounded too.
        const OVERHEAD: usize = 64;
        let headers = self.payload.headers.keys().map(|name| name.len() + OVERHEAD).sum::<usize>();
        OVERHEAD + self.subject.len() + self.payload.data.len() + headers
    }
}

/// Messages as they come. Dropping it unsubscribes.
pub struct Subscription {
    receiver: Receiver,
    _registration: Box<dyn Send + Sync>,
}

enum Receiver {
    Counted(mpsc::Receiver<Message>),
    Sized { receiver: mpsc::UnboundedReceiver<Message>, queued: Arc<AtomicUsize> },
}

impl Subscription {
    /// Makes a subscription fed by the sender of `receiver`; `registration` is
    /// dropped with it.
    pub fn new(receiver: mpsc::Receiver<Message>, registration: impl Send + Sync + 'static) -> Self {
        Self { receiver: Receiver::Counted(receiver), _registration: Box::new(registration) }
    }

    /// Makes a subscription whose queue holds at most `bytes_max`, and what
    /// feeds it; `registration` is dropped with the subscription.
    pub fn bounded(bytes_max: usize, registration: impl Send + Sync + 'static) -> (Feed, Self) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let feed = Feed { sender, queued: queued.clone(), bytes_max };
        let receiver = Receiver::Sized { receiver, queued };
        (feed, Self { receiver, _registration: Box::new(registration) })
    }

    /// The next message; `None` when the subscription has ended, because the
    /// bus closed, access was revoked or the reader was too slow. Cancel safe.
    pub async fn next(&mut self) -> Option<Message> {
        match &mut self.receiver {
            Receiver::Counted(receiver) => receiver.recv().await,
            Receiver::Sized { receiver, queued } => {
                let message = receiver.recv().await?;
                queued.fetch_sub(message.queued_bytes(), Ordering::AcqRel);
                Some(message)
            }
        }
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}

/// What feeds a [`Subscription`] that is bounded in bytes. Dropping it ends
/// the subscription once what is queued has been read.
#[derive(Debug)]
pub struct Feed {
    sender: mpsc::UnboundedSender<Message>,
    queued: Arc<AtomicUsize>,
    bytes_max: usize,
}

impl Feed {
    /// Queues `message`, without waiting. `false` when the reader is gone or
    /// too far behind: then the feed has to be dropped, because a gap would
    /// break the contract. One message is always taken, however large.
    #[must_use]
    pub fn push(&self, message: Message) -> bool {
        let size = message.queued_bytes();
        let before = self.queued.fetch_add(size, Ordering::AcqRel);
        if before > 0 && before.saturating_add(size) > self.bytes_max {
            self.queued.fetch_sub(size, Ordering::AcqRel);
            return false;
        }
        self.sender.send(message).is_ok()
    }
}

/// Why a bus call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The subject or pattern is malformed.
    #[error("invalid subject {subject:?}")]
    InvalidSubject {
        /// What was given.
        subject: String,
    },
    /// This identity may not do that.
    #[error("not permitted to {action} {subject}")]
    Denied {
        /// `publish to` or `subscribe to`.
        action: &'static str,
        /// The subject or pattern.
        subject: String,
    },
    /// Nobody subscribes to it.
    #[error("nobody listens on {subject}")]
    NoInterest {
        /// The subject.
        subject: String,
    },
    /// No reply came in time.
    #[error("no reply on {subject} within {limit:?}")]
    TimedOut {
        /// The subject.
        subject: String,
        /// The limit.
        limit: Duration,
    },
    /// The message is larger than the bus carries.
    #[error("a message of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// Its size.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The connection is down.
    #[error("the bus is not connected")]
    Disconnected {
        /// Why, if known.
        source: Option<BoxError>,
    },
}
