//! WebSocket handshakes, and the bytes that follow them.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::Engine;
use cocalc_core::{
    activity::{Meter, Source, Tap, Use},
    stream::{BoxStream, ByteStream, Notice, Noticed},
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use sha1::{Digest, Sha1};
use tokio::{
    io::{AsyncWriteExt, ReadBuf},
    time::timeout,
};

use crate::{
    activity::Activity,
    body::Body,
    headers::{has_connection_option, single},
    problem::Problem,
};

/// How a request wants to go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Wish {
    Plain,
    /// Asks for another protocol that is not offered, and gets an ordinary
    /// answer, after which the connection ends.
    Refused,
    WebSocket,
}

/// What `parts` asks for. The only protocol to switch to is WebSocket.
pub(crate) fn wish(parts: &Parts, has_body: bool) -> Result<Wish, Problem> {
    let headers = &parts.headers;
    let Some(upgrade) = headers.get(header::UPGRADE) else { return Ok(Wish::Plain) };
    if !upgrade.as_bytes().eq_ignore_ascii_case(b"websocket")
        || headers.get_all(header::UPGRADE).iter().count() > 1
        || !has_connection_option(headers, "upgrade")
        || parts.version != http::Version::HTTP_11
    {
        return Ok(Wish::Refused);
    }
    if parts.method != Method::GET || has_body {
        return Err(Problem::bad_request("A WebSocket begins with a GET without a body."));
    }
    if single(headers, &header::SEC_WEBSOCKET_VERSION) != Some("13") {
        let problem =
            Problem::new(StatusCode::UPGRADE_REQUIRED, "websocket_version", "The WebSocket version is 13.");
        return Err(Problem { close: true, ..problem }.header("sec-websocket-version", "13".to_owned()));
    }
    let key = single(headers, &header::SEC_WEBSOCKET_KEY).unwrap_or_default();
    let sixteen = base64::engine::general_purpose::STANDARD.decode(key).is_ok_and(|key| key.len() == 16);
    if !sixteen {
        return Err(Problem::bad_request("The WebSocket key is not 16 bytes."));
    }
    Ok(Wish::WebSocket)
}

/// The answer that switches to WebSocket, for endpoints that speak it here.
pub(crate) fn accept(parts: &Parts) -> Response<Body> {
    let mut hash = Sha1::new();
    if let Some(key) = parts.headers.get(header::SEC_WEBSOCKET_KEY) {
        hash.update(key.as_bytes());
    }
    hash.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = base64::engine::general_purpose::STANDARD.encode(hash.finalize());
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    switching(headers);
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    response
}

/// Sets the fields of either side of a switch.
pub(crate) fn switching(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    // Neither side has a body.
    headers.remove(header::TE);
    headers.remove(header::TRAILER);
}

/// Whether an upstream's answer really switches to WebSocket.
pub(crate) fn is_switched(status: StatusCode, headers: &HeaderMap) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS
        && headers
            .get(header::UPGRADE)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Why a WebSocket is ended from here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stop {
    Revoked,
    Draining,
    /// At once, without a word.
    Now,
}

impl Stop {
    /// The close frame, from server to client.
    fn frame(self) -> Option<[u8; 4]> {
        let code: u16 = match self {
            Self::Revoked => 1008,
            Self::Draining => 1001,
            Self::Now => return None,
        };
        let [high, low] = code.to_be_bytes();
        Some([0x88, 2, high, low])
    }
}

/// How long a side may take to finish once the other one has.
const LINGER: Duration = Duration::from_secs(5);

/// Copies between the user's and the app's side until one ends, nothing moves
/// for `idle`, or `stop` resolves; then the user is told by a close frame, if
/// that doesn't fall into another frame.
pub(crate) async fn splice(
    mut client: BoxStream,
    mut upstream: BoxStream,
    idle: Duration,
    meter: Option<Meter>,
    stop: impl Future<Output = Stop>,
) {
    // What an app shows is seen by nobody, perhaps.
    let tap = |kind| meter.as_ref().map(|meter| meter.tap(Source::WebSocket, kind));
    let mut down = Way::new(tap(Use::Presence));
    let mut up = Way::new(tap(Use::Work));
    let clock = Activity::new();
    let stopped = {
        let mut step = |cx: &mut Context<'_>| {
            let up = up.poll(cx, client.as_mut(), upstream.as_mut(), &clock);
            let down = down.poll(cx, upstream.as_mut(), client.as_mut(), &clock);
            [up, down]
        };
        let both = async {
            let either = |ended: [Poll<()>; 2]| ended.iter().any(Poll::is_ready);
            poll_fn(|cx| if either(step(cx)) { Poll::Ready(()) } else { Poll::Pending }).await;
            let all = |ended: [Poll<()>; 2]| ended.iter().all(Poll::is_ready);
            let rest = poll_fn(|cx| if all(step(cx)) { Poll::Ready(()) } else { Poll::Pending });
            // What it has not finished by then is lost.
            let _ = timeout(LINGER, rest).await;
        };
        tokio::select! {
            biased;
            () = both => None,
            stop = stop => Some(stop),
            () = clock.idle(idle) => Some(Stop::Draining),
        }
    };
    if let Some(frame) = stopped.and_then(Stop::frame)
        && down.frames.at_boundary()
    {
        let _ = timeout(Duration::from_secs(1), client.write_all(&frame)).await;
    }
    let _ = timeout(Duration::from_secs(1), client.shutdown()).await;
    let _ = timeout(Duration::from_secs(1), upstream.shutdown()).await;
}

/// Bytes read at once.
const PIECE: usize = 64 * 1024;
/// Pieces after which other tasks have their turn.
const PIECES_MAX: usize = 16;

thread_local! {
    /// Where bytes are read to. There may be very many WebSockets, most of them
    /// idle: none has a buffer of its own but for what its far side has not
    /// taken yet.
    static SCRATCH: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// One direction of a WebSocket.
#[derive(Debug, Default)]
struct Way {
    /// What was read and not taken yet, from `taken` on.
    rest: Vec<u8>,
    taken: usize,
    frames: Frames,
    state: WayState,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum WayState {
    #[default]
    Idle,
    /// What was written is on its way.
    Flushing,
    /// The near side has ended, and the far one is told.
    Ending,
    Ended,
}

impl Way {
    fn new(tap: Option<Tap>) -> Self {
        Self { frames: Frames { tap, ..Frames::default() }, ..Self::default() }
    }

    /// Carries what there is. Ready when the direction has ended, well or not.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        mut from: Pin<&mut dyn ByteStream>,
        mut to: Pin<&mut dyn ByteStream>,
        clock: &Activity,
    ) -> Poll<()> {
        for _ in 0..PIECES_MAX {
            while self.taken < self.rest.len() {
                match ready!(to.as_mut().poll_write(cx, &self.rest[self.taken..])) {
                    Ok(written @ 1..) => {
                        self.frames.feed(&self.rest[self.taken..self.taken + written]);
                        self.taken += written;
                    }
                    Ok(0) | Err(_) => return self.end(),
                }
            }
            (self.rest, self.taken) = (Vec::new(), 0);
            match self.state {
                WayState::Ended => return Poll::Ready(()),
                WayState::Ending => {
                    // That it cannot be told is the same to it.
                    let _ = ready!(to.as_mut().poll_shutdown(cx));
                    return self.end();
                }
                WayState::Flushing => match ready!(to.as_mut().poll_flush(cx)) {
                    Ok(()) => self.state = WayState::Idle,
                    Err(_) => return self.end(),
                },
                WayState::Idle => {}
            }
            let mut scratch = SCRATCH.take().unwrap_or_else(|| vec![0; PIECE].into());
            let outcome = self.carry(cx, from.as_mut(), to.as_mut(), &mut scratch);
            SCRATCH.set(Some(scratch));
            match ready!(outcome) {
                Ok(0) => self.state = WayState::Ending,
                Ok(_) => {
                    clock.moved();
                    self.state = WayState::Flushing;
                }
                Err(_) => return self.end(),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once, passes on what is taken at once, and keeps the rest. Returns
    /// how much was read.
    fn carry(
        &mut self,
        cx: &mut Context<'_>,
        from: Pin<&mut dyn ByteStream>,
        mut to: Pin<&mut dyn ByteStream>,
        scratch: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(scratch);
        ready!(from.poll_read(cx, &mut buffer))?;
        let read = buffer.filled();
        let mut taken = 0;
        while taken < read.len() {
            match to.as_mut().poll_write(cx, &read[taken..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(written) => {
                    let written = written?;
                    self.frames.feed(&read[taken..taken + written]);
                    taken += written;
                }
                Poll::Pending => {
                    self.rest = read[taken..].to_vec();
                    break;
                }
            }
        }
        Poll::Ready(Ok(read.len()))
    }

    fn end(&mut self) -> Poll<()> {
        (self.rest, self.taken, self.state) = (Vec::new(), 0, WayState::Ended);
        Poll::Ready(())
    }
}

/// A WebSocket that somebody else speaks, with the data that its user sends
/// noted on `tap`.
pub(crate) fn tapped(stream: BoxStream, tap: Option<Tap>) -> BoxStream {
    match tap {
        Some(tap) => Box::pin(Noticed::new(stream, Frames { tap: Some(tap), ..Frames::default() })),
        None => stream,
    }
}

impl Notice for Frames {
    fn read(&mut self, bytes: &[u8]) {
        self.feed(bytes);
    }
}

/// The longest header of a frame: two bytes, a length of eight, a mask of four
/// (RFC 6455, 5.2).
const HEADER_BYTES_MAX: usize = 14;

/// Follows WebSocket frames only so far as to know where one ends, and whether
/// it carries anything: pings and the like are sent by what nobody touches, too.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; HEADER_BYTES_MAX],
    header_bytes: usize,
    payload: u64,
    control: bool,
    tap: Option<Tap>,
}

impl Frames {
    fn feed(&mut self, mut bytes: &[u8]) {
        let mut data = false;
        while !bytes.is_empty() {
            if self.payload > 0 {
                data |= !self.control;
                let skip = usize::try_from(self.payload).map_or(bytes.len(), |left| left.min(bytes.len()));
                self.payload -= skip as u64;
                bytes = &bytes[skip..];
                continue;
            }
            // A header is complete after the longest one at the latest.
            self.header[self.header_bytes] = bytes[0];
            self.header_bytes += 1;
            bytes = &bytes[1..];
            if let Some(payload) = payload(&self.header[..self.header_bytes]) {
                self.payload = payload;
                self.control = self.header[0] & 0x08 != 0;
                self.header_bytes = 0;
            }
        }
        if let (true, Some(tap)) = (data, &self.tap) {
            tap.moved();
        }
    }

    fn at_boundary(&self) -> bool {
        self.header_bytes == 0 && self.payload == 0
    }
}

/// The length of a frame's payload once its header is complete.
fn payload(header: &[u8]) -> Option<u64> {
    let second = *header.get(1)?;
    let mask = if second & 0x80 != 0 { 4 } else { 0 };
    let (length_bytes, length) = match second & 0x7f {
        126 => (2, header.get(2..4)?.iter().fold(0, |n, b| n << 8 | u64::from(*b))),
        127 => (8, header.get(2..10)?.iter().fold(0, |n, b| n << 8 | u64::from(*b))),
        short => (0, u64::from(short)),
    };
    (header.len() == 2 + length_bytes + mask).then_some(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(length: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![0x82];
        match length {
            0..126 => frame.push(mask | u8::try_from(length).unwrap()),
            126..65536 => {
                frame.push(mask | 126);
                frame.extend(u16::try_from(length).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(mask | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        if masked {
            frame.extend([1, 2, 3, 4]);
        }
        frame.extend(std::iter::repeat_n(0xff, length));
        frame
    }

    proptest! {
        #[test]
        fn boundaries_are_where_frames_end(
            lengths in prop::collection::vec((prop_oneof![0usize..130, 65530usize..65540], any::<bool>()), 1..5),
            cut in 1usize..5000,
        ) {
            let mut bytes = Vec::new();
            let mut ends = vec![0];
            for (length, masked) in lengths {
                bytes.extend(frame(length, masked));
                ends.push(bytes.len());
            }
            let mut frames = Frames::default();
            let mut seen = 0;
            for piece in bytes.chunks(cut) {
                frames.feed(piece);
                seen += piece.len();
                prop_assert_eq!(frames.at_boundary(), ends.contains(&seen));
            }
        }
    }

    #[test]
    fn data_of_frames_is_use_and_pings_are_none() {
        use std::sync::Arc;

        use cocalc_core::{activity::Meters, clock::SystemClock, ids::ProjectId};
        let (meters, project) = (Meters::new(Arc::new(SystemClock)), ProjectId::random());
        let tap = meters.meter(project).tap(Source::WebSocket, Use::Work);
        let mut frames = Frames { tap: Some(tap), ..Frames::default() };
        let mut ping = frame(4, true);
        ping[0] = 0x89;
        frames.feed(&ping);
        frames.feed(&ping);
        assert!(meters.take(project).work.is_empty());
        for byte in frame(3, true) {
            frames.feed(&[byte]);
        }
        assert_eq!(meters.take(project).work.len(), 1);
        frames.feed(&ping);
        assert!(meters.take(project).work.is_empty());
    }

    #[test]
    fn the_accept_key_is_that_of_the_rfc() {
        let parts = http::Request::builder()
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .body(())
            .unwrap()
            .into_parts()
            .0;
        assert_eq!(accept(&parts).headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
