//! What an ingress keeps in memory, measured from outside: it runs in a process
//! of its own, with users and apps in this one. Needs curl and
//! Node.js.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "some of the support is for the tests of the ingress")]

mod bodies;
mod hostile;
#[path = "../ingress/support.rs"]
mod support;
mod websockets;

use std::{net::SocketAddr, process::Stdio, time::Duration};

use cocalc_http::{Limits, Tls};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::support::*;

/// Where the process that is measured finds its certificate; without, it serves
/// plain HTTP.
const CERTIFICATE: &str = "COCALC_MEMORY_CERTIFICATE";
const ROLE: &str = "COCALC_MEMORY_ROLE";

/// Whether everything is measured at its full size.
fn full() -> bool {
    let full = std::env::var_os("COCALC_FULL").is_some();
    if !full {
        println!("smaller and fewer than with COCALC_FULL");
    }
    full
}

/// The process that is measured: a host and a proxy, until its input ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is what the other tests start and measure"]
async fn server() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    files_at_most();
    let tls = std::env::var_os(CERTIFICATE).map(|dir| {
        let dir = std::path::PathBuf::from(dir);
        Tls::open(&dir.join("cert.pem"), &dir.join("key.pem")).unwrap()
    });
    let limits = Limits { connections_per_source: 100_000, connections: 100_000, ..Limits::default() };
    let world = World::over(limits, tls).await;
    println!("\n@ {} {} {} {}", world.host_address, world.proxy_address, world.project, world.token());
    let mut end = Vec::new();
    tokio::io::stdin().read_to_end(&mut end).await.unwrap();
}

/// A directory with a certificate of `localhost` and its key.
fn certificate() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.path().join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(dir.path().join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    dir
}

/// Allows as many open files as it may, and returns how many.
fn files_at_most() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Root may have more than it was given.
    let more = Rlimit { current: Some(65_536), maximum: Some(65_536) };
    if limit.maximum.is_some_and(|maximum| maximum < 65_536) && setrlimit(Resource::Nofile, more).is_ok() {
        return 65_536;
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    limit.maximum.map_or(65_536, |maximum| maximum.try_into().unwrap())
}

/// A process with a host and a proxy.
struct Measured {
    process: Child,
    host: SocketAddr,
    proxy: SocketAddr,
    project: String,
    token: String,
}

impl Measured {
    async fn start(certificate: Option<&std::path::Path>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["server", "--exact", "--ignored", "--nocapture", "--test-threads=1"]).env(ROLE, "1");
        if let Some(dir) = certificate {
            command.env(CERTIFICATE, dir);
        }
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = timeout(DEADLINE * 6, async {
            loop {
                let line = lines.next_line().await.unwrap().expect("it ended");
                if let Some(line) = line.strip_prefix("@ ") {
                    return line.to_owned();
                }
            }
        });
        let line = line.await.expect("it did not start");
        // What it says further on has somewhere to go.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let mut words = line.split(' ').map(str::to_owned);
        let mut next = || words.next().unwrap();
        Self {
            process,
            host: next().parse().unwrap(),
            proxy: next().parse().unwrap(),
            project: next(),
            token: next(),
        }
    }

    fn ways(&self) -> [(SocketAddr, &'static str); 2] {
        [(self.host, ""), (self.proxy, "/some/base")]
    }

    /// The head of a request to an app of this process.
    fn head(&self, base: &str, method: &str, port: u16, fields: &str) -> String {
        format!(
            "{method} {base}/{}/proxy/{port}/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n{fields}\r\n",
            self.project, self.token
        )
    }

    /// A field of its status, in KiB.
    fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id().unwrap())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// What it holds now, in KiB.
    fn resident(&self) -> u64 {
        self.status("VmRSS")
    }

    /// Forgets the most that it has held, and returns what it holds.
    fn begin(&self) -> u64 {
        std::fs::write(format!("/proc/{}/clear_refs", self.process.id().unwrap()), "5").unwrap();
        self.resident()
    }

    /// The most that it has held since [`Self::begin`], in KiB.
    fn most(&self) -> u64 {
        self.status("VmHWM")
    }
}

/// Waits until `read` stays the same for a while, and returns it.
async fn settled(read: impl Fn() -> u64) -> u64 {
    let mut last = read();
    let mut same = 0;
    let until = tokio::time::Instant::now() + DEADLINE * 6;
    while same < 10 {
        assert!(tokio::time::Instant::now() < until, "it goes on and on: {last}");
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = read();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}
