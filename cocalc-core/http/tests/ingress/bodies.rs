//! What surrounds bodies: trailers, interim answers, and senders that wait to
//! be asked.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    https::{Certificates, node},
    support::*,
};

/// The head of a request to the app at `port`, and a connection to send it on.
async fn begin(world: &World, way: (SocketAddr, &str), line: &str, port: u16, fields: &str) -> TcpStream {
    let (address, base) = way;
    let (method, path) = line.split_once(' ').unwrap();
    let head = format!(
        "{method} {base}/{}/proxy/{port}{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n{fields}\r\n",
        world.project,
        world.token()
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

const CHUNKED: &str = "Transfer-Encoding: chunked\r\n";

/// Answers every chunked request with what it was, and with trailers.
async fn trailing(mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let head = until(&mut stream, "\r\n\r\n").await?;
        let mut body = until(&mut stream, "0\r\n").await?;
        while !body.ends_with("\r\n\r\n") {
            body += &until(&mut stream, "\r\n").await?;
        }
        let said = format!("{head}|{body}|");
        let answer = format!(
            "HTTP/1.1 200 OK\r\nTrailer: X-After, Set-Cookie\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{said}\r\n0\r\n\
             X-After: two\r\nSet-Cookie: a=evil\r\nX-Unannounced: x\r\n\r\n",
            said.len()
        );
        stream.write_all(answer.as_bytes()).await?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_pass_both_ways_but_for_what_only_a_head_may_say() {
    let world = World::new().await;
    let opened = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = opened.clone();
    let (port, _app) = scripted(move |stream, _| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        trailing(stream)
    })
    .await;
    let body = "3\r\nabc\r\n0\r\nX-Before: one\r\nContent-Length: 9\r\nX-Unannounced: x\r\n\r\n";
    for (address, base, _) in world.ways() {
        let announced = format!("{CHUNKED}Trailer: X-Before, Content-Length\r\n");
        let fields = format!("{announced}TE: trailers\r\nConnection: TE\r\n");
        let mut stream = begin(&world, (address, base), "POST /t", port, &fields).await;
        stream.write_all(body.as_bytes()).await.unwrap();
        let seen = heard(&mut stream, "|\r\n0\r\n").await + &heard(&mut stream, "\r\n\r\n").await;
        let (seen, after) = seen.split_once("|\r\n0\r\n").unwrap();
        assert!(seen.contains("Trailer: x-before\r\n") && seen.contains("Te: trailers\r\n"), "{seen}");
        assert!(seen.ends_with("|3\r\nabc\r\n0\r\nX-Before: one\r\n\r\n"), "{seen}");
        assert_eq!(after, "x-after: two\r\n\r\n");
        // Who does not take any gets none, on the same connection.
        drop(stream);
        let mut stream = begin(&world, (address, base), "POST /t", port, &announced).await;
        stream.write_all(body.as_bytes()).await.unwrap();
        assert!(heard(&mut stream, "|\r\n0\r\n\r\n").await.starts_with("HTTP/1.1 200 OK\r\n"));
    }
    assert_eq!(opened.load(std::sync::atomic::Ordering::Relaxed), 1, "a connection is free after trailers");
}

/// Sends a body with trailers and prints those of the answer.
const TRAILERS: &str = r#"
const [url, path, bearer] = process.argv.slice(-3);
const client = require('node:http2').connect(url);
client.on('error', (error) => { console.error(error); process.exit(1); });
const stream = client.request(
  { ':method': 'POST', ':path': path, authorization: bearer, te: 'trailers', trailer: 'x-before' },
  { waitForTrailers: true });
stream.on('wantTrailers', () => stream.sendTrailers({ 'x-before': 'one', 'x-forwarded-for': 'evil' }));
stream.on('trailers', (trailers) => console.log('after', trailers['x-after'], trailers['set-cookie']));
stream.on('data', (data) => console.log(data.toString()));
stream.on('end', () => client.destroy());
stream.end('abc');
"#;

#[tokio::test(flavor = "multi_thread")]
async fn trailers_pass_over_http2_too() {
    let files = Certificates::new();
    let world = World::over(quick(), Some(files.tls())).await;
    let (port, _app) = scripted(|stream, _| trailing(stream)).await;
    for (address, base, _) in world.ways() {
        let url = format!("https://localhost:{}", address.port());
        let path = format!("{base}/{}/proxy/{port}/t", world.project);
        let bearer = format!("Bearer {}", world.token());
        let said = node(&files.path("cert.pem"), TRAILERS, &[&url, &path, &bearer]).await;
        assert!(said.contains("0\r\nX-Before: one\r\n\r\n|"), "{said}");
        assert!(!said.contains("evil") && said.contains("after two undefined"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_passes_with_every_method() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        for method in ["GET", "DELETE", "OPTIONS", "POST", "QUERY"] {
            for (fields, body) in [(CHUNKED, "5\r\nhello\r\n0\r\n\r\n"), ("Content-Length: 5\r\n", "hello")] {
                let line = format!("{method} /upload");
                let mut stream = begin(&world, (address, base), &line, world.app.port, fields).await;
                stream.write_all(body.as_bytes()).await.unwrap();
                let head = heard(&mut stream, "\r\n\r\n").await;
                assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{method} {fields}: {head}");
                assert_eq!(timeout_read(&mut stream).await, b'5', "{method} {fields}");
            }
        }
    }
}

async fn timeout_read(stream: &mut TcpStream) -> u8 {
    tokio::time::timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap()
}

/// By path: refuses a waiting body, asks for it, or never asks.
async fn asking(mut stream: TcpStream) -> std::io::Result<()> {
    let head = until(&mut stream, "\r\n\r\n").await?;
    assert!(head.contains("Expect: 100-continue\r\n"), "{head}");
    if head.contains("/refuses") {
        stream.write_all(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno").await?;
        // Nothing comes after all.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await?;
        assert!(rest.is_empty(), "{rest:?}");
        return Ok(());
    }
    if head.contains("/asks") {
        let mut none = [0; 1];
        let early = tokio::time::timeout(std::time::Duration::from_millis(200), stream.read(&mut none)).await;
        assert!(early.is_err(), "the body came before it was asked for");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let mut body = vec![0; 100_000];
    stream.read_exact(&mut body).await?;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_waits_is_asked_when_the_app_asks() {
    let world = World::new().await;
    let (port, _app) = scripted(|stream, _| asking(stream)).await;
    // So large that the proxy does not take it in beforehand.
    let waits = "Content-Length: 100000\r\nExpect: 100-continue\r\n";
    for (address, base, _) in world.ways() {
        let way = (address, base);
        let mut stream = begin(&world, way, "PUT /refuses", port, waits).await;
        let answer = heard(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("connection: close\r\n"), "{answer}");
        assert_eq!(text(rest(stream).await), "no");
        for path in ["asks", "silent"] {
            let mut stream = begin(&world, way, &format!("PUT /{path}"), port, waits).await;
            assert_eq!(heard(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n", "{path}");
            stream.write_all(&[7; 100_000]).await.unwrap();
            let answer = heard(&mut stream, "good").await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {answer}");
        }
        // One that may not is not asked at all.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("PUT {base}{}/x HTTP/1.1\r\nHost: localhost\r\n{waits}\r\n", world.mount());
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = heard(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("connection: close\r\n"), "{answer}");
        rest(stream).await;
    }
}

async fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await;
    read.expect("the connection was not closed").unwrap();
    rest
}

/// hyper's server cannot send interim answers but for its own 100 yet.
#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_of_apps_end_at_the_ingress() {
    let world = World::new().await;
    let (port, _app) = scripted(|mut stream, _| async move {
        loop {
            let head = until(&mut stream, "\r\n\r\n").await?;
            if head.contains("/forever") {
                loop {
                    stream.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").await?;
                }
            }
            let answer = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n\
                          HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nSet-Cookie: a=b\r\n\r\n\
                          HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood";
            stream.write_all(answer.as_bytes()).await?;
        }
    })
    .await;
    for (address, base, _) in world.ways() {
        let mut stream = begin(&world, (address, base), "GET /x", port, "").await;
        let answer = heard(&mut stream, "good").await.to_lowercase();
        assert!(answer.starts_with("http/1.1 200 ok\r\n"), "{answer}");
        assert!(!answer.contains("link") && !answer.contains("cookie"), "{answer}");
        // However many there are, the answer itself must come in time.
        let mut stream = begin(&world, (address, base), "GET /forever", port, "").await;
        let answer = heard(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    }
}
