//! Follows the framing of HTTP/1.1 requests strictly, before hyper sees them.
//!
//! hyper accepts messages whose framing other parsers read differently: both
//! `Content-Length` and `Transfer-Encoding` (it removes the former, so a
//! handler can't tell), lists of transfer codings, bare line feeds. In a chain
//! of proxies such differences are request smuggling. [`Framing`] is a pure
//! state machine that walks the bytes and points out the first request whose
//! framing has more than one reading; [`Guarded`] puts it in front of hyper.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// As much of a header line as is needed to know the framing fields.
const LINE_BYTES_KEPT: usize = 256;
const CHUNK_LINE_BYTES_MAX: usize = 256;
const TRAILER_BYTES_MAX: usize = 16 * 1024;

/// Walks the bytes that a client sends.
#[derive(Debug, Default)]
pub(crate) struct Framing {
    state: State,
    line: Vec<u8>,
    line_bytes: usize,
    last: u8,
    head: Head,
    /// How many heads were complete before the present one.
    heads: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum State {
    /// Before a request line.
    #[default]
    Start,
    Fields,
    Body(u64),
    ChunkSize,
    Chunk(u64),
    /// The line end after a chunk.
    ChunkEnd,
    Trailers(usize),
    /// After a request to upgrade: no longer HTTP, as far as is known.
    Opaque,
    /// Nothing more is let through.
    Ended,
}

#[derive(Debug, Default)]
struct Head {
    length: Option<u64>,
    chunked: bool,
    upgrade: bool,
    bad: bool,
}

/// What is wrong, and where.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// The head of this request (counted from 0) has no single reading.
    Head(u64),
    /// A body is malformed.
    Body,
}

impl Framing {
    /// Walks on, and returns how many of `bytes` may be passed on, and a fault
    /// after which nothing more may be.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Fault>) {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            match self.state {
                State::Opaque => return (bytes.len(), None),
                State::Ended => return (at, None),
                State::Body(left) => {
                    let taken = step(left, rest.len());
                    at += taken;
                    self.state = match left - taken as u64 {
                        0 => State::Start,
                        left => State::Body(left),
                    };
                }
                State::Chunk(left) => {
                    let taken = step(left, rest.len());
                    at += taken;
                    self.state = match left - taken as u64 {
                        0 => State::ChunkEnd,
                        left => State::Chunk(left),
                    };
                }
                _ => {
                    let end = rest.iter().position(|b| *b == b'\n');
                    let part = end.map_or(rest, |end| &rest[..end]);
                    at += part.len() + usize::from(end.is_some());
                    self.extend(part);
                    let fault = if end.is_some() { self.line() } else { self.check_long_line() };
                    if fault.is_some() {
                        self.state = State::Ended;
                        return (at, fault);
                    }
                }
            }
        }
        (at, None)
    }

    fn extend(&mut self, part: &[u8]) {
        let room = LINE_BYTES_KEPT.saturating_sub(self.line.len());
        self.line.extend_from_slice(&part[..part.len().min(room)]);
        self.line_bytes += part.len();
        if let Some(last) = part.last() {
            self.last = *last;
        }
    }

    /// Bodies have no long lines; long heads are hyper's to refuse.
    fn check_long_line(&self) -> Option<Fault> {
        match self.state {
            State::ChunkSize | State::ChunkEnd if self.line_bytes > CHUNK_LINE_BYTES_MAX => Some(Fault::Body),
            State::Trailers(seen) if seen + self.line_bytes > TRAILER_BYTES_MAX => Some(Fault::Body),
            _ => None,
        }
    }

    /// A line is complete.
    fn line(&mut self) -> Option<Fault> {
        let crlf = self.line_bytes > 0 && self.last == b'\r';
        let bytes = self.line_bytes;
        let mut line = std::mem::take(&mut self.line);
        if crlf && line.len() == bytes {
            line.pop();
        }
        let whole = line.len() + usize::from(crlf) == bytes;
        let empty = bytes == usize::from(crlf);
        self.line_bytes = 0;
        self.last = 0;
        let fault = match self.state {
            State::Start => {
                // An empty line before a request is allowed.
                if !crlf {
                    self.head.bad = true;
                }
                if !empty {
                    self.state = State::Fields;
                }
                None
            }
            State::Fields => {
                if !crlf {
                    self.head.bad = true;
                }
                if empty {
                    self.head_end()
                } else {
                    self.head.field(&line, whole);
                    None
                }
            }
            State::ChunkSize => match chunk_size(&line).filter(|_| crlf && whole) {
                None => Some(Fault::Body),
                Some(0) => {
                    self.state = State::Trailers(0);
                    None
                }
                Some(size) => {
                    self.state = State::Chunk(size);
                    None
                }
            },
            State::ChunkEnd => {
                self.state = State::ChunkSize;
                if crlf && empty { None } else { Some(Fault::Body) }
            }
            State::Trailers(seen) => {
                let seen = seen + bytes;
                self.state = if empty { State::Start } else { State::Trailers(seen) };
                if crlf && seen <= TRAILER_BYTES_MAX { None } else { Some(Fault::Body) }
            }
            State::Body(_) | State::Chunk(_) | State::Opaque | State::Ended => None,
        };
        line.clear();
        self.line = line;
        fault
    }

    fn head_end(&mut self) -> Option<Fault> {
        let head = std::mem::take(&mut self.head);
        let index = self.heads;
        self.heads += 1;
        if head.bad || (head.length.is_some() && head.chunked) {
            return Some(Fault::Head(index));
        }
        self.state = match (head.length, head.chunked) {
            (_, true) => State::ChunkSize,
            (Some(length), _) if length > 0 => State::Body(length),
            _ if head.upgrade => State::Opaque,
            _ => State::Start,
        };
        None
    }
}

impl Head {
    fn field(&mut self, line: &[u8], whole: bool) {
        let Some(colon) = line.iter().position(|b| *b == b':') else {
            // A continuation line, or no field at all.
            self.bad = true;
            return;
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            // The same length twice is legal, but nobody sends it in good faith.
            self.bad |= !whole || self.length.is_some();
            match decimal(value) {
                Some(length) => self.length = Some(length),
                None => self.bad = true,
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.bad |= !whole || self.chunked || !value.eq_ignore_ascii_case(b"chunked");
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.upgrade = true;
        } else if name.is_empty() || name[0] == b' ' || name[0] == b'\t' {
            self.bad = true;
        }
    }
}

fn step(left: u64, available: usize) -> usize {
    usize::try_from(left).map_or(available, |left| left.min(available))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    let plain = (1..=18).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    if plain { str::from_utf8(digits).ok()?.parse().ok() } else { None }
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let end = line.iter().position(|b| *b == b';').unwrap_or(line.len());
    let (digits, extension) = line.split_at(end);
    let plain = (1..=15).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
    if !plain || extension.contains(&b'\r') {
        return None;
    }
    u64::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

/// Tells a connection's service which request must be refused.
#[derive(Clone, Debug)]
pub(crate) struct Refused(Arc<AtomicU64>);

impl Refused {
    /// Whether the request with this index, from 0, has to be answered 400.
    pub(crate) fn is(&self, index: u64) -> bool {
        self.0.load(Ordering::Acquire) == index
    }
}

/// A stream on whose read side [`Framing`] watches.
#[derive(Debug)]
pub(crate) struct Guarded<T> {
    io: T,
    framing: Framing,
    refused: Refused,
}

impl<T> Guarded<T> {
    pub(crate) fn new(io: T) -> Self {
        Self { io, framing: Framing::default(), refused: Refused(Arc::new(AtomicU64::new(u64::MAX))) }
    }

    pub(crate) fn refused(&self) -> Refused {
        self.refused.clone()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.framing.state == State::Ended {
            // Not the end of the stream, which hyper would take for a client
            // that has gone. The answer closes the connection; should hyper
            // see no request in the head, its timeout does.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        std::task::ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let this = &mut *self;
        let (passed, fault) = this.framing.feed(&buf.filled()[before..]);
        buf.set_filled(before + passed);
        match fault {
            None => Poll::Ready(Ok(())),
            Some(Fault::Head(index)) => {
                // The head itself is passed on, so that it gets an answer.
                this.refused.0.store(index, Ordering::Release);
                Poll::Ready(Ok(()))
            }
            Some(Fault::Body) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "malformed request body")))
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn outcome(bytes: &[u8]) -> (usize, Option<Fault>) {
        Framing::default().feed(bytes)
    }

    #[test]
    fn plain_requests_pass() {
        for good in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-LENGTH:  3 \r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTrailer: x\r\n\r\n",
            "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n\x01\n\x02anything",
        ] {
            assert_eq!(outcome(good.as_bytes()), (good.len(), None), "{good:?}");
        }
    }

    #[test]
    fn ambiguous_heads_are_pointed_out() {
        let next = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
        for bad in [
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: +3\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 3\n\r\n",
            "POST / HTTP/1.1\nContent-Length: 3\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\n: x\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\n",
        ] {
            assert_eq!(
                outcome(format!("{bad}{next}").as_bytes()),
                (bad.len(), Some(Fault::Head(0))),
                "{bad:?}"
            );
            let second = format!("{next}{bad}");
            assert_eq!(outcome(second.as_bytes()), (second.len(), Some(Fault::Head(1))), "{bad:?}");
        }
    }

    #[test]
    fn malformed_chunks_end_the_stream() {
        let head = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        let long = format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(300));
        let trailers = format!("0\r\n{}\r\n", "a: b\r\n".repeat(5000));
        for bad in [
            "x\r\n",
            "\r\n",
            "-1\r\n",
            "0x1\r\n",
            "1 \r\na\r\n",
            "1\na\r\n",
            "1\r\nab\r\n",
            "1\r\na\n0\r\n\r\n",
            "fffffffffffffffff\r\n",
            &long,
            &trailers,
        ] {
            let (_, fault) = outcome(format!("{head}{bad}").as_bytes());
            assert_eq!(fault, Some(Fault::Body), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn cuts_make_no_difference(
            parts in prop::collection::vec(
                prop::sample::select(vec![
                    "GET / HTTP/1.1\r\n", "Host: a\r\n", "\r\n", "\n", "Content-Length: 4\r\n",
                    "Transfer-Encoding: chunked\r\n", "Upgrade: x\r\n", "3\r\nabc\r\n", "0\r\n", "abcd", " fold\r\n",
                ]),
                0..24,
            ),
            cut in 1usize..7,
        ) {
            let bytes = parts.concat().into_bytes();
            let whole = outcome(&bytes);
            let mut framing = Framing::default();
            let mut passed = 0;
            let mut fault = None;
            for piece in bytes.chunks(cut) {
                let (n, f) = framing.feed(piece);
                passed += n;
                fault = f;
                if f.is_some() {
                    break;
                }
            }
            prop_assert_eq!((passed, fault), whole);
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let (passed, _) = outcome(&bytes);
            prop_assert!(passed <= bytes.len());
        }
    }
}
