//! Very many WebSockets on which nothing happens.

use std::net::SocketAddr;

use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{Measured, files_at_most, full, settled, support::*};

const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

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
    let count = if full() { 10_000 } else { 500 };
    files_at_most();
    let (port, _app) = scripted(|stream, _| echo(stream)).await;
    for (index, limit) in [(0, 12 * 1024), (1, 2 * 12 * 1024 + 64 * 1024)] {
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
        let each = (after - before) * 1024 / count as u64;
        println!("way {index}: {each} bytes for each of {count}");
        assert!(each < limit, "way {index}: {each} bytes each");
        // They still carry.
        for socket in open.iter_mut().step_by(97) {
            say(socket).await;
        }
        drop(warm);
    }
}
