//! Messages that no well-meaning client sends. Each has one outcome, whether
//! it comes directly or through a proxy; what is forwarded is one request for
//! every server behind, and the one that was sent.

mod backends;
mod http2;
mod table;

use std::{net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use self::{
    backends::Backend,
    table::{PROBES, Probe},
};
use crate::support::*;

const WEBSOCKET: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

impl Probe {
    /// What is sent where an app's prefix and a project's are as given.
    fn message(&self, base: &str, path: &str, project: &str, credential: &str) -> String {
        let many = format!("GET {{p}}/x HTTP/1.1\r\n{{h}}{{c}}{}\r\n", "X: y\r\n".repeat(200));
        let giant = format!("GET {{p}}/x HTTP/1.1\r\n{{h}}{{c}}X: {}\r\n\r\n", "x".repeat(1 << 20));
        self.bytes
            .replace("{many}", &many)
            .replace("{giant}", &giant)
            .replace("{s}", "GET /smuggled HTTP/1.1\r\n{h}\r\n")
            .replace("{h}", "Host: localhost\r\n{a}")
            .replace("{a}", credential)
            .replace("{c}", "Connection: close\r\n")
            .replace("{w}", WEBSOCKET)
            .replace("{p}", path)
            .replace("{b}", base)
            .replace("{id}", project)
            .replace("{ID}", &project.to_uppercase())
    }

    /// The same to the ingress.
    fn to(&self, world: &World, base: &str, port: u16) -> String {
        let project = world.project.to_string();
        let path = format!("{base}/{project}/proxy/{port}");
        self.message(base, &path, &project, &format!("Authorization: Bearer {}\r\n", world.token()))
    }

    /// What is wrong with the answer, if anything is.
    fn fault(&self, at: &str, answer: &[u8]) -> Option<String> {
        let outcomes = outcomes(answer);
        let good = if self.answers.is_empty() {
            // The body is malformed: there may be no answer any more.
            outcomes.iter().all(|(status, _)| *status >= 400) && outcomes.len() <= 1
        } else {
            // hyper refuses some of them itself, without a code.
            let same = |((status, code), (expected, expected_code)): (&(u16, String), &(u16, &str))| {
                status == expected && (code == expected_code || code.is_empty())
            };
            outcomes.len() == self.answers.len() && outcomes.iter().zip(self.answers).all(same)
        };
        (!good).then(|| format!("{} at {at}: {outcomes:?}", self.name))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_have_one_outcome_everywhere() {
    let world = World::new().await;
    let mut faults = Vec::new();
    for probe in PROBES {
        for (address, base, _) in world.ways() {
            let answer = raw(address, probe.to(&world, base, world.app.port)).await;
            faults.extend(probe.fault(&address.to_string(), &answer));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    for never in ["smuggled", "evil", "6.6.6.6"] {
        assert!(!world.app.has_seen(never), "{never}: {:?}", world.app.seen.lock().unwrap());
    }
}

/// Sends every probe through the ingress to a server of others, and a good
/// request after each, on the connection that is kept.
async fn is_one_request_for(backend: Backend) {
    let world = World::new().await;
    let bearer = world.token();
    let mut faults = Vec::new();
    for (index, probe) in PROBES.iter().enumerate() {
        let answer = raw(world.host_address, probe.to(&world, "", backend.port)).await;
        faults.extend(probe.fault(backend.name, &answer));
        let last = format!("/after-{index}");
        let after = format!(
            "GET /{}/proxy/{}{last} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {bearer}\r\n\r\n",
            world.project, backend.port
        );
        let answer = raw(world.host_address, after).await;
        assert_eq!(outcomes(&answer), [(200, String::new())], "after {} at {}", probe.name, backend.name);
        let seen: Vec<String> = backend.seen_before(&last).await;
        let seen: Vec<String> = seen
            .iter()
            .map(|line| {
                // No length is none.
                let line = line.trim_end().trim_end_matches('-').trim_end();
                if line.split(' ').count() == 2 { format!("{line} 0") } else { line.to_owned() }
            })
            .collect();
        let expected: Vec<String> = probe
            .forwarded
            .iter()
            .map(|(method, target, bytes)| format!("{method} {target} {bytes}"))
            .collect();
        if seen != expected {
            faults.push(format!("{} at {}: {seen:?}", probe.name, backend.name));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn node_takes_what_is_forwarded_for_the_same_requests() {
    is_one_request_for(Backend::node().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_takes_what_is_forwarded_for_the_same_requests() {
    is_one_request_for(Backend::nginx().await).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs HAProxy, which is installed with COCALC_FULL"]
async fn haproxy_takes_what_is_forwarded_for_the_same_requests() {
    is_one_request_for(Backend::haproxy().await).await;
}

/// The columns of a probe that are known without asking anybody.
fn row(probe: &Probe) -> String {
    let answers: Vec<String> = probe.answers.iter().map(|(status, _)| status.to_string()).collect();
    let answers = if answers.is_empty() { "error or none".to_owned() } else { answers.join(", ") };
    let gets: Vec<String> = probe
        .forwarded
        .iter()
        .map(|(method, target, bytes)| format!("`{method} {}`, {bytes}", target.replace('|', "\\|")))
        .collect();
    let gets = if gets.is_empty() { "nothing".to_owned() } else { gets.join("; ") };
    format!("| {} | {} | {answers} | {gets} |", probe.name, probe.source)
}

#[test]
fn the_table_in_the_documentation_is_this_one() {
    let documented = include_str!("../../../../../docs/http-probes.md");
    let rows = documented.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| probe |"));
    assert_eq!(rows.count(), PROBES.len());
    for probe in PROBES {
        assert!(documented.contains(&row(probe)), "{}", row(probe));
    }
}

/// What a server answers to a probe that comes to it directly: the statuses,
/// and whether it goes on waiting.
async fn direct(probe: &Probe, port: u16) -> String {
    let message = probe.message("", "", "id", "");
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).await.unwrap();
    let _ = stream.write_all(message.as_bytes()).await;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 65536];
    let waits = loop {
        match timeout(Duration::from_secs(2), stream.read(&mut buffer)).await {
            Ok(Ok(read @ 1..)) => answer.extend_from_slice(&buffer[..read]),
            Ok(_) => break false,
            Err(_) => break true,
        }
    };
    let answer = text(answer).replace("HTTP/1.0 ", "HTTP/1.1 ");
    let mut said: Vec<String> =
        answer.split("HTTP/1.1 ").skip(1).filter_map(|part| part.get(..3).map(str::to_owned)).collect();
    if said.is_empty() && !answer.is_empty() {
        said.push("no HTTP/1".to_owned());
    }
    if said.is_empty() {
        said.push(if waits { "waits" } else { "closes" }.to_owned());
    }
    said.join(", ")
}

/// Writes the table of the documentation anew, with what others answer.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs HAProxy, which is installed with COCALC_FULL"]
async fn others_answer_probes_differently() {
    let others = [Backend::nginx().await, Backend::haproxy().await, Backend::node().await];
    let mut table = String::new();
    let mut differ = 0;
    for probe in PROBES {
        let mut line = row(probe);
        let mut all = Vec::new();
        for said in join_all(others.iter().map(|other| direct(probe, other.port))).await {
            line.push_str(&format!(" {said} |"));
            all.push(said);
        }
        differ += usize::from(all.windows(2).any(|two| two[0] != two[1]));
        table.push_str(&line);
        table.push('\n');
    }
    let place = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("http-probes.md");
    std::fs::write(&place, table).unwrap();
    println!("{differ} of {} probes: the others do not agree; {}", PROBES.len(), place.display());
    assert!(differ > 10, "servers that agree would need nobody before them");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_giants_end_only_themselves() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        let giant = format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(10 << 20));
        let many = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "X: y\r\n".repeat(50_000));
        let line = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(1 << 20));
        for garbage in [
            b"\0\xff\x16\x03\x01 garbage\r\n\r\n".to_vec(),
            vec![0xff; 100_000],
            b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
            // A request that never ends, and one that never begins.
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec(),
            Vec::new(),
            giant.into_bytes(),
            many.into_bytes(),
            line.into_bytes(),
        ] {
            let answer = raw(address, &garbage).await;
            let outcomes = outcomes(&answer);
            assert!(outcomes.iter().all(|(status, _)| (400..500).contains(status)), "{outcomes:?}");
        }
        let url = format!("http://localhost:{}{base}{}/fine", address.port(), world.mount());
        let answer = curl(&["-H", &format!("Authorization: Bearer {}", world.token()), &url]).await;
        assert!(answer.starts_with("GET /fine HTTP/1.1\r\n"), "{answer}");
    }
}
