//! Very many WebSockets on which nothing happens.

use std::{net::SocketAddr, process::Stdio};

use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::{Measured, certificate, files_at_most, full, settled, support::*};

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// What one may take at each of the daemons it goes through, in bytes.
const EACH_MAX: u64 = 12 * 1024;

/// Switches to WebSocket and sends everything back.
async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    until(&mut stream, "\r\n\r\n").await?;
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                  Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    stream.write_all(answer.as_bytes()).await?;
    let mut buffer = [0; 64];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

async fn open(measured: &Measured, way: (SocketAddr, &str), port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(way.0).await.unwrap();
    let head = measured.head(way.1, "GET", port, UPGRADE);
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = timeout(DEADLINE * 6, until(&mut stream, "\r\n\r\n")).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    say(&mut stream).await;
    stream
}

/// Sends a small frame and reads it back.
async fn say(stream: &mut TcpStream) {
    let frame = [0x81, 0x85, 0, 0, 0, 0, b'h', b'e', b'l', b'l', b'o'];
    stream.write_all(&frame).await.unwrap();
    let mut back = [0; 11];
    timeout(DEADLINE * 6, stream.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, frame);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_websocket_takes_little_memory() {
    // Each takes two of this process, and of the one that is measured.
    let possible = files_at_most().saturating_sub(500) / 2;
    let count = if full() { 10_000.min(possible) } else { 1_000 };
    let (port, _app) = scripted(|stream, _| echo(stream)).await;
    for (index, limit) in [(0, EACH_MAX), (1, 2 * EACH_MAX)] {
        let measured = Measured::start(None).await;
        let way = measured.ways()[index];
        let several = async |count: usize| {
            let opened = stream::iter(0..count).map(|_| open(&measured, way, port)).buffer_unordered(16);
            opened.collect::<Vec<_>>().await
        };
        // What is made once is there before it counts.
        let warm = several(100).await;
        let before = settled(|| measured.resident()).await;
        let mut open = several(count).await;
        let after = settled(|| measured.resident()).await;
        let each = after.saturating_sub(before) * 1024 / count as u64;
        println!("way {index}: {each} bytes for each of {count}");
        assert!(each < limit, "way {index}: {each} bytes each");
        // They still carry.
        for socket in open.iter_mut().step_by(97) {
            say(socket).await;
        }
        drop(warm);
    }
}

/// Opens so many WebSockets, a hundred on each connection, each of which carries
/// one frame there and back; says how many, whenever it is told to open more.
const MANY: &str = r#"
const [url, path, bearer] = process.argv.slice(-3);
const http2 = require('node:http2');
const fail = (error) => { console.error(error); process.exit(1); };
const fields = { ':method': 'CONNECT', ':protocol': 'websocket', ':path': path,
  'sec-websocket-version': '13', authorization: bearer };
const frame = Buffer.from([0x81, 0x85, 0, 0, 0, 0, ...Buffer.from('hello')]);
const open = (client) => new Promise((resolve) => {
  const stream = client.request(fields, { endStream: false });
  stream.on('error', fail);
  stream.on('response', (headers) => {
    if (headers[':status'] !== 200) fail(headers);
    stream.write(frame);
    let seen = 0;
    stream.on('data', (data) => { seen += data.length; if (seen === frame.length) resolve(); });
  });
});
const connect = () => new Promise((resolve) => {
  const client = http2.connect(url);
  client.on('error', fail);
  client.on('remoteSettings', () => resolve(client));
});
let opened = 0;
require('node:readline').createInterface({ input: process.stdin }).on('line', async (line) => {
  for (let left = Number(line); left > 0; left -= 100) {
    const client = await connect();
    await Promise.all(Array.from({ length: Math.min(left, 100) }, () => open(client)));
  }
  opened += Number(line);
  console.log(opened);
}).on('close', () => process.exit(0));
"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_websocket_over_http2_takes_little_memory() {
    let possible = files_at_most().saturating_sub(500);
    let count = if full() { 10_000.min(possible) } else { 1_000 };
    let (port, _app) = scripted(|stream, _| echo(stream)).await;
    let dir = certificate();
    let measured = Measured::start(Some(dir.path())).await;
    let url = format!("https://localhost:{}", measured.host.port());
    let path = format!("/{}/proxy/{port}/x", measured.project);
    let mut node = tokio::process::Command::new("node")
        .env("NODE_EXTRA_CA_CERTS", dir.path().join("cert.pem"))
        .args(["-e", MANY, "--", &url, &path, &format!("Bearer {}", measured.token)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut orders = node.stdin.take().unwrap();
    let mut lines = BufReader::new(node.stdout.take().unwrap()).lines();
    let mut several = async |count: usize, all: usize| {
        orders.write_all(format!("{count}\n").as_bytes()).await.unwrap();
        let said = timeout(DEADLINE * 30, lines.next_line()).await.unwrap().unwrap();
        assert_eq!(said, Some(all.to_string()));
    };
    several(100, 100).await;
    let before = settled(|| measured.resident()).await;
    several(count, 100 + count).await;
    let after = settled(|| measured.resident()).await;
    let each = after.saturating_sub(before) * 1024 / count as u64;
    println!("over HTTP/2: {each} bytes for each of {count}");
    assert!(each < EACH_MAX, "{each} bytes each");
}
