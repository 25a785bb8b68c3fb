//! What the project reaches.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use crate::{Report, Told};

/// Metadata services of clouds, and what lies beside them.
const NEVER: [&str; 5] = [
    "169.254.169.254:80",
    "169.254.169.253:53",
    "169.254.170.2:80",
    "[fd00:ec2::254]:80",
    "[fe80::a9fe:a9fe]:80",
];
/// How long a connection may take; what is dropped takes all of it.
const LIMIT: Duration = Duration::from_millis(700);

pub(crate) fn check(told: &Told, report: &mut Report) {
    // All at once: most of them end by their time only.
    let attempts = |targets: Vec<String>, attempt: fn(&str) -> Result<(), String>| {
        let running: Vec<_> = targets
            .into_iter()
            .map(|target| {
                let name = target.clone();
                (name, std::thread::spawn(move || attempt(&target)))
            })
            .collect();
        let ended =
            |thread: std::thread::JoinHandle<_>| thread.join().unwrap_or_else(|_| Err("failed".into()));
        running.into_iter().map(move |(name, thread)| (name, ended(thread))).collect::<Vec<_>>()
    };
    let denied = NEVER.iter().map(|target| (*target).to_owned()).chain(told.deny.iter().cloned()).collect();
    for (target, result) in attempts(denied, connect) {
        report.note(&format!("unreachable {target}"), result.is_err(), result.err().unwrap_or_default());
    }
    for (target, result) in attempts(told.deny_udp.clone(), ask) {
        report.note(
            &format!("unreachable by udp {target}"),
            result.is_err(),
            result.err().unwrap_or_default(),
        );
    }
    for (target, result) in attempts(told.allow.clone(), connect) {
        report.note(&format!("reachable {target}"), result.is_ok(), result.err().unwrap_or_default());
    }
}

fn address(target: &str) -> Result<SocketAddr, String> {
    target.parse().map_err(|_| format!("{target} is no address and port"))
}

fn connect(target: &str) -> Result<(), String> {
    TcpStream::connect_timeout(&address(target)?, LIMIT).map(drop).map_err(|error| error.to_string())
}

/// Whether something answers a datagram.
fn ask(target: &str) -> Result<(), String> {
    let target = address(target)?;
    let attempt = || {
        let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.connect(target)?;
        socket.send(b"are you there?")?;
        socket.recv(&mut [0; 512])
    };
    attempt().map(drop).map_err(|error: std::io::Error| error.to_string())
}
