//! Bodies of any size, read fast, slowly, or not at all.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{Measured, certificate, full, settled, support::*};

/// The most that a body may cost beside what is kept anyway, in KiB: buffers of
/// the connections, and what the allocator does with them.
const GROWTH_MAX: u64 = 24 * 1024;

const PIECE: usize = 256 * 1024;

/// Reads until the end, and counts.
async fn count(stream: &mut (impl AsyncRead + Unpin), counter: &AtomicU64) -> std::io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        counter.fetch_add(read as u64, Ordering::Relaxed);
    }
}

/// Writes so many bytes, and counts.
async fn pour(stream: &mut TcpStream, mut bytes: u64, counter: &AtomicU64) -> std::io::Result<()> {
    let piece = vec![b'x'; PIECE];
    while bytes > 0 {
        let part = usize::try_from(bytes).unwrap_or(PIECE).min(PIECE);
        let written = stream.write(&piece[..part]).await?;
        counter.fetch_add(written as u64, Ordering::Relaxed);
        bytes -= written as u64;
    }
    Ok(())
}

/// Takes a body of a known length, and says how long it was; or gives one.
async fn app(mut stream: TcpStream, size: u64) -> std::io::Result<()> {
    loop {
        let head = until(&mut stream, "\r\n\r\n").await?;
        if head.starts_with("GET ") {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
            stream.write_all(answer.as_bytes()).await?;
            pour(&mut stream, size, &AtomicU64::new(0)).await?;
            continue;
        }
        let counter = AtomicU64::new(0);
        if head.to_lowercase().contains("transfer-encoding: chunked") {
            let mut last = Vec::new();
            let mut buffer = vec![0; PIECE];
            while !last.ends_with(b"\r\n0\r\n\r\n") {
                let read = stream.read(&mut buffer).await?;
                counter.fetch_add(read as u64, Ordering::Relaxed);
                last.extend_from_slice(&buffer[read.saturating_sub(7)..read]);
                last.drain(..last.len().saturating_sub(7));
            }
        } else {
            let mut body = (&mut stream).take(size);
            count(&mut body, &counter).await?;
        }
        let text = counter.load(Ordering::Relaxed).to_string();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        stream.write_all(answer.as_bytes()).await?;
    }
}

fn size() -> u64 {
    if full() { 10 << 30 } else { 256 << 20 }
}

/// Long enough for any machine.
const LONG: Duration = Duration::from_secs(1800);

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_any_size_take_constant_memory() {
    let size = size();
    let measured = Measured::start(None).await;
    let (port, _app) = scripted(move |stream, _| app(stream, size)).await;
    let ask = async |way: usize, method: &str, size: u64| {
        let (address, base) = measured.ways()[way];
        let mut stream = TcpStream::connect(address).await.unwrap();
        let length = if method == "GET" { String::new() } else { format!("Content-Length: {size}\r\n") };
        let head = measured.head(base, method, port, &length);
        stream.write_all(head.as_bytes()).await.unwrap();
        if method == "PUT" {
            pour(&mut stream, size, &AtomicU64::new(0)).await.unwrap();
        }
        let head = until(&mut stream, "\r\n\r\n").await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let counter = AtomicU64::new(0);
        if method == "GET" {
            count(&mut (&mut stream).take(size), &counter).await.unwrap();
        } else {
            let text = until(&mut stream, &size.to_string()).await.unwrap();
            counter.store(text.parse().unwrap(), Ordering::Relaxed);
        }
        assert_eq!(counter.into_inner(), size);
    };
    for way in 0..2 {
        for method in ["GET", "PUT"] {
            let before = measured.begin();
            timeout(LONG, ask(way, method, size)).await.unwrap();
            let grown = measured.most().saturating_sub(before);
            println!("{method} of {} MiB by way {way}: {grown} KiB more", size >> 20);
            assert!(grown < GROWTH_MAX, "{method} by way {way}: {grown} KiB");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_over_http2_take_constant_memory() {
    let size = size();
    let dir = certificate();
    let measured = Measured::start(Some(dir.path())).await;
    let (port, _app) = scripted(move |stream, _| app(stream, size)).await;
    let (address, base) = measured.ways()[1];
    let url = format!("https://localhost:{}{base}/{}/proxy/{port}/x", address.port(), measured.project);
    let run = async |line: String| {
        let mut command = tokio::process::Command::new("bash");
        command.args(["-o", "pipefail", "-c", &line]).kill_on_drop(true);
        let output = timeout(LONG, command.output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        text(output.stdout)
    };
    let certificate = dir.path().join("cert.pem");
    let curl = format!(
        "curl --silent --show-error --http2 --noproxy '*' --cacert {} -H 'Authorization: Bearer {}'",
        certificate.display(),
        measured.token
    );
    let before = measured.begin();
    assert_eq!(run(format!("{curl} {url} | wc -c")).await.trim(), size.to_string());
    let grown = measured.most().saturating_sub(before);
    println!("down: {grown} KiB more");
    assert!(grown < GROWTH_MAX, "down: {grown} KiB");
    let before = measured.begin();
    let sent = run(format!("head -c {size} /dev/zero | {curl} -T - {url}")).await;
    assert!(sent.parse::<u64>().unwrap() > size, "chunks are counted as they come: {sent}");
    let grown = measured.most().saturating_sub(before);
    println!("up: {grown} KiB more");
    assert!(grown < GROWTH_MAX, "up: {grown} KiB");
}

/// What stands between the two ends: buffers of the kernel on every hop, a few
/// MiB each, and little else.
const AHEAD_MAX: u64 = 96 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_reads_is_not_read_ahead() {
    let measured = Measured::start(None).await;
    let poured = Arc::new(AtomicU64::new(0));
    let counter = poured.clone();
    let wake = Arc::new(tokio::sync::Notify::new());
    let woken = wake.clone();
    let total = 192 << 20;
    let (port, _app) = scripted(move |mut stream, _| {
        let (counter, woken) = (counter.clone(), woken.clone());
        async move {
            let head = until(&mut stream, "\r\n\r\n").await?;
            if head.starts_with("GET ") {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n");
                stream.write_all(head.as_bytes()).await?;
                return pour(&mut stream, total, &counter).await;
            }
            woken.notified().await;
            count(&mut (&mut stream).take(total), &AtomicU64::new(0)).await?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood").await
        }
    })
    .await;
    for (address, base) in measured.ways() {
        let before = measured.begin();
        // Down: the user does not read.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = measured.head(base, "GET", port, "");
        stream.write_all(head.as_bytes()).await.unwrap();
        until(&mut stream, "\r\n\r\n").await.unwrap();
        let ahead = settled(|| poured.load(Ordering::Relaxed)).await;
        assert!((1..AHEAD_MAX).contains(&ahead), "{ahead} bytes were read ahead");
        let grown = measured.most().saturating_sub(before);
        println!("down: {} KiB ahead, {grown} KiB more", ahead >> 10);
        assert!(grown < GROWTH_MAX, "down: {grown} KiB");
        let counter = AtomicU64::new(0);
        timeout(LONG, count(&mut (&mut stream).take(total), &counter)).await.unwrap().unwrap();
        assert_eq!(counter.into_inner(), total, "the rest still comes");
        poured.store(0, Ordering::Relaxed);

        // Up: the app does not.
        let before = measured.begin();
        let stream = TcpStream::connect(address).await.unwrap();
        let head = measured.head(base, "PUT", port, &format!("Content-Length: {total}\r\n"));
        let sent = Arc::new(AtomicU64::new(0));
        let counter = sent.clone();
        let sending = tokio::spawn(async move {
            let mut stream = stream;
            stream.write_all(head.as_bytes()).await.unwrap();
            pour(&mut stream, total, &counter).await.unwrap();
            until(&mut stream, "good").await.unwrap()
        });
        let ahead = settled(|| sent.load(Ordering::Relaxed)).await;
        assert!((1..AHEAD_MAX).contains(&ahead), "{ahead} bytes were read ahead");
        let grown = measured.most().saturating_sub(before);
        println!("up: {} KiB ahead, {grown} KiB more", ahead >> 10);
        assert!(grown < GROWTH_MAX, "up: {grown} KiB");
        wake.notify_one();
        let answer = timeout(LONG, sending).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    }
}
