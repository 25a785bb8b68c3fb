//! A terminal over WebSocket.
//!
//! Binary messages are what is typed, and what is shown. Text messages are
//! JSON: of the page `{"seen":place}` and `{"resize":{"cols":80,"rows":24}}`,
//! of the host `hello`, `taken`, `skipped`, `idle` and `ended`.

use std::{future::Future, time::Duration};

use bytes::Bytes;
use cocalc_core::{
    activity::{Meter, Source, Use, Warning},
    runner::{Exit, WindowSize},
    stream::BoxStream,
};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::terminals::{Attached, Ended, News};
use crate::websocket::Stop;

const CHUNK_BYTES: usize = 16 * 1024;
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// How often the far side is asked whether it is there, and how long it may
/// say nothing at all.
const PING: Duration = Duration::from_secs(30);
const SILENCE_MAX: Duration = Duration::from_secs(100);
/// How long one message may take to leave.
const SEND_LIMIT: Duration = Duration::from_secs(60);
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Serves one connection until either side, the terminal or `stop` ends it.
pub(crate) async fn serve(
    stream: BoxStream,
    looks: Attached,
    meter: Option<Meter>,
    stop: impl Future<Output = Stop>,
) {
    let config = WebSocketConfig::default()
        .read_buffer_size(4 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MESSAGE_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    let (code, reason) = tokio::select! {
        stop = stop => match stop {
            Stop::Revoked => (CloseCode::Policy, "access was withdrawn"),
            Stop::Draining => (CloseCode::Away, "the host is going down"),
            Stop::Now => return,
        },
        end = talk(&mut socket, looks, meter) => match end {
            Some(end) => end,
            None => return,
        },
    };
    let frame = CloseFrame { code, reason: reason.into() };
    // Who does not take it sees the connection end.
    let _ = timeout(CLOSE_LIMIT, async {
        socket.close(Some(frame)).await?;
        while socket.next().await.is_some_and(|message| message.is_ok()) {}
        Ok::<_, tokio_tungstenite::tungstenite::Error>(())
    })
    .await;
}

type Socket = WebSocketStream<BoxStream>;

async fn send(socket: &mut Socket, message: Message) -> Option<()> {
    timeout(SEND_LIMIT, socket.send(message)).await.ok()?.ok()
}

async fn say(socket: &mut Socket, what: Value) -> Option<()> {
    send(socket, Message::text(what.to_string())).await
}

/// How the connection is to be closed; `None` if it is gone.
async fn talk(
    socket: &mut Socket,
    mut looks: Attached,
    meter: Option<Meter>,
) -> Option<(CloseCode, &'static str)> {
    let typed = meter.as_ref().map(|meter| meter.tap(Source::WebSocket, Use::Work));
    // What it shows is seen by nobody, perhaps.
    let shown = meter.as_ref().map(|meter| meter.tap(Source::WebSocket, Use::Presence));
    let mut warnings = meter.as_ref().map(Meter::warnings);
    let (id, at, resumed) = looks.hello();
    let hello = json!({ "hello": { "terminal": id, "at": at, "resumed": resumed } });
    say(socket, hello).await?;
    let (mut heard, mut pings) = (Instant::now(), tokio::time::interval(PING));
    let mut warned = None;
    loop {
        tokio::select! {
            message = socket.next() => {
                heard = Instant::now();
                match message?.ok()? {
                    Message::Binary(bytes) => {
                        if !looks.typed(&bytes) {
                            return Some((CloseCode::Again, "more was typed than the shell reads"));
                        }
                        typed.iter().for_each(cocalc_core::activity::Tap::moved);
                    }
                    Message::Text(text) => {
                        if steer(&looks, &text).is_none() {
                            return Some((CloseCode::Unsupported, "not a message of a terminal"));
                        }
                    }
                    Message::Close(_) => return None,
                    Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
                }
            }
            news = looks.news(CHUNK_BYTES) => match news {
                News::Shown(bytes) => {
                    shown.iter().for_each(cocalc_core::activity::Tap::moved);
                    send(socket, Message::Binary(Bytes::from(bytes))).await?;
                }
                News::Skipped(bytes) => say(socket, json!({ "skipped": bytes })).await?,
                News::Taken(bytes) => say(socket, json!({ "taken": bytes })).await?,
                News::Ended(ended) => {
                    say(socket, json!({ "ended": words(&ended) })).await?;
                    return Some((CloseCode::Normal, "the terminal has ended"));
                }
            },
            warning = changed(&mut warnings, &warned) => {
                let idle = warning.as_ref().map(|warning| json!({
                    "secs": meter.as_ref().and_then(Meter::stops_in).map(|left| left.as_secs()),
                    "text": warning.text,
                }));
                warned = warning;
                say(socket, json!({ "idle": idle })).await?;
            }
            _ = pings.tick() => {
                if heard.elapsed() > SILENCE_MAX {
                    return None;
                }
                send(socket, Message::Ping(Bytes::new())).await?;
            }
        }
    }
}

/// Waits until there is a warning where there was none, or the other way round.
async fn changed(
    warnings: &mut Option<watch::Receiver<Option<Warning>>>,
    known: &Option<Warning>,
) -> Option<Warning> {
    if let Some(warnings) = warnings {
        let news = warnings.wait_for(|now| now.is_some() != known.is_some()).await;
        if let Ok(now) = news {
            return now.clone();
        }
    }
    std::future::pending().await
}

/// Does what a text message asks for; `None` if it makes no sense.
fn steer(looks: &Attached, text: &str) -> Option<()> {
    let asked: Value = serde_json::from_str(text).ok()?;
    if let Some(place) = asked.get("seen") {
        looks.seen(place.as_u64()?);
        return Some(());
    }
    let size = asked.get("resize")?;
    let number = |name| {
        let number = u16::try_from(size.get(name)?.as_u64()?).ok()?;
        (1..=1000).contains(&number).then_some(number)
    };
    looks.resize(WindowSize { cols: number("cols")?, rows: number("rows")? });
    Some(())
}

fn words(ended: &Ended) -> Value {
    match ended {
        Ended::Exited(Exit::Code(code)) => json!({ "why": "exited", "code": code }),
        Ended::Exited(Exit::Signal(signal)) => json!({ "why": "exited", "signal": signal }),
        Ended::Closed => json!({ "why": "closed" }),
        Ended::ProjectStopped => json!({ "why": "stopped" }),
    }
}
