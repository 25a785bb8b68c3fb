//! Probes in HTTP/2, frame by frame: what would be another message once it is
//! HTTP/1.1, and floods.

use std::{net::SocketAddr, sync::Arc};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{https::Certificates, support::*};

/// A request: its fields in their order, and its body if it has one. `{p}` is the
/// path of the app, `{a}` the authority, `{t}` the credential.
struct Probe {
    name: &'static str,
    source: &'static str,
    fields: &'static [(&'static str, &'static str)],
    body: Option<&'static str>,
    good: bool,
}

const fn row(
    name: &'static str,
    source: &'static str,
    fields: &'static [(&'static str, &'static str)],
) -> Probe {
    Probe { name, source, fields, body: None, good: false }
}

const FIELDS: &str = "RFC 9113, 8.2.1";
const CONNECTION: &str = "RFC 9113, 8.2.2";
const PSEUDO: &str = "RFC 9113, 8.3";

/// A good request begins like this.
macro_rules! request {
    ($($field:expr),* $(,)?) => {
        &[
            (":method", "GET"), (":scheme", "https"), (":authority", "{a}"), (":path", "{p}/x"),
            ("authorization", "{t}"), $($field),*
        ]
    };
}

const PROBES: &[Probe] = &[
    Probe { good: true, ..row("plain", PSEUDO, request!()) },
    Probe { good: true, ..row("with the host", PSEUDO, request!(("host", "{a}"))) },
    Probe { good: true, ..row("trailers wanted", CONNECTION, request!(("te", "trailers"))) },
    Probe {
        good: true,
        body: Some("hello"),
        ..row("length", "RFC 9113, 8.1.1", request!(("content-length", "5")))
    },
    row("a coding", CONNECTION, request!(("transfer-encoding", "chunked"))),
    row("options of the connection", CONNECTION, request!(("connection", "close"))),
    row("a connection that is kept", CONNECTION, request!(("keep-alive", "1"))),
    row("an upgrade", CONNECTION, request!(("upgrade", "websocket"))),
    row("a proxy's connection", CONNECTION, request!(("proxy-connection", "close"))),
    row("another coding wanted", CONNECTION, request!(("te", "gzip"))),
    row("a length without a body", "RFC 9113, 8.1.1", request!(("content-length", "5"))),
    Probe {
        body: Some("hel"),
        ..row("a length that is too long", "RFC 9113, 8.1.1", request!(("content-length", "5")))
    },
    Probe {
        body: Some("helloevil"),
        ..row("a length that is too short", "RFC 9113, 8.1.1", request!(("content-length", "5")))
    },
    Probe {
        body: Some("hello"),
        ..row("two lengths", "RFC 9110, 8.6", request!(("content-length", "5"), ("content-length", "6")))
    },
    row("a name in capitals", FIELDS, request!(("X-Evil", "x"))),
    row("a colon in a name", FIELDS, request!(("x:evil", "x"))),
    row("a space in a name", FIELDS, request!(("x evil", "x"))),
    row("a line end in a name", FIELDS, request!(("x: y\r\nevil", "x"))),
    row("a line end in a value", FIELDS, request!(("x", "y\r\nevil: x"))),
    row("a line feed in a value", FIELDS, request!(("x", "y\nevil: x"))),
    row("NUL in a value", FIELDS, request!(("x", "y\0evil"))),
    row("no name", FIELDS, request!(("", "evil"))),
    row("a pseudo-field after others", PSEUDO, request!((":path", "/evil"))),
    row(
        "an unknown pseudo-field",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x"),
            (":evil", "x"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "two paths",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x"),
            (":path", "{p}/evil"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "no path",
        PSEUDO,
        &[(":method", "GET"), (":scheme", "https"), (":authority", "{a}"), ("authorization", "{t}")],
    ),
    row(
        "an empty path",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", ""),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "a path with a version",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x HTTP/1.1\r\nevil: y"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "a space in the path",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x evil"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "a request line for a method",
        PSEUDO,
        &[
            (":method", "GET /evil HTTP/1.1\r\nx: y"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "another scheme",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "ftp"),
            (":authority", "{a}"),
            (":path", "{p}/evil"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "a scheme with a host",
        PSEUDO,
        &[
            (":method", "GET"),
            (":scheme", "https://evil.example/?"),
            (":authority", "{a}"),
            (":path", "{p}/x"),
            ("authorization", "{t}"),
        ],
    ),
    row("another host than authority", "RFC 9113, 8.3.1", request!(("host", "evil.example"))),
    row("two hosts", "RFC 9112, 3.2", request!(("host", "{a}"), ("host", "{a}"))),
    row(
        "a user in the authority",
        "RFC 9113, 8.3.1",
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "evil@{a}"),
            (":path", "{p}/x"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "an authority of another name",
        "RFC 9110, 7.4",
        &[
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", "evil.localhost"),
            (":path", "{p}/x"),
            ("authorization", "{t}"),
        ],
    ),
    row(
        "nobody asked",
        "RFC 9113, 8.3.1",
        &[(":method", "GET"), (":scheme", "https"), (":path", "{p}/x"), ("authorization", "{t}")],
    ),
    row(
        "CONNECT",
        "RFC 9113, 8.5",
        &[(":method", "CONNECT"), (":authority", "{a}"), ("authorization", "{t}")],
    ),
    row(
        "a protocol with GET",
        "RFC 8441, 4",
        &[
            (":method", "GET"),
            (":protocol", "websocket"),
            (":scheme", "https"),
            (":authority", "{a}"),
            (":path", "{p}/x"),
            ("authorization", "{t}"),
        ],
    ),
    row("imitated forwarding", "CVE-2025-48865", request!(("x_forwarded_for", "evil"))),
];

/// A literal field that is never put into a table (RFC 7541, 6.2.2).
fn literal(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0);
    for text in [name, value] {
        let mut length = text.len();
        if length < 127 {
            block.push(u8::try_from(length).unwrap());
        } else {
            block.push(127);
            length -= 127;
            while length >= 128 {
                block.push(u8::try_from(length % 128).unwrap() | 128);
                length /= 128;
            }
            block.push(u8::try_from(length).unwrap());
        }
        block.extend(text.as_bytes());
    }
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A connection on which HTTP/2 has begun.
async fn begin(files: &Certificates, address: SocketAddr) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(files.shown()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let mut stream = timeout(DEADLINE, connecting).await.unwrap().unwrap();
    let mut first = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    first.extend(frame(SETTINGS, 0, 0, &[]));
    stream.write_all(&first).await.unwrap();
    stream
}

/// Whether an answer with status 200 came on the first stream; what else may
/// come refuses it.
async fn is_good(stream: &mut TlsStream<TcpStream>) -> bool {
    let answer = async {
        loop {
            let mut head = [0; 9];
            if stream.read_exact(&mut head).await.is_err() {
                return false;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            if stream.read_exact(&mut payload).await.is_err() {
                return false;
            }
            match head[3] {
                // The static table has 200 as 8 (RFC 7541, appendix A).
                HEADERS => return payload.first() == Some(&0x88),
                RST_STREAM | GOAWAY => return false,
                _ => {}
            }
        }
    };
    timeout(DEADLINE, answer).await.expect("neither an answer nor an end")
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_requests_become_one_request_or_none() {
    let files = Certificates::new();
    let world = World::over(quick(), Some(files.tls())).await;
    let mut faults = Vec::new();
    let mut good = 0;
    for (address, base, _) in world.ways() {
        for probe in PROBES {
            let mut block = Vec::new();
            for (name, value) in probe.fields {
                let value = value
                    .replace("{p}", &format!("{base}{}", world.mount()))
                    .replace("{a}", &format!("localhost:{}", address.port()))
                    .replace("{t}", &format!("Bearer {}", world.token()));
                literal(&mut block, name, &value);
            }
            let ends = if probe.body.is_some() { 0 } else { END_STREAM };
            let mut message = frame(HEADERS, END_HEADERS | ends, 1, &block);
            if let Some(body) = probe.body {
                message.extend(frame(DATA, END_STREAM, 1, body.as_bytes()));
            }
            let mut stream = begin(&files, address).await;
            stream.write_all(&message).await.unwrap();
            if is_good(&mut stream).await != probe.good {
                faults.push(format!("{} ({}) at {address}", probe.name, probe.source));
            }
            good += usize::from(probe.good);
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    let seen = world.app.seen.lock().unwrap();
    // Whose body is not what was said may have begun before that was known.
    let begun = seen.iter().filter(|head| head.contains("Content-Length: 5")).count();
    assert!(seen.len() - begun <= good && !seen.iter().any(|head| head.contains("evil")), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_floods_end_their_connection() {
    let files = Certificates::new();
    let world = World::over(quick(), Some(files.tls())).await;
    let address = world.host_address;
    let mut block = Vec::new();
    for (name, value) in [(":method", "GET"), (":scheme", "https"), (":path", "/silent")] {
        literal(&mut block, name, value);
    }
    literal(&mut block, ":authority", &format!("localhost:{}", address.port()));

    // Requests that are taken back at once (CVE-2023-44487).
    let resets: Vec<u8> = (0..20_000_u32)
        .flat_map(|index| {
            let id = 2 * index + 1;
            let mut two = frame(HEADERS, END_HEADERS | END_STREAM, id, &block);
            two.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
            two
        })
        .collect();
    // A head without an end (CVE-2024-27316).
    let mut endless = frame(HEADERS, END_STREAM, 1, &block);
    for _ in 0..20_000 {
        let mut more = Vec::new();
        literal(&mut more, "x", &"y".repeat(1000));
        endless.extend(frame(CONTINUATION, 0, 1, &more));
    }
    for (name, flood) in [("resets", resets), ("continuations", endless)] {
        let stream = begin(&files, address).await;
        let (mut read, mut write) = tokio::io::split(stream);
        let writing = tokio::spawn(async move { write.write_all(&flood).await.is_err() });
        let ended = timeout(DEADLINE * 3, async {
            let mut buffer = [0; 4096];
            while matches!(read.read(&mut buffer).await, Ok(1..)) {}
        });
        ended.await.unwrap_or_else(|_| panic!("{name} may go on"));
        writing.abort();
    }
    let mut stream = begin(&files, address).await;
    let mut good = Vec::new();
    for (name, value) in [(":method", "GET"), (":scheme", "https"), (":path", "/healthz")] {
        literal(&mut good, name, value);
    }
    literal(&mut good, ":authority", &format!("localhost:{}", address.port()));
    stream.write_all(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &good)).await.unwrap();
    assert!(is_good(&mut stream).await, "others go on");
}
