//! One connection, from dialing to its end.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cocalc_core::{BoxError, stream::BoxStream};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use http::{HeaderValue, header};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{sync::mpsc, time::Instant};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Error as WsError, Message, client::IntoClientRequest},
};

use super::{
    lane::{Link, Sending, Shared, outcome},
    options::Tcp,
};
use crate::{
    chunk::{Assembler, Chunk},
    client::Dial,
    wire::{self, Decoder, Event, Frame, MESSAGE_BYTES_MAX, Packet},
};

/// How long to wait for the server's parameters to say otherwise.
const SILENCE_DEFAULT: Duration = Duration::from_secs(45);

/// The acknowledgement of what is subscribed to first; calls count from 1.
const RESUBSCRIBE: u64 = 0;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("no token to sign in with")]
    Credentials(#[source] BoxError),
    #[error("dialing the bus failed")]
    Dial(#[source] std::io::Error),
    #[error("the bus refused the connection")]
    Upgrade(#[source] WsError),
    #[error("connecting to the bus took too long")]
    Slow,
    #[error("signing in to the bus failed: {0}")]
    SignIn(String),
    #[error("the bus closed the connection")]
    Closed,
    #[error("the connection to the bus broke")]
    Broken(#[source] WsError),
    #[error("the bus fell silent")]
    Silent,
    #[error("the bus broke the protocol: {0}")]
    Protocol(String),
}

/// Connects, and stays connected as long as possible.
pub(super) async fn run(shared: &Arc<Shared>) -> Ended {
    let limit = Instant::now() + shared.options.connect_limit;
    match tokio::time::timeout_at(limit, dial(shared)).await {
        Err(_) => Ended::Slow,
        Ok(Err(ended)) => ended,
        Ok(Ok((ws, bearer))) => {
            let (sink, stream) = ws.split();
            let (frames, queue) = mpsc::unbounded_channel();
            let session = Session {
                shared,
                frames,
                stream,
                decoder: Decoder::default(),
                bearer,
                limit,
                silence: SILENCE_DEFAULT,
                phase: Phase::Opening,
                assembler: Assembler::new(shared.options.message_bytes_max),
            };
            tokio::select! {
                ended = write(queue, sink) => ended,
                ended = session.run() => ended,
            }
        }
    }
}

async fn dial(shared: &Shared) -> Result<(WebSocketStream<BoxStream>, String), Ended> {
    let bearer = shared.credentials.bearer().await.map_err(Ended::Credentials)?;
    let target = &shared.target;
    let io = match &shared.options.dial {
        Some(dial) => dial.dial(&target.host, target.port).await,
        None => Tcp.dial(&target.host, target.port).await,
    };
    let io = io.map_err(Ended::Dial)?;
    let mut request = target.uri.clone().into_client_request().map_err(Ended::Upgrade)?;
    if let Ok(mut value) = HeaderValue::try_from(format!("Bearer {bearer}")) {
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let config = crate::broker::ws_config();
    let (ws, _) = client_async_with_config(request, io, Some(config)).await.map_err(Ended::Upgrade)?;
    Ok((ws, bearer))
}

/// Writes what is queued.
async fn write(
    mut queue: mpsc::UnboundedReceiver<Sending>,
    mut sink: impl Sink<Message, Error = WsError> + Unpin,
) -> Ended {
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        // Each waited for a share of the queue, which is free again once it
        // has been handed on.
        while let Some((Frame { text, blob }, _share)) = next.take() {
            if let Err(error) = sink.feed(Message::Text(text)).await {
                return Ended::Broken(error);
            }
            if let Some(blob) = blob
                && let Err(error) = sink.feed(Message::Binary(blob)).await
            {
                return Ended::Broken(error);
            }
            next = queue.try_recv().ok();
        }
        if let Err(error) = sink.flush().await {
            return Ended::Broken(error);
        }
    }
    Ended::Closed
}

struct Session<'a, S> {
    shared: &'a Arc<Shared>,
    frames: mpsc::UnboundedSender<Sending>,
    stream: S,
    decoder: Decoder,
    bearer: String,
    /// When it has to be up.
    limit: Instant,
    /// For how long nothing may come.
    silence: Duration,
    phase: Phase,
    /// Replies, put together.
    assembler: Assembler,
}

enum Phase {
    /// Waits for the server's parameters.
    Opening,
    /// Waits to hear who we are.
    SigningIn,
    /// Waits for what was subscribed before.
    Subscribing { link: Link, patterns: Vec<String> },
    /// Is up, with this inbox.
    Up { inbox: Option<String> },
}

#[derive(Deserialize)]
struct Open {
    #[serde(rename = "pingInterval")]
    ping_interval: u64,
    #[serde(rename = "pingTimeout")]
    ping_timeout: u64,
}

#[derive(Deserialize)]
struct Info {
    max_payload: Option<usize>,
    user: Option<serde_json::Value>,
    inbox: Option<String>,
}

impl<S: Stream<Item = Result<Message, WsError>> + Unpin> Session<'_, S> {
    async fn run(mut self) -> Ended {
        loop {
            let mut until = Instant::now() + self.silence;
            let up = matches!(self.phase, Phase::Up { .. });
            if !up {
                until = until.min(self.limit);
            }
            let message = match tokio::time::timeout_at(until, self.stream.next()).await {
                Err(_) if up => return Ended::Silent,
                Err(_) => return Ended::Slow,
                Ok(None) => return Ended::Closed,
                Ok(Some(Err(error))) => return Ended::Broken(error),
                Ok(Some(Ok(message))) => message,
            };
            let packet = match message {
                Message::Text(text) => self.decoder.text(&text),
                Message::Binary(bytes) => self.decoder.binary(bytes).map(Some),
                Message::Close(_) => return Ended::Closed,
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            let result = match packet {
                Ok(Some(packet)) => self.packet(packet),
                Ok(None) => Ok(()),
                Err(error) => Err(Ended::Protocol(error.to_string())),
            };
            if let Err(ended) = result {
                return ended;
            }
        }
    }

    fn send(&self, frame: Frame) {
        // The writer ends together with this.
        let _ = self.frames.send((frame, None));
    }

    fn packet(&mut self, packet: Packet) -> Result<(), Ended> {
        match packet {
            Packet::Open(parameters) => {
                if let Ok(open) = serde_json::from_str::<Open>(parameters.get()) {
                    let silence = open.ping_interval.saturating_add(open.ping_timeout);
                    // A server must not make us wait for it forever.
                    self.silence = Duration::from_millis(silence.clamp(1000, 600_000));
                }
                let auth = serde_json::json!({ "bearer": self.bearer });
                self.send(Frame::text(format!("40{auth}")));
                self.phase = Phase::SigningIn;
            }
            Packet::Ping => self.send(Frame::text("3")),
            Packet::Event(event) if event.name == "info" => self.info(event)?,
            Packet::Event(event) => self.delivery(&event),
            Packet::Ack(ack) if ack.id == RESUBSCRIBE => self.subscribed(ack.argument),
            Packet::Ack(ack) => self.shared.answered(ack.id, ack.argument),
            Packet::ConnectError(error) => {
                let reason = error.map_or_else(String::new, |error| error.get().to_owned());
                return Err(Ended::SignIn(reason));
            }
            Packet::Close | Packet::Disconnect => return Err(Ended::Closed),
            Packet::Pong | Packet::Noop | Packet::Connect(_) | Packet::ConnectElsewhere(_) => {}
        }
        Ok(())
    }

    /// Learns who we are, and subscribes to what was subscribed before.
    fn info(&mut self, event: Event) -> Result<(), Ended> {
        if let Some(ack) = event.ack {
            self.send(wire::ack(ack, "", None));
        }
        // It is repeated until the broker knows that it came.
        if !matches!(self.phase, Phase::SigningIn) {
            return Ok(());
        }
        let argument = event.argument.as_deref().map_or("null", RawValue::get);
        let info: Info =
            serde_json::from_str(argument).map_err(|_| Ended::Protocol("malformed info".to_owned()))?;
        let user = info.user.unwrap_or_default();
        if let Some(error) = user.get("error") {
            let text = error.as_str().unwrap_or("no reason given");
            return Err(Ended::SignIn(text.strip_prefix("Error: ").unwrap_or(text).to_owned()));
        }
        let prefix = self.shared.options.inbox_prefix.clone().or(info.inbox);
        let prefix = prefix.unwrap_or_else(|| inbox_prefix(&user));
        let inbox = format!("{prefix}.{}", crate::random::name(10));
        let mut wanted = vec![(format!("{inbox}.*"), crate::random::name(10))];
        wanted.extend(self.shared.wanted());
        let items: Vec<_> = wanted
            .iter()
            .map(|(pattern, queue)| serde_json::json!({ "subject": pattern, "queue": queue }))
            .collect();
        let text = serde_json::Value::from(items).to_string();
        self.send(wire::event("subscribe", &text, Some(RESUBSCRIBE), None));
        let max_payload = info.max_payload.unwrap_or(MESSAGE_BYTES_MAX).clamp(1, MESSAGE_BYTES_MAX);
        let link = Link { frames: self.frames.clone(), inbox: Some(inbox), max_payload };
        let patterns = wanted.into_iter().map(|(pattern, _)| pattern).collect();
        self.phase = Phase::Subscribing { link, patterns };
        Ok(())
    }

    /// Is up, now that what was subscribed before is again.
    fn subscribed(&mut self, argument: Option<Box<RawValue>>) {
        let phase = std::mem::replace(&mut self.phase, Phase::Up { inbox: None });
        let Phase::Subscribing { mut link, patterns } = phase else {
            self.phase = phase;
            return;
        };
        let results: Vec<Box<RawValue>> =
            argument.and_then(|argument| serde_json::from_str(argument.get()).ok()).unwrap_or_default();
        for (place, (pattern, result)) in patterns.iter().zip(results).enumerate() {
            let Err(failure) = outcome(result) else { continue };
            if place == 0 {
                tracing::warn!(pattern, reason = failure.message, "no inbox: requests will fail");
                link.inbox = None;
            } else {
                self.shared.refused(pattern, &failure);
            }
        }
        self.phase = Phase::Up { inbox: link.inbox.clone() };
        self.shared.connect(link);
    }

    fn delivery(&mut self, event: &Event) {
        #[derive(Deserialize)]
        struct Delivery<'a> {
            subject: String,
            #[serde(borrow)]
            data: Vec<&'a RawValue>,
        }
        let argument = event.argument.as_deref().map_or("null", RawValue::get);
        if event.name == "permission" {
            tracing::debug!(%argument, "not permitted");
            return;
        }
        let Ok(Delivery { subject, data }) = serde_json::from_str(argument) else { return };
        let [id, seq, done, _encoding, _place, rest @ ..] = data.as_slice() else { return };
        let (Ok(id), Ok(seq)) = (serde_json::from_str::<String>(id.get()), serde_json::from_str(seq.get()))
        else {
            return;
        };
        let empty = Bytes::new();
        let chunk = Chunk {
            subject: &subject,
            id: &id,
            seq,
            done: matches!(done.get(), "1" | "true"),
            blob: event.blob.as_ref().unwrap_or(&empty),
            headers: rest.first().copied(),
        };
        let inbox = match &self.phase {
            Phase::Up { inbox } => inbox.as_deref(),
            _ => None,
        };
        if inbox.is_some_and(|inbox| event.name.strip_prefix(inbox) == Some(".*")) {
            if let Some(message) = self.assembler.push(&chunk, Instant::now()) {
                self.shared.replied(message);
            }
        } else {
            self.shared.delivered(&event.name, &chunk);
        }
    }
}

/// The inboxes of a user, at brokers that don't say.
fn inbox_prefix(user: &serde_json::Value) -> String {
    for kind in ["account", "project", "hub", "host"] {
        if let Some(id) = user.get(format!("{kind}_id")).and_then(serde_json::Value::as_str) {
            return format!("_INBOX.{kind}-{id}");
        }
    }
    "_INBOX".to_owned()
}
