//! What hostile clients do: before they log in, from many addresses, and after.
//! A binary of its own, because it measures its own process, which is the
//! server. Needs what `.ci/setup.sh test` installs.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{net::Ipv4Addr, time::Duration};

use common::{World, client, finish, text, within};
use tokio::{
    io::AsyncReadExt,
    net::{TcpSocket, TcpStream},
};

/// The memory of this process, in bytes.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A connection from one of many addresses that says nothing, and whether it was
/// greeted.
async fn silent(from: u32, port: u16) -> (TcpStream, bool) {
    let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 1)) + from);
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((address, 0).into()).unwrap();
    let mut stream = within(30, socket.connect(([127, 0, 0, 1], port).into())).await.unwrap();
    let mut banner = [0; 4];
    let greeted = within(30, stream.read_exact(&mut banner)).await.is_ok();
    (stream, greeted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_who_say_nothing_cost_little_and_keep_nobody_out_for_long() {
    let full = std::env::var_os("COCALC_FULL").is_some();
    // Each takes two descriptors in this process.
    let wanted = if full { 10_000 } else { 1_000 };
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let count = u32::try_from((most / 2).saturating_sub(500)).unwrap_or(u32::MAX).min(wanted);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(most), maximum: Some(most) },
    )
    .unwrap();
    println!("{count} connections of {wanted}");
    let world = World::with(|builder| builder.login_grace(Duration::from_secs(20))).await;
    let before = memory();
    let mut open = Vec::new();
    for number in 0..count {
        // Ten of each address: more is another test's.
        open.push(silent(number / 10, world.direct).await);
    }
    let greeted = open.iter().filter(|(_, greeted)| *greeted).count();
    let grown = memory().saturating_sub(before);
    assert!(greeted > 0 && greeted < open.len(), "{greeted} of {} may try at once", open.len());
    assert!(grown < 100 << 20, "{grown} bytes for {} connections", open.len());
    // Somebody who knows a key gets in while they are there, or when their grace
    // is over.
    let user = async {
        loop {
            let output = world.run(world.direct, "echo in", b"").await;
            if output.stdout == b"in\n" {
                return;
            }
        }
    };
    within(90, user).await;
}

/// Each breaks the rules in its own way, once it has logged in.
const ABUSE: &str = r#"
import asyncio, sys
import asyncssh
from asyncssh.packet import Boolean, Byte, String, UInt32
user, port, keyfile, what = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
OPEN, ADJUST, DATA, EOF, CLOSE, REQUEST, GLOBAL, KEXINIT = 90, 93, 94, 96, 97, 98, 80, 20
async def main():
    c = await asyncssh.connect("127.0.0.1", port, username=user, client_keys=[keyfile], known_hosts=None,
                               agent_path=None, config=None)
    print("in")
    # What the server answers is none of its business.
    c.process_packet = lambda *a, **k: True
    send = lambda *a: c.send_packet(*a)
    opening = lambda n: send(OPEN, String("session"), UInt32(n), UInt32(1 << 21), UInt32(1 << 15))
    try:
        if what == "opens":
            for n in range(4000): opening(n)
        elif what == "kinds":
            for n in range(5000): send(OPEN, String("x" * 200), UInt32(n), UInt32(0), UInt32(0))
        elif what == "requests":
            opening(0)
            await asyncio.sleep(0.5)
            for n in range(4000): send(REQUEST, UInt32(0), String(f"unknown-{n}@x"), Boolean(True), String("x" * 1000))
        elif what == "env":
            opening(0)
            await asyncio.sleep(0.5)
            for n in range(4000): send(REQUEST, UInt32(0), String("env"), Boolean(False), String(f"LC_{n}"), String("x" * 2000))
        elif what == "globals":
            for n in range(4000): send(GLOBAL, String("tcpip-forward"), Boolean(True), String("127.0.0.1"), UInt32(n % 65536))
        elif what == "nobody":
            for n in range(4000): send(DATA, UInt32(n + 7), String(b"x" * 1000))
            for n in range(2000): send(CLOSE, UInt32(n + 7)); send(ADJUST, UInt32(n + 7), UInt32(0xffffffff))
        elif what == "window":
            opening(0)
            await asyncio.sleep(0.5)
            for n in range(3000): send(ADJUST, UInt32(0), UInt32(0xffffffff))
            # More than there is room for.
            for n in range(3000): send(DATA, UInt32(0), String(b"x" * 32000))
        elif what == "rekey":
            send(KEXINIT, bytes(16), *[String("") for _ in range(10)], Boolean(False), UInt32(0))
            for n in range(4000): send(GLOBAL, String("keepalive@openssh.com"), Boolean(True))
        elif what == "unknown":
            for n in range(4000): send(200, String("x" * 500))
        await asyncio.sleep(0.5)
    except Exception as e:
        print("ended:", type(e).__name__, file=sys.stderr)
    c.abort()
try:
    asyncio.run(asyncio.wait_for(main(), 50))
except (asyncio.TimeoutError, asyncssh.Error, ConnectionError) as e:
    print("over:", type(e).__name__, file=sys.stderr)
print("done")
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_logged_in_and_floods_harms_only_itself() {
    let world = World::new().await;
    let before = memory();
    for port in [world.direct, world.proxied] {
        for what in ["opens", "kinds", "requests", "env", "globals", "nobody", "window", "rekey", "unknown"] {
            // A proxy serves them with the same code; what it hands on is channels.
            if port == world.proxied && !["opens", "window"].contains(&what) {
                continue;
            }
            let mut command = client("python3");
            command.args(["-c", ABUSE, &world.project.to_string(), &port.to_string()]);
            command.arg(world.path("id")).arg(what);
            let (abuse, user) = tokio::join!(finish(command, b""), world.run(port, "echo fine", b""));
            assert_eq!(text(&abuse.stdout), "in\ndone\n", "{what}: {}", text(&abuse.stderr));
            assert_eq!(text(&user.stdout), "fine\n", "beside {what}: {}", text(&user.stderr));
            let user = world.run(port, "echo fine", b"").await;
            assert_eq!(text(&user.stdout), "fine\n", "after {what}: {}", text(&user.stderr));
        }
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes are left of it");
}
