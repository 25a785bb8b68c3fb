//! Heads without an end, very many at once.

use std::net::SocketAddr;

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{Measured, support::*};

const AT_ONCE: usize = 64;

/// The most that all of them may cost, in KiB: of each a head (64 KiB), as much
/// again that was read with it, and as much to grow to that.
const GROWTH_MAX: u64 = 3 * 128 * AT_ONCE as u64;

/// Writes until it is cut off, or much more than anybody takes was taken.
async fn flood(stream: &mut TcpStream, first: &str) -> std::io::Result<()> {
    stream.write_all(first.as_bytes()).await?;
    let field = format!("X: {}\r\n", "x".repeat(1000));
    for _ in 0..16 * 1024 {
        stream.write_all(field.as_bytes()).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_without_an_end_take_bounded_memory() {
    let measured = Measured::start(None).await;
    let (port, _app) = scripted(|mut stream, _| async move {
        until(&mut stream, "\r\n\r\n").await?;
        flood(&mut stream, "HTTP/1.1 200 OK\r\n").await
    })
    .await;
    let of_users = async |(address, _): (SocketAddr, &str)| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        flood(&mut stream, "GET / HTTP/1.1\r\nHost: localhost\r\n").await.unwrap_err();
    };
    let of_apps = async |(address, base): (SocketAddr, &str)| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = measured.head(base, "GET", port, "Connection: close\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(DEADLINE * 6, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert_eq!(outcomes(&answer), [(502, "app_error".to_owned())]);
    };
    for way in measured.ways() {
        let before = measured.begin();
        join_all((0..AT_ONCE).map(|_| of_users(way))).await;
        let grown = measured.most().saturating_sub(before);
        println!("{AT_ONCE} users at {}: {grown} KiB more", way.0);
        assert!(grown < GROWTH_MAX, "users: {grown} KiB");
        let before = measured.begin();
        join_all((0..AT_ONCE).map(|_| of_apps(way))).await;
        let grown = measured.most().saturating_sub(before);
        println!("{AT_ONCE} apps at {}: {grown} KiB more", way.0);
        assert!(grown < GROWTH_MAX, "apps: {grown} KiB");
    }
}
