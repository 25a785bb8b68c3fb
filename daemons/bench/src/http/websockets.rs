//! WebSockets: how many messages go there and back in a second, and what each that
//! is silent takes of its server's memory.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::{Bench, Way};
use crate::{
    Result,
    federation::split,
    processes,
    table::{Better, Goal, Table},
    tool::each,
};

/// Of a handshake, and of an echo.
const LIMIT: Duration = Duration::from_secs(60);
/// So many threads open them.
const AT_ONCE: usize = 16;
/// That exchange messages, each of a thread.
const BUSY: u32 = 64;
/// The example of RFC 6455, section 1.3, with its answer.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// Of the message, in bytes.
const PAYLOAD: usize = 64;
const IDLE_KIB: f64 = 12.0;

pub(super) fn measure(bench: &Bench<'_>, table: &mut Table) -> Result<()> {
    let count = bench.effort.websockets.min(room()?);
    if count < bench.effort.websockets {
        table.note(format!("{count} idle WebSockets: a process may not open more files here"));
    }
    let ways = || bench.ways().filter(|way| !matches!(way, Way::Session | Way::Auth | Way::App));
    for way in ways() {
        let kib = idle(bench, way, count).map_err(|error| format!("{way}: {error}"))?;
        let goal = matches!(way, Way::Host | Way::Proxy).then_some(Goal::AtMost(IDLE_KIB));
        table.number(format!("memory of an idle WebSocket, {count} of them, {way}"), "KiB", &[kib], goal);
    }
    let mut rates: [Vec<f64>; Way::ALL.len()] = Default::default();
    for round in 0..=bench.effort.runs {
        for way in ways() {
            let rate = messages(bench, way).map_err(|error| format!("{way}: {error}"))?;
            if round > 0 {
                rates[way as usize].push(rate);
            }
        }
    }
    let what = |way: Way| format!("WebSocket messages there and back, {BUSY} connections, {way}");
    for (ours, peer, goal) in [
        (Way::Host, Way::Nginx, Some(Goal::AtLeast(0.8))),
        (Way::Host, Way::Node, Some(Goal::AtLeast(3.0))),
        (Way::Proxy, Way::Nginx, None),
        (Way::Proxy, Way::Node, None),
    ] {
        let (ours_seen, peer_seen) = (&rates[ours as usize], &rates[peer as usize]);
        if !peer_seen.is_empty() {
            table.compare(
                what(ours),
                peer.to_string(),
                ("messages/s", Better::More),
                ours_seen,
                peer_seen,
                goal,
            );
        }
    }
    Ok(())
}

/// How many a server may have, which opens two files for each.
fn room() -> Result<u32> {
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    Ok(u32::try_from(most.unwrap_or(u64::from(u32::MAX)).saturating_sub(500) / 2).unwrap_or(u32::MAX))
}

/// Each sends one, waits for it, and sends the next.
fn messages(bench: &Bench<'_>, way: Way) -> Result<f64> {
    let sockets = open(bench, way, BUSY)?;
    let end = Instant::now() + Duration::from_secs(u64::from(bench.effort.seconds));
    let begun = Instant::now();
    let counts = each(sockets.len(), &sockets, |socket| {
        let mut count = 0u32;
        while Instant::now() < end {
            echo(socket)?;
            count += 1;
        }
        Ok(count)
    })?;
    Ok(f64::from(counts.iter().sum::<u32>()) / begun.elapsed().as_secs_f64())
}

/// Opens many, lets them be silent, and looks at what their servers have grown by;
/// in the end all of them must still work. In KiB for each.
fn idle(bench: &Bench<'_>, way: Way, count: u32) -> Result<f64> {
    let servers = || match way {
        // Of two stations, the first: the other one is what `Host` shows.
        Way::Proxy => Ok(vec![bench.federation.proxy_pid()]),
        way => bench.servers(way),
    };
    let before = processes::memory_kib(&servers()?);
    let sockets = open(bench, way, count)?;
    each(AT_ONCE, &sockets, echo)?;
    std::thread::sleep(Duration::from_secs(u64::from(bench.effort.seconds) * 2));
    let with = processes::memory_kib(&servers()?);
    each(AT_ONCE, &sockets, echo)?;
    Ok((with - before) / f64::from(count))
}

/// Opens so many.
fn open(bench: &Bench<'_>, way: Way, count: u32) -> Result<Vec<TcpStream>> {
    let (url, field) = bench.address(way)?;
    let namespace = bench.namespace(way)?;
    let (address, path) = split(&url)?;
    let authorization = field.map(|field| format!("{field}\r\n")).unwrap_or_default();
    let request = format!(
        "GET {path}ws HTTP/1.1\r\nhost: {address}\r\n{authorization}connection: Upgrade\r\n\
         upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\n\r\n"
    );
    let numbers: Vec<u32> = (0..count).collect();
    let shares: Vec<&[u32]> = numbers.chunks(numbers.len().div_ceil(AT_ONCE).max(1)).collect();
    let numbered: Vec<(u8, &[u32])> = (1..).zip(shares).collect();
    // A share is one thread's, which stays in the namespace and ends there; and one
    // user's address, since a proxy lets none have more than a thousand.
    let opened = each(numbered.len(), &numbered, |(number, share)| {
        enter(namespace.as_deref())?;
        let from = Ipv4Addr::new(127, 0, 1, *number);
        share.iter().map(|_| handshake(from, address, &request)).collect::<Result<Vec<_>>>()
    })?;
    Ok(opened.into_iter().flatten().collect())
}

/// Moves the calling thread: sockets that it opens belong there.
fn enter(namespace: Option<&Path>) -> Result<()> {
    use std::os::fd::AsFd;
    if let Some(path) = namespace {
        let file = std::fs::File::open(path)?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
    }
    Ok(())
}

fn handshake(from: Ipv4Addr, address: SocketAddr, request: &str) -> Result<TcpStream> {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddr::from((from, 0)))?;
    // On this machine: there is an answer at once.
    connect(&socket, &address)?;
    let mut stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    let mut byte = [0];
    // Nothing that comes after it may be taken.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 16384 || stream.read(&mut byte)? == 0 {
            return Err(format!("no answer but {:?}", String::from_utf8_lossy(&head)).into());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    if head.starts_with("HTTP/1.1 101") && head.contains(ACCEPT) {
        return Ok(stream);
    }
    Err(format!("not a WebSocket: {head}").into())
}

/// A message there and back. The mask is zero, so what is sent is what is meant.
fn echo(mut stream: &TcpStream) -> Result<()> {
    let mut message = vec![0x82, 0x80 | PAYLOAD as u8, 0, 0, 0, 0];
    message.extend([b'm'; PAYLOAD]);
    stream.write_all(&message)?;
    let mut answer = [0; 2 + PAYLOAD];
    stream.read_exact(&mut answer)?;
    let good = answer[..2] == [0x82, PAYLOAD as u8] && answer[2..] == message[6..];
    if good { Ok(()) } else { Err("something else came back".into()) }
}
