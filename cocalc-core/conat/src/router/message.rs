//! What goes into the routing core, and what comes out.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;

use crate::wire::{Frame, event};

/// One connection, of whatever kind.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SocketId(pub u64);

/// One frame of a published message.
#[derive(Debug)]
pub struct Publication {
    /// The subject.
    pub subject: String,
    /// Names the message: its chunks have the same.
    pub id: String,
    /// The chunk's place, from 0.
    pub seq: u64,
    /// Whether it is the last chunk.
    pub done: bool,
    /// How the body is encoded; not looked at here.
    pub encoding: u8,
    /// The body, or a chunk of it.
    pub blob: Bytes,
    /// A JSON object, on the last chunk.
    pub headers: Option<Box<RawValue>>,
}

impl Publication {
    /// Where the publisher wants an answer.
    pub fn reply(&self) -> Option<String> {
        let text = self.headers.as_ref()?.get();
        // Most have none. Only with a backslash can the name be there in
        // another spelling.
        if !text.contains("CN-Reply") && !text.contains('\\') {
            return None;
        }
        let headers: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text).ok()?;
        headers.get("CN-Reply")?.as_str().map(str::to_owned)
    }

    /// What it counts for in queues.
    pub fn bytes(&self) -> usize {
        self.blob.len() + self.subject.len() + self.headers.as_ref().map_or(0, |headers| headers.get().len())
    }
}

/// A publication on its way to the subscribers of one pattern. Its frame is
/// encoded once, by whichever of them sends it first.
#[derive(Debug)]
pub struct Delivery {
    /// The pattern that they subscribed to.
    pub pattern: Arc<str>,
    /// What was published.
    pub publication: Arc<Publication>,
    frame: OnceLock<Frame>,
}

impl Delivery {
    /// Prepares the delivery of `publication` to subscribers of `pattern`.
    pub fn new(pattern: Arc<str>, publication: Arc<Publication>) -> Self {
        Self { pattern, publication, frame: OnceLock::new() }
    }

    /// The delivery as a frame.
    pub fn frame(&self) -> &Frame {
        self.frame.get_or_init(|| event::delivery(&self.pattern, &self.publication))
    }
}

/// What a socket asks for. Authorization has been decided: what was refused is
/// there as an `Err`.
#[derive(Debug)]
pub enum Request {
    /// Send this to whoever listens.
    Publish(Publication),
    /// Listen.
    Subscribe(Batch<Listen>),
    /// Listen no longer.
    Unsubscribe(Batch<String>),
    /// Say what this socket listens to.
    Subscriptions,
    /// Say when somebody listens.
    WaitForInterest {
        /// To this subject.
        subject: String,
        /// Give up after this.
        limit: Duration,
    },
    /// Offer to answer calls.
    Serve(Batch<Listen>),
    /// Answer them no longer.
    StopServing(Batch<String>),
    /// Call whoever answers.
    Call(Call),
    /// The answer to a call that this socket was given.
    Answer {
        /// Under which id it was given.
        id: u64,
        /// The answer.
        value: RawMessage,
    },
    /// Fails. What can be said without the core still keeps its place.
    Refuse(Failure),
    /// Answers this.
    Echo(Box<RawValue>),
    /// Sends a packet back to who asks. Through the core, so that it is
    /// counted in the queue of somebody who provokes many and reads none.
    Tell(Frame),
}

/// One item or several: the answer has the same shape.
#[derive(Debug)]
pub struct Batch<T> {
    /// What to do; an item that was refused is answered in its place.
    pub items: Vec<Result<T, Failure>>,
    /// Whether they came as an array.
    pub many: bool,
}

/// A pattern, and the group to share it with.
#[derive(Debug)]
pub struct Listen {
    /// Which subjects.
    pub pattern: String,
    /// With whom.
    pub queue: String,
}

/// A call of a service: a request without an inbox.
#[derive(Debug)]
pub struct Call {
    /// To whom.
    pub subject: String,
    /// Which event the service receives.
    pub kind: CallKind,
    /// The members of the event, besides `subject` and `pattern`.
    pub members: Vec<(&'static str, Box<RawValue>)>,
    /// The attachment.
    pub blob: Option<Bytes>,
    /// Give up after this.
    pub limit: Duration,
}

/// Which kind of call.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CallKind {
    /// `rpc`, answered through its acknowledgement.
    Plain,
    /// `fast-rpc`, the same with less in it.
    Fast,
    /// `rpc-raw`: answered by events that carry this id of the caller.
    Raw(String),
}

/// An argument as it came, with its attachment.
#[derive(Clone, Debug)]
pub struct RawMessage {
    /// The JSON.
    pub json: Box<RawValue>,
    /// Its attachment.
    pub blob: Option<Bytes>,
}

/// Why something was not done, in the words of the protocol.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// For programs, as HTTP would have it.
    pub code: u16,
    /// For people.
    pub message: String,
}

impl Failure {
    /// Something that makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { code: 400, message: message.into() }
    }

    /// A subject or pattern that is malformed.
    pub fn subject() -> Self {
        Self::invalid("invalid subject")
    }

    /// Too large.
    pub fn too_large(limit: usize) -> Self {
        Self { code: 413, message: format!("message is over the limit of {limit} bytes") }
    }
}

/// What is sent to a socket.
#[derive(Clone, Debug)]
pub enum Outgoing {
    /// A message that it subscribed to.
    Delivery(Arc<Delivery>),
    /// The answer to a request.
    Reply {
        /// Which request.
        ack: u64,
        /// The answer.
        reply: Reply,
    },
    /// A packet that only its peer understands.
    Frame(Frame),
    /// A packet that the driver sends on its own account, and doesn't count:
    /// there is one of a kind at a time.
    Aside(Frame),
}

impl Outgoing {
    /// What it counts for in queues.
    pub fn bytes(&self) -> usize {
        /// What even an empty packet costs.
        const OVERHEAD: usize = 128;
        match self {
            Self::Delivery(delivery) => OVERHEAD + delivery.pattern.len() + delivery.publication.bytes(),
            Self::Reply { reply, .. } => OVERHEAD + reply.bytes(),
            Self::Frame(frame) => OVERHEAD + frame.text.len() + frame.blob.as_ref().map_or(0, Bytes::len),
            Self::Aside(_) => 0,
        }
    }

    /// Encodes it.
    pub fn frame(&self) -> Frame {
        match self {
            Self::Delivery(delivery) => delivery.frame().clone(),
            Self::Reply { ack, reply } => event::reply(*ack, reply),
            Self::Frame(frame) | Self::Aside(frame) => frame.clone(),
        }
    }
}

/// The answer to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// It was delivered to so many groups.
    Published {
        /// Of those, patterns `>` don't count.
        count: usize,
        /// How long it took.
        times: Times,
    },
    /// What became of each subscription; `true` if it is new.
    Subscribed {
        /// In the order of the request.
        items: Vec<Result<bool, Failure>>,
        /// Whether the request was an array.
        many: bool,
    },
    /// Done, for so many items.
    Unsubscribed {
        /// How many.
        items: usize,
        /// Whether the request was an array.
        many: bool,
    },
    /// What the socket listens to.
    Subscriptions(Vec<Arc<str>>),
    /// Whether somebody listens.
    Interest(bool),
    /// The answer of a service.
    Answered {
        /// What it said.
        value: RawMessage,
        /// How long that took.
        times: Times,
    },
    /// It was not done.
    Failed(Failure),
    /// This.
    Echo(Box<RawValue>),
}

impl Reply {
    fn bytes(&self) -> usize {
        match self {
            Self::Published { .. } | Self::Unsubscribed { .. } | Self::Interest(_) => 0,
            Self::Subscribed { items, .. } => items.len() * 32,
            Self::Subscriptions(patterns) => patterns.iter().map(|pattern| pattern.len() + 4).sum(),
            Self::Answered { value, .. } => {
                value.json.get().len() + value.blob.as_ref().map_or(0, Bytes::len)
            }
            Self::Failed(failure) => failure.message.len(),
            Self::Echo(value) => value.get().len(),
        }
    }
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Times {
    /// Deciding whether it is permitted.
    pub auth: Duration,
    /// Waiting for the core, and routing.
    pub route: Duration,
    /// Waiting for the service that was called.
    pub target: Option<Duration>,
}
