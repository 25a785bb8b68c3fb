//! Packets of engine.io 4 and socket.io 5, as text and binary frames.
//!
//! A packet is one text frame and at most one binary frame directly after it.
//! What an event carries stays raw JSON: the broker passes it on as it came.

use bytes::Bytes;
use serde_json::value::RawValue;
use tungstenite::Utf8Bytes;

use super::raw;

/// The deepest JSON that is accepted. Conat's own messages need five levels,
/// headers a few more.
const DEPTH_MAX: usize = 32;

/// The longest text frame, in bytes. Bodies travel in the binary frame.
pub const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// A packet as frames, ready to send. Cloning shares the bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frame {
    /// The text frame.
    pub text: Utf8Bytes,
    /// The binary frame that has to follow directly.
    pub blob: Option<Bytes>,
}

impl Frame {
    /// A packet without an attachment.
    pub fn text(text: impl Into<Utf8Bytes>) -> Self {
        Self { text: text.into(), blob: None }
    }
}

/// A packet, as read.
#[derive(Debug)]
pub enum Packet {
    /// engine.io: the server's parameters.
    Open(Box<RawValue>),
    /// engine.io: the connection ends.
    Close,
    /// engine.io: are you there?
    Ping,
    /// engine.io: I am.
    Pong,
    /// engine.io: nothing.
    Noop,
    /// socket.io: joins the namespace; the server answers with the same.
    Connect(Option<Box<RawValue>>),
    /// socket.io: joins a namespace that is not `/`.
    ConnectElsewhere(String),
    /// socket.io: leaves.
    Disconnect,
    /// socket.io: joining failed.
    ConnectError(Option<Box<RawValue>>),
    /// socket.io: something happened.
    Event(Event),
    /// socket.io: the answer to an event.
    Ack(Ack),
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Where the answer goes, if one is wanted.
    pub ack: Option<u64>,
    /// Its name.
    pub name: String,
    /// Its first argument; conat's events have no other.
    pub argument: Option<Box<RawValue>>,
    /// The attachment.
    pub blob: Option<Bytes>,
}

/// The answer to an event.
#[derive(Debug)]
pub struct Ack {
    /// To which.
    pub id: u64,
    /// The first value; conat's answers have no other.
    pub argument: Option<Box<RawValue>>,
    /// The attachment.
    pub blob: Option<Bytes>,
}

/// What a peer may not send.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// A packet type that doesn't exist, or not in this place.
    #[error("unknown packet type")]
    Type,
    /// The part before the JSON is malformed.
    #[error("malformed packet header")]
    Header,
    /// The JSON is malformed, or not what the packet type wants.
    #[error("malformed packet body")]
    Body,
    /// The JSON is nested too deeply.
    #[error("JSON nested deeper than {DEPTH_MAX}")]
    Depth,
    /// The text is too long.
    #[error("a text frame of {0} bytes")]
    TooLong(usize),
    /// More than one attachment, or an announced number that isn't one.
    #[error("{0} attachments where at most one is allowed")]
    Attachments(u64),
    /// The attachment has no place in the packet, or several.
    #[error("the attachment has no single place in its packet")]
    Placeholder,
    /// Another frame came before the attachment.
    #[error("a text frame while an attachment is pending")]
    Interleaved,
    /// An attachment came that nothing announced.
    #[error("a binary frame that nothing announced")]
    Unannounced,
}

/// Puts packets together from frames.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Option<Packet>,
}

impl Decoder {
    /// Takes a text frame. `None` when an attachment has to follow.
    ///
    /// # Errors
    ///
    /// Anything malformed; the connection has to end then.
    pub fn text(&mut self, text: &str) -> Result<Option<Packet>, PacketError> {
        if self.pending.is_some() {
            return Err(PacketError::Interleaved);
        }
        if text.len() > TEXT_BYTES_MAX {
            return Err(PacketError::TooLong(text.len()));
        }
        let Some(kind) = text.bytes().next() else { return Err(PacketError::Type) };
        // The first byte is ASCII in every branch that slices behind it.
        let rest = || text.get(1..).unwrap_or_default();
        Ok(Some(match kind {
            b'0' => Packet::Open(json(rest())?),
            b'1' => Packet::Close,
            b'2' => Packet::Ping,
            b'3' => Packet::Pong,
            b'6' => Packet::Noop,
            b'4' => match message(rest())? {
                (packet, false) => packet,
                (packet, true) => {
                    self.pending = Some(packet);
                    return Ok(None);
                }
            },
            _ => return Err(PacketError::Type),
        }))
    }

    /// Takes a binary frame, which completes a packet.
    ///
    /// # Errors
    ///
    /// Binary frames that nothing announced; the connection has to end then.
    pub fn binary(&mut self, bytes: Bytes) -> Result<Packet, PacketError> {
        let mut packet = self.pending.take().ok_or(PacketError::Unannounced)?;
        if let Packet::Event(Event { blob, .. }) | Packet::Ack(Ack { blob, .. }) = &mut packet {
            *blob = Some(bytes);
        }
        Ok(packet)
    }
}

/// Reads a socket.io packet, and whether an attachment follows.
fn message(text: &str) -> Result<(Packet, bool), PacketError> {
    let kind = text.bytes().next().ok_or(PacketError::Type)?;
    let mut rest = text.get(1..).ok_or(PacketError::Type)?;
    let mut attachments = 0;
    if matches!(kind, b'5' | b'6') {
        let (count, after) = rest.split_once('-').ok_or(PacketError::Header)?;
        attachments = number(count)?;
        rest = after;
    }
    if rest.starts_with('/') {
        let (namespace, after) = rest.split_once(',').unwrap_or((rest, ""));
        match kind {
            _ if namespace == "/" => rest = after,
            b'0' => return Ok((Packet::ConnectElsewhere(namespace.to_owned()), false)),
            _ => return Err(PacketError::Header),
        }
    }
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (id, body) = rest.split_at(digits);
    let id = if id.is_empty() { None } else { Some(number(id)?) };
    // A `0` in a count is legal, but says the same as a packet without one.
    if attachments > 1 {
        return Err(PacketError::Attachments(attachments));
    }
    let binary = attachments == 1;
    let packet = match kind {
        b'0' => Packet::Connect(optional(body)?),
        b'1' => Packet::Disconnect,
        b'4' => Packet::ConnectError(optional(body)?),
        b'2' | b'5' => {
            let mut items = array(body)?.into_iter();
            let name = items.next().ok_or(PacketError::Body)?;
            let name = serde_json::from_str(name.get()).map_err(|_| PacketError::Body)?;
            let argument = items.next();
            places(argument.as_deref(), items, binary)?;
            Packet::Event(Event { ack: id, name, argument, blob: None })
        }
        b'3' | b'6' => {
            let mut items = array(body)?.into_iter();
            let argument = items.next();
            places(argument.as_deref(), items, binary)?;
            Packet::Ack(Ack { id: id.ok_or(PacketError::Header)?, argument, blob: None })
        }
        _ => return Err(PacketError::Type),
    };
    Ok((packet, binary))
}

/// Checks that the attachment has exactly one place, and is in the first
/// argument. A placeholder that points nowhere would make the parser of
/// whoever receives the packet end *their* connection.
fn places(
    argument: Option<&RawValue>,
    others: impl Iterator<Item = Box<RawValue>>,
    binary: bool,
) -> Result<(), PacketError> {
    let found = argument.map_or(Some(0), raw::placeholders).ok_or(PacketError::Placeholder)?;
    for other in others {
        if raw::placeholders(&other) != Some(0) {
            return Err(PacketError::Placeholder);
        }
    }
    if found == usize::from(binary) { Ok(()) } else { Err(PacketError::Placeholder) }
}

fn number(digits: &str) -> Result<u64, PacketError> {
    // JavaScript counts exactly up to 2^53; sixteen digits hold that.
    if digits.is_empty() || digits.len() > 16 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(PacketError::Header);
    }
    digits.parse().map_err(|_| PacketError::Header)
}

fn optional(body: &str) -> Result<Option<Box<RawValue>>, PacketError> {
    if body.is_empty() { Ok(None) } else { json(body).map(Some) }
}

fn json(body: &str) -> Result<Box<RawValue>, PacketError> {
    shallow(body)?;
    serde_json::from_str(body).map_err(|_| PacketError::Body)
}

fn array(body: &str) -> Result<Vec<Box<RawValue>>, PacketError> {
    shallow(body)?;
    serde_json::from_str(body).map_err(|_| PacketError::Body)
}

/// Refuses deep nesting before any parser sees it: raw JSON is passed on to
/// parsers that may be recursive.
fn shallow(body: &str) -> Result<(), PacketError> {
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    for byte in body.bytes() {
        if quoted {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => quoted = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => quoted = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(PacketError::Depth);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Writes an event. `argument` is JSON; with a `blob` it holds the place for it.
pub fn event(name: &str, argument: &str, ack: Option<u64>, blob: Option<Bytes>) -> Frame {
    let mut text = head('2', '5', blob.is_some(), ack, name.len() + argument.len());
    text.push('[');
    raw::push_string(&mut text, name);
    text.push(',');
    text.push_str(argument);
    text.push(']');
    Frame { text: text.into(), blob }
}

/// Writes the answer to an event. `argument` is JSON; with a `blob` it holds
/// the place for it.
pub fn ack(id: u64, argument: &str, blob: Option<Bytes>) -> Frame {
    let mut text = head('3', '6', blob.is_some(), Some(id), argument.len());
    text.push('[');
    text.push_str(argument);
    text.push(']');
    Frame { text: text.into(), blob }
}

fn head(plain: char, binary: char, has_blob: bool, ack: Option<u64>, body: usize) -> String {
    let mut text = String::with_capacity(body + 32);
    text.push('4');
    if has_blob {
        text.push(binary);
        text.push_str("1-");
    } else {
        text.push(plain);
    }
    if let Some(ack) = ack {
        text.push_str(&ack.to_string());
    }
    text
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
