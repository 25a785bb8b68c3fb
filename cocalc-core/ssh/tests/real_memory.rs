//! What a server keeps in memory. A binary of its own, because it measures its
//! own process. Needs the packages openssh-client and python3.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{process::Stdio, time::Duration};

use common::{World, text, within};

/// The memory of this process, which is the server here, in bytes.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Pauses for longer than the sender needs to fill every buffer, and says how much
/// it has read.
const READER: &str = r#"exec python3 -c "
import sys, time
total = 0
while chunk := sys.stdin.buffer.read(8 << 20):
    total += len(chunk)
    time.sleep(0.1)
print(total)
""#;

/// Sends a file of nothing through `world`'s servers, up to a slow reader there or
/// down to one here, with a new key for every megabyte.
async fn slowly(up: bool) {
    let full = std::env::var_os("COCALC_FULL").is_some();
    let mib: usize = if full { 5 << 10 } else { 128 };
    println!("{mib} MiB{}", if full { "" } else { "; 5 GiB with COCALC_FULL" });
    let world = World::new().await;
    let source = format!("head -c {} /dev/zero", mib << 20);
    for port in [world.direct, world.proxied] {
        let remote = if up { READER } else { &source };
        let ssh = world.ssh(port, &["-o", "RekeyLimit=1M", "-o", "Compression=no", "127.0.0.1", remote]);
        let quoted: Vec<String> = std::iter::once(ssh.as_std().get_program())
            .chain(ssh.as_std().get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let ssh = quoted.join(" ");
        // The reader here replaces a shell of its own.
        let line = if up { format!("{source} | {ssh}") } else { format!("{ssh} | ({READER})") };
        let before = memory();
        let mut sending = tokio::process::Command::new("bash");
        sending.args(["-c", &line]).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        sending.stdin(Stdio::null());
        let sending = sending.spawn().unwrap();
        let output = sending.wait_with_output();
        tokio::pin!(output);
        let mut most = before;
        let output = within(1800, async {
            loop {
                tokio::select! {
                    output = &mut output => return output.unwrap(),
                    () = tokio::time::sleep(Duration::from_millis(20)) => most = most.max(memory()),
                }
            }
        })
        .await;
        assert_eq!(text(&output.stdout), format!("{}\n", mib << 20), "{}", text(&output.stderr));
        let grown = most.saturating_sub(before) >> 20;
        assert!(grown < 48, "the server grew by {grown} MiB");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_costs_no_memory() {
    // One after the other: they measure the same process.
    slowly(true).await;
    slowly(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_costs_no_memory() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let before = memory();
        let mut clients = Vec::new();
        for _ in 0..4 {
            let mut ssh = world.ssh(port, &["127.0.0.1", "exec cat /dev/zero"]);
            clients.push(ssh.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
        }
        // Nobody takes what they print; their windows close.
        let mut most = before;
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            most = most.max(memory());
        }
        let grown = most.saturating_sub(before) >> 20;
        assert!(grown < 32, "the server grew by {grown} MiB");
        for mut client in clients {
            client.kill().await.unwrap();
        }
    }
}
