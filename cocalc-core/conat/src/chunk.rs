//! Messages larger than a frame: cut into chunks, and put together again.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use cocalc_core::bus::{Message, Payload};
use serde_json::value::RawValue;
use tokio::time::Instant;

use crate::router::Publication;

/// JSON, in conat's numbering of encodings.
const JSON: u8 = 1;

/// How long chunks of one message may pause.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// How many messages may be incomplete at once.
const PARTIAL_MAX: usize = 64;

/// The size of chunks, where frames may hold `max_payload`.
pub(crate) fn chunk_bytes(max_payload: usize) -> usize {
    // The rest is for the subject and the headers.
    max_payload.saturating_sub(100_000).max(1000)
}

/// Cuts a message into what is published.
pub(crate) fn cut(
    subject: &str,
    payload: Payload,
    chunk_bytes: usize,
) -> Result<Vec<Publication>, serde_json::Error> {
    let headers = if payload.headers.is_empty() {
        None
    } else {
        Some(serde_json::value::to_raw_value(&payload.headers)?)
    };
    let id = crate::random::name(10);
    let count = payload.data.len().div_ceil(chunk_bytes).max(1);
    let mut rest = payload.data;
    let chunks = (0..count).map(|place| Publication {
        subject: subject.to_owned(),
        id: id.clone(),
        seq: u64::try_from(place).unwrap_or(u64::MAX),
        done: place + 1 == count,
        encoding: JSON,
        blob: rest.split_to(rest.len().min(chunk_bytes)),
        headers: None,
    });
    let mut chunks: Vec<_> = chunks.collect();
    if let Some(last) = chunks.last_mut() {
        last.headers = headers;
    }
    Ok(chunks)
}

/// Puts the messages of one subscription together.
#[derive(Debug)]
pub(crate) struct Assembler {
    partial: HashMap<String, Partial>,
    bytes: usize,
    bytes_max: usize,
}

#[derive(Debug)]
struct Partial {
    subject: String,
    next_seq: u64,
    body: BytesMut,
    last: Instant,
}

/// A chunk, as it was delivered.
#[derive(Debug)]
pub(crate) struct Chunk<'a> {
    pub(crate) subject: &'a str,
    pub(crate) id: &'a str,
    pub(crate) seq: u64,
    pub(crate) done: bool,
    pub(crate) blob: &'a Bytes,
    pub(crate) headers: Option<&'a RawValue>,
}

impl<'a> From<&'a Publication> for Chunk<'a> {
    fn from(publication: &'a Publication) -> Self {
        Self {
            subject: &publication.subject,
            id: &publication.id,
            seq: publication.seq,
            done: publication.done,
            blob: &publication.blob,
            headers: publication.headers.as_deref(),
        }
    }
}

impl Assembler {
    /// Holds at most `bytes_max` of incomplete messages.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { partial: HashMap::new(), bytes: 0, bytes_max }
    }

    /// Takes a chunk; the message, if that completes one.
    pub(crate) fn push(&mut self, chunk: &Chunk<'_>, now: Instant) -> Option<Message> {
        if chunk.seq == 0 && chunk.done {
            return Some(message(chunk, chunk.blob.clone()));
        }
        self.partial.retain(|_, partial| {
            let fresh = now.duration_since(partial.last) < IDLE_MAX;
            if !fresh {
                self.bytes -= partial.body.len();
            }
            fresh
        });
        let mut partial = match self.partial.remove(chunk.id) {
            Some(partial) => partial,
            None if chunk.seq == 0 && self.partial.len() < PARTIAL_MAX => {
                Partial { subject: chunk.subject.to_owned(), next_seq: 0, body: BytesMut::new(), last: now }
            }
            None => return None,
        };
        self.bytes -= partial.body.len();
        let bytes = partial.body.len() + chunk.blob.len();
        // A gap means that a chunk was missed: the message is lost.
        if partial.next_seq != chunk.seq
            || partial.subject != chunk.subject
            || self.bytes + bytes > self.bytes_max
        {
            return None;
        }
        partial.body.extend_from_slice(chunk.blob);
        partial.next_seq += 1;
        partial.last = now;
        if chunk.done {
            return Some(message(chunk, partial.body.freeze()));
        }
        self.bytes += bytes;
        self.partial.insert(chunk.id.to_owned(), partial);
        None
    }
}

fn message(chunk: &Chunk<'_>, data: Bytes) -> Message {
    let headers: BTreeMap<String, serde_json::Value> =
        chunk.headers.and_then(|headers| serde_json::from_str(headers.get()).ok()).unwrap_or_default();
    let reply = headers.get("CN-Reply").and_then(|to| to.as_str()).map(str::to_owned);
    Message { subject: chunk.subject.to_owned(), payload: Payload { data, headers }, reply }
}
