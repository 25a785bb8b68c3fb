//! One connection: reads requests, authorizes them in order, and writes what
//! the core has for it.

use std::{sync::Arc, time::Duration};

use cocalc_core::subject::Access;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::Instant,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message,
        protocol::{Role, WebSocketConfig},
    },
};

use super::{
    Ended, Handshake, Identity, Shared,
    core::{CloseSignal, Command, Control, Outbox},
    info,
    signing_in::Newcomer,
};
use crate::{
    router::{Closed, Failure, Outgoing, RawMessage, Received, Request, SocketId},
    wire::{self, Decoder, Frame, MESSAGE_BYTES_MAX, Packet, event},
};

/// How much is put together before it is flushed.
const FLUSH_BYTES: usize = 256 * 1024;

/// How long a client that could not sign in has to read why.
const REFUSED_PAUSE: Duration = Duration::from_millis(25);

/// Acknowledgements below this belong to `info`; the core counts from above.
const INFO_ACKS: u64 = 1000;

pub(crate) fn ws_config() -> WebSocketConfig {
    WebSocketConfig::default()
        // Both are allocated for each connection, and most are idle.
        .read_buffer_size(16 * 1024)
        .write_buffer_size(16 * 1024)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

/// Runs a connection to its end; `part` was read behind the upgrade request.
#[tracing::instrument(name = "conat.connection", skip_all, fields(peer = ?handshake.peer))]
pub(super) async fn run(
    shared: Arc<Shared>,
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    part: Vec<u8>,
    handshake: Handshake,
) -> Ended {
    let socket = shared.socket();
    let newcomer = Newcomer::enter(&shared, socket, &handshake);
    // Those that say nothing don't keep out who shows at once who it is.
    let known = match (newcomer.has_place(), &handshake.bearer) {
        (true, _) => None,
        (false, Some(_)) => match sign_in(&shared, &handshake, &Value::Null).await {
            Ok(signed_in) => Some(signed_in),
            Err(_) => return Ended::Busy,
        },
        (false, None) => return Ended::Busy,
    };
    let ws = WebSocketStream::from_partially_read(io, part, Role::Server, Some(ws_config())).await;
    let (sink, stream) = ws.split();
    let (queue, outbox) = mpsc::unbounded_channel();
    let closed = Arc::new(CloseSignal::default());
    let forget = Forget { shared: shared.clone(), socket };
    let reader = Reader {
        shared: shared.clone(),
        socket,
        queue,
        closed: closed.clone(),
        decoder: Decoder::default(),
        stream,
        ping: Ping::Idle(Instant::now() + shared.config.ping_interval),
    };
    let ended = tokio::select! {
        // Whatever the two are in the middle of, it ends there.
        reason = closed.closed() => Ended::Closed(reason),
        () = write(&shared, socket, outbox, sink) => Ended::ByPeer,
        ended = reader.run(&handshake, newcomer, known) => ended,
    };
    if !matches!(ended, Ended::Closed(_)) {
        // In order behind the last request. The guard does it otherwise.
        let _ = shared.commands.send(Command::Close { socket }).await;
    }
    drop(forget);
    tracing::debug!(?ended, "connection ended");
    ended
}

/// Makes the core forget the socket, also when the connection's future is
/// dropped.
struct Forget {
    shared: Arc<Shared>,
    socket: SocketId,
}

impl Drop for Forget {
    fn drop(&mut self) {
        let _ = self.shared.control.send(Control::Close { socket: self.socket });
    }
}

/// Writes what is queued until there will be no more, or it cannot be sent.
async fn write(
    shared: &Shared,
    socket: SocketId,
    mut outbox: mpsc::UnboundedReceiver<Outgoing>,
    mut sink: impl Sink<Message, Error = WsError> + Unpin,
) {
    while let Some(first) = outbox.recv().await {
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(outgoing) = next.take() {
            bytes += outgoing.bytes();
            let Frame { text, blob } = outgoing.frame();
            if sink.feed(Message::Text(text)).await.is_err() {
                return;
            }
            if let Some(blob) = blob
                && sink.feed(Message::Binary(blob)).await.is_err()
            {
                return;
            }
            if bytes < FLUSH_BYTES {
                next = outbox.try_recv().ok();
            }
        }
        if sink.flush().await.is_err() || shared.control.send(Control::Wrote { socket, bytes }).is_err() {
            return;
        }
    }
    let _ = sink.close().await;
}

/// Who it is, and its place among the connections.
type SignedIn = (Identity, super::Admitted);

async fn sign_in(shared: &Arc<Shared>, handshake: &Handshake, auth: &Value) -> Result<SignedIn, Failure> {
    let answer = shared.authorizer.sign_in(handshake, auth);
    let identity = match tokio::time::timeout(shared.config.authorize_limit, answer).await {
        Ok(Ok(identity)) => identity,
        Ok(Err(message)) => return Err(Failure { code: 401, message }),
        Err(_) => return Err(Failure { code: 503, message: "signing in took too long".to_owned() }),
    };
    let admitted = shared
        .admit(&identity)
        .ok_or_else(|| Failure { code: 429, message: "too many connections".to_owned() })?;
    Ok((identity, admitted))
}

struct Reader<S> {
    shared: Arc<Shared>,
    socket: SocketId,
    queue: mpsc::UnboundedSender<Outgoing>,
    closed: Arc<CloseSignal>,
    decoder: Decoder,
    stream: S,
    ping: Ping,
}

/// Whether we are waiting for a sign of life.
enum Ping {
    /// Ask then.
    Idle(Instant),
    /// Asked; give up then.
    Asked(Instant),
}

/// `info`, until it is acknowledged.
struct InfoTimer {
    text: String,
    next_ack: u64,
    again: Instant,
    limit: Instant,
}

/// What ended waiting for a packet.
enum Next {
    Packet(Packet),
    /// The instant that was given.
    Time,
    Ended(Ended),
}

impl<S: Stream<Item = Result<Message, WsError>> + Unpin> Reader<S> {
    /// `known` has signed in by its upgrade request.
    async fn run(mut self, handshake: &Handshake, newcomer: Newcomer, known: Option<SignedIn>) -> Ended {
        let config = &self.shared.config;
        let open = serde_json::json!({
            "sid": crate::random::name(20),
            "upgrades": [],
            "pingInterval": millis(config.ping_interval),
            "pingTimeout": millis(config.ping_timeout),
            "maxPayload": MESSAGE_BYTES_MAX,
        });
        self.send(Frame::text(format!("0{open}")));

        let auth = match self.connect().await {
            Ok(auth) => auth,
            Err(ended) => return ended,
        };
        let id = crate::random::name(20);
        self.send(Frame::text(format!("40{}", serde_json::json!({ "sid": id }))));

        let signed_in = match known {
            Some(signed_in) => Ok(signed_in),
            None => sign_in(&self.shared, handshake, &auth).await,
        };
        let (identity, admitted) = match signed_in {
            Ok(signed_in) => signed_in,
            Err(failure) => return self.refuse(&id, failure).await,
        };
        let outbox = Outbox { queue: self.queue.clone(), closed: self.closed.clone() };
        if !self.shared.open(self.socket, &identity, outbox).await {
            return Ended::Closed(Closed::Shutdown);
        }
        if !newcomer.finish(&identity) {
            return Ended::Closed(Closed::Revoked);
        }
        let ended = self.serve(&identity, &id).await;
        drop(admitted);
        ended
    }

    /// Waits for the first packet.
    async fn connect(&mut self) -> Result<Value, Ended> {
        let limit = Instant::now() + self.shared.config.connect_limit;
        match self.next(Some(limit)).await {
            Next::Packet(Packet::Connect(auth)) => {
                let auth = auth.and_then(|auth| serde_json::from_str(auth.get()).ok());
                Ok(auth.unwrap_or(Value::Null))
            }
            Next::Packet(Packet::ConnectElsewhere(namespace)) => {
                self.send(no_namespace(&namespace));
                tokio::time::sleep(REFUSED_PAUSE).await;
                Err(Ended::Protocol("a namespace that isn't `/`".to_owned()))
            }
            Next::Packet(_) => Err(Ended::Protocol("a packet before CONNECT".to_owned())),
            Next::Time => Err(Ended::Silent),
            Next::Ended(ended) => Err(ended),
        }
    }

    /// Says why, leaves time to read it, and ends.
    async fn refuse(&mut self, id: &str, failure: Failure) -> Ended {
        let text = info(Err(&failure), id).to_string();
        self.send(wire::event("info", &text, Some(0), None));
        tokio::time::sleep(REFUSED_PAUSE).await;
        self.send(Frame::text("41"));
        tokio::time::sleep(REFUSED_PAUSE).await;
        Ended::Refused(failure.message)
    }

    /// Takes requests until the end.
    async fn serve(&mut self, identity: &Identity, id: &str) -> Ended {
        let config = self.shared.config.clone();
        let start = Instant::now();
        let mut timer = Some(InfoTimer {
            text: info(Ok(identity), id).to_string(),
            next_ack: 0,
            again: start,
            limit: start + config.info_limit,
        });
        loop {
            if let Some(info) = &mut timer
                && info.again <= Instant::now()
            {
                if info.limit <= info.again {
                    return Ended::Silent;
                }
                let frame = wire::event("info", &info.text, Some(info.next_ack), None);
                info.next_ack = (info.next_ack + 1) % INFO_ACKS;
                info.again += config.info_interval;
                self.send(frame);
            }
            match self.next(timer.as_ref().map(|info| info.again)).await {
                Next::Time => {}
                Next::Ended(ended) => return ended,
                Next::Packet(Packet::Event(event)) => {
                    if let Err(ended) = self.event(identity, event).await {
                        return ended;
                    }
                }
                Next::Packet(Packet::Ack(ack)) if ack.id < INFO_ACKS => timer = None,
                Next::Packet(Packet::Ack(ack)) => {
                    let Some(json) = ack.argument else { continue };
                    let value = RawMessage { json, blob: ack.blob };
                    let request = Request::Answer { id: ack.id, value };
                    if let Err(ended) = self.ask_core(None, request, Instant::now(), Duration::ZERO).await {
                        return ended;
                    }
                }
                Next::Packet(Packet::Disconnect) => return Ended::ByPeer,
                Next::Packet(Packet::ConnectElsewhere(namespace)) => {
                    let tell = Request::Tell(no_namespace(&namespace));
                    if let Err(ended) = self.ask_core(None, tell, Instant::now(), Duration::ZERO).await {
                        return ended;
                    }
                }
                Next::Packet(_) => return Ended::Protocol("a packet of the wrong kind".to_owned()),
            }
        }
    }

    async fn event(&mut self, identity: &Identity, event: wire::Event) -> Result<(), Ended> {
        let ack = event.ack;
        let arrived = Instant::now();
        let Some(mut request) = event::request(event) else { return Ok(()) };
        for (subject, access) in self.shared.authorize(identity, &mut request).await {
            let kind = match access {
                Access::Publish => "pub",
                Access::Subscribe => "sub",
            };
            let message = super::denied(&subject, access).message;
            let text =
                serde_json::json!({ "message": message, "subject": subject, "type": kind }).to_string();
            let tell = Request::Tell(wire::event("permission", &text, None, None));
            self.ask_core(None, tell, arrived, Duration::ZERO).await?;
        }
        self.ask_core(ack, request, arrived, arrived.elapsed()).await
    }

    async fn ask_core(
        &self,
        ack: Option<u64>,
        request: Request,
        arrived: Instant,
        auth: Duration,
    ) -> Result<(), Ended> {
        let received = Received {
            socket: self.socket,
            ack,
            request,
            at: arrived.duration_since(self.shared.started),
            auth,
        };
        if self.shared.ask(received).await { Ok(()) } else { Err(Ended::Closed(Closed::Shutdown)) }
    }

    /// The next packet that isn't about the connection itself.
    async fn next(&mut self, limit: Option<Instant>) -> Next {
        loop {
            let ping = match self.ping {
                Ping::Idle(at) | Ping::Asked(at) => at,
            };
            let until = limit.map_or(ping, |limit| limit.min(ping));
            let message = tokio::select! {
                message = self.stream.next() => message,
                () = tokio::time::sleep_until(until) => {
                    let now = Instant::now();
                    if now >= ping {
                        match self.ping {
                            Ping::Asked(_) => return Next::Ended(Ended::Silent),
                            Ping::Idle(_) => {
                                self.send(Frame::text("2"));
                                self.ping = Ping::Asked(now + self.shared.config.ping_timeout);
                            }
                        }
                    }
                    if limit.is_some_and(|limit| now >= limit) {
                        return Next::Time;
                    }
                    continue;
                }
            };
            // Whatever came, somebody is there.
            self.ping = Ping::Idle(Instant::now() + self.shared.config.ping_interval);
            let packet = match message {
                None => return Next::Ended(Ended::ByPeer),
                Some(Err(WsError::Io(_) | WsError::ConnectionClosed)) => return Next::Ended(Ended::ByPeer),
                Some(Err(error)) => return Next::Ended(Ended::Protocol(error.to_string())),
                Some(Ok(Message::Text(text))) => self.decoder.text(&text),
                Some(Ok(Message::Binary(bytes))) => self.decoder.binary(bytes).map(Some),
                Some(Ok(Message::Close(_))) => return Next::Ended(Ended::ByPeer),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            };
            match packet {
                Ok(None | Some(Packet::Pong | Packet::Noop)) => {}
                Ok(Some(Packet::Close)) => return Next::Ended(Ended::ByPeer),
                Ok(Some(packet)) => return Next::Packet(packet),
                Err(error) => return Next::Ended(Ended::Protocol(error.to_string())),
            }
        }
    }

    /// Queues what doesn't come from the core: little, and one at a time.
    fn send(&self, frame: Frame) {
        let _ = self.queue.send(Outgoing::Aside(frame));
    }
}

fn no_namespace(namespace: &str) -> Frame {
    let body = serde_json::json!({ "message": "Invalid namespace" });
    Frame::text(format!("44{namespace},{body}"))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
