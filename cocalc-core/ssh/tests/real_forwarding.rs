//! Forwarding of every kind with OpenSSH's client: what listens and connects
//! inside the project is the helper that projects have. Needs the packages
//! curl, openssh-client, python3 and xauth.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use cocalc_core::ids::{Ports, Restrictions};
use common::{World, finish, text, until, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
};

/// A server on the user's side that speaks first, and echoes when its input
/// has ended.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(b"hello\n").await.unwrap();
                let mut data = Vec::new();
                let _ = stream.read_to_end(&mut data).await;
                let _ = stream.write_all(&data).await;
            });
        }
    });
    port
}

/// A port for a program that takes its number: below those that the kernel gives out
/// (32768 and up), so that no other listener or connection gets it meanwhile, and apart
/// from those of test processes beside this one.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let place = std::process::id().wrapping_mul(64).wrapping_add(next) % 12_000;
        let port = 20_000 + u16::try_from(place).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Connects, sends a megabyte and the end of it, and says what came back.
const EXCHANGE: &str = r#"
import socket, sys
def exchange(s):
    s.sendall(b"z" * 1000000)
    s.shutdown(socket.SHUT_WR)
    got = b""
    while chunk := s.recv(65536): got += chunk
    print(got[:6], len(got))
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_of_the_project_lead_to_the_user() {
    let world = World::new().await;
    let outside = echo().await;
    for port in [world.direct, world.proxied] {
        let inside = free_port();
        let script = format!(
            "{EXCHANGE}\nfor n in range(20): exchange(socket.create_connection((sys.argv[1], {inside})))"
        );
        std::fs::write(world.path("home/exchange.py"), script).unwrap();
        let remote = format!("{inside}:127.0.0.1:{outside}");
        for name in ["127.0.0.1", "::1"] {
            let command = format!("python3 exchange.py {name}");
            let ssh =
                world.ssh(port, &["-o", "ExitOnForwardFailure=yes", "-R", &remote, "127.0.0.1", &command]);
            let output = finish(ssh, b"").await;
            assert_eq!(text(&output.stdout), "b'hello\\n' 1000006\n".repeat(20), "{}", text(&output.stderr));
        }
        // The port is free again when the connection has ended.
        until("the port is free", || std::net::TcpListener::bind(("127.0.0.1", inside)).is_ok()).await;
        // One that the project chooses, which is said; and one that is taken.
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bad = format!("{}:127.0.0.1:{outside}", taken.local_addr().unwrap().port());
        let good = format!("0:127.0.0.1:{outside}");
        let output =
            finish(world.ssh(port, &["-v", "-R", &good, "-R", &bad, "127.0.0.1", "true"]), b"").await;
        let said = text(&output.stderr);
        assert!(said.contains("Allocated port"), "{said}");
        assert!(said.contains("remote port forwarding failed"), "{said}");
        assert!(said.contains("cannot listen on port"), "the reason is missing: {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forward_is_cancelled_and_another_takes_its_place() {
    let world = World::new().await;
    let (outside, inside) = (echo().await, free_port());
    let path = world.path("control");
    let control = format!("ControlPath={}", path.display());
    let mut master = world
        .ssh(world.direct, &["-M", "-N", "-o", &control, "127.0.0.1"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    until("the connection stands", || path.exists()).await;
    let remote = format!("{inside}:127.0.0.1:{outside}");
    for _ in 0..3 {
        let ask = |what: &'static str| {
            world.ssh(world.direct, &["-o", &control, "-O", what, "-R", &remote, "127.0.0.1"])
        };
        assert!(finish(ask("forward"), b"").await.status.success());
        let mut stream = TcpStream::connect(("127.0.0.1", inside)).await.unwrap();
        let mut hello = [0; 6];
        within(20, stream.read_exact(&mut hello)).await.unwrap();
        assert!(finish(ask("cancel"), b"").await.status.success());
        until("nothing listens", || std::net::TcpStream::connect(("127.0.0.1", inside)).is_err()).await;
        // What was open goes on.
        stream.write_all(b"still").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        within(20, stream.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(rest, b"still");
    }
    master.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_forwarded_both_ways() {
    let world = World::new().await;
    let outside = echo().await;
    for port in [world.direct, world.proxied] {
        let socket = world.path(&format!("home/remote-{port}"));
        let script =
            format!("{EXCHANGE}\ns = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); exchange(s)");
        std::fs::write(world.path("home/unix.py"), script).unwrap();
        let remote = format!("{}:127.0.0.1:{outside}", socket.display());
        let command = format!("stat -c %a {0}; python3 unix.py {0}", socket.display());
        let output = finish(world.ssh(port, &["-R", &remote, "127.0.0.1", &command]), b"").await;
        assert_eq!(text(&output.stdout), "600\nb'hello\\n' 1000006\n", "{}", text(&output.stderr));
        until("the socket is gone", || !socket.exists()).await;

        // And a socket of the project's, at the user's side.
        let there = world.path(&format!("home/local-{port}"));
        let listener = UnixListener::bind(&there).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"inside").await.unwrap();
        });
        let here = free_port();
        let local = format!("{here}:{}", there.display());
        let mut ssh =
            world.ssh(port, &["-N", "-L", &local, "127.0.0.1"]).stdin(Stdio::null()).spawn().unwrap();
        let mut got = Vec::new();
        within(30, async {
            let mut stream = loop {
                match TcpStream::connect(("127.0.0.1", here)).await {
                    Ok(stream) => break stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            stream.read_to_end(&mut got).await.unwrap();
        })
        .await;
        assert_eq!(text(&got), "inside");
        ssh.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dynamic_forward_and_a_single_connection_work() {
    let world = World::new().await;
    std::fs::write(world.path("page"), "from inside\n").unwrap();
    let web = free_port();
    let _server = tokio::process::Command::new("python3")
        .args(["-m", "http.server", "--bind", "127.0.0.1", &web.to_string()])
        .current_dir(world.directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    for port in [world.direct, world.proxied] {
        let socks = free_port();
        let dynamic = format!("127.0.0.1:{socks}");
        let mut ssh =
            world.ssh(port, &["-N", "-D", &dynamic, "127.0.0.1"]).stdin(Stdio::null()).spawn().unwrap();
        // By its loopback, and by another name that only the inside resolves.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        for name in ["127.0.0.1", "localhost", host.trim()] {
            let mut curl = tokio::process::Command::new("curl");
            let url = format!("http://{name}:{web}/page");
            curl.args([
                "-sS",
                "--retry",
                "50",
                "--retry-delay",
                "0",
                "--retry-all-errors",
                "--retry-max-time",
            ])
            .args(["30", "--noproxy", "", "--socks5-hostname", &dynamic, &url]);
            let output = finish(curl, b"").await;
            // The machine's own name leads to another address, where nothing
            // listens: refused, and by whom it should be.
            let expected = if name == host.trim() { "" } else { "from inside\n" };
            if name != host.trim() {
                assert_eq!(text(&output.stdout), expected, "{name}: {}", text(&output.stderr));
            }
        }
        ssh.kill().await.unwrap();
        let target = format!("127.0.0.1:{web}");
        let output =
            finish(world.ssh(port, &["-W", &target, "127.0.0.1"]), b"GET /page HTTP/1.0\r\n\r\n").await;
        assert!(text(&output.stdout).ends_with("from inside\n"), "{}", text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_reached_from_inside() {
    let world = World::new().await;
    let socket = world.path("agent");
    let mut agent = tokio::process::Command::new("ssh-agent")
        .args(["-D", "-a"])
        .arg(&socket)
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until("the agent listens", || socket.exists()).await;
    let added = std::process::Command::new("ssh-add")
        .arg("-q")
        .arg(world.path("id"))
        .env("SSH_AUTH_SOCK", &socket)
        .status()
        .unwrap();
    assert!(added.success());
    let key = std::fs::read_to_string(world.path("id.pub")).unwrap();
    for port in [world.direct, world.proxied] {
        // Without the option that keeps the agent out, in front of it.
        let ssh = |arguments: &[&str]| {
            let with = format!("IdentityAgent={}", socket.display());
            let mut command = world.ssh(port, &[]);
            let plain: Vec<_> = command.as_std().get_args().map(|a| a.to_str().unwrap().to_owned()).collect();
            let changed =
                plain.iter().map(|a| if a == "IdentityAgent=none" { with.clone() } else { a.clone() });
            let mut other = tokio::process::Command::new("ssh");
            other.args(changed).args(arguments).env("SSH_AUTH_SOCK", &socket).kill_on_drop(true);
            command = other;
            command
        };
        let listing = "ssh-add -L; echo $SSH_AUTH_SOCK >sock; stat -c %a $(dirname $SSH_AUTH_SOCK)";
        let output = finish(ssh(&["-A", "127.0.0.1", listing]), b"").await;
        assert_eq!(text(&output.stdout), format!("{key}700\n"), "{}", text(&output.stderr));
        let inside = std::fs::read_to_string(world.path("home/sock")).unwrap();
        until("the socket is gone", || !std::path::Path::new(inside.trim()).exists()).await;
        // Nobody gets it who did not ask.
        let output = finish(ssh(&["-a", "127.0.0.1", "echo [$SSH_AUTH_SOCK]"]), b"").await;
        assert_eq!(text(&output.stdout), "[]\n");
    }
    agent.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x_is_forwarded_with_a_cookie() {
    let world = World::new().await;
    // A display of the user's: it shows what it was sent first.
    let (listener, display) = loop {
        let display = 200 + rand_small();
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", 6000 + display)).await {
            break (listener, display);
        }
    };
    let (seen, mut shown) = tokio::sync::mpsc::channel::<Vec<u8>>(8);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut setup = vec![0; 12 + 20 + 16];
            if stream.read_exact(&mut setup).await.is_ok() {
                stream.write_all(b"an X server").await.unwrap();
                seen.send(setup).await.unwrap();
            }
        }
    });
    let name = format!("127.0.0.1:{display}");
    let authority = world.path("xauthority");
    let cookie = "00112233445566778899aabbccddeeff";
    let added = std::process::Command::new("xauth")
        .arg("-f")
        .arg(&authority)
        .args(["add", &name, "MIT-MAGIC-COOKIE-1", cookie])
        .status()
        .expect("the package xauth is needed");
    assert!(added.success());
    let script = r#"
import os, socket, subprocess, struct, sys
display = os.environ["DISPLAY"]
listed = subprocess.run(["xauth", "list", display], capture_output=True, text=True)
if not listed.stdout: sys.exit(repr((listed, dict(os.environ))))
listed = listed.stdout.split()
cookie = bytes.fromhex(listed[2])
name = b"MIT-MAGIC-COOKIE-1"
s = socket.create_connection(("localhost", 6000 + int(display.split(":")[1].split(".")[0])))
s.sendall(struct.pack("<BxHHHHxx", 0x6c, 11, 0, len(name), len(cookie)) + name + b"\0\0" + cookie)
print(s.recv(100))
"#;
    std::fs::write(world.path("home/x.py"), script).unwrap();
    for port in [world.direct, world.proxied] {
        let mut ssh = world.ssh(port, &["-Y", "127.0.0.1", "python3 x.py"]);
        ssh.env("DISPLAY", &name).env("XAUTHORITY", &authority);
        let output = finish(ssh, b"").await;
        assert_eq!(text(&output.stdout), "b'an X server'\n", "{}", text(&output.stderr));
        let setup = within(20, shown.recv()).await.unwrap();
        let sent: String = setup[32..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sent, cookie, "the client puts the true cookie in");
    }
}

fn rand_small() -> u16 {
    u16::from_be_bytes(*cocalc_core::ids::ProjectId::random().as_bytes().first_chunk().unwrap()) % 500
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_key_does_not_permit_is_refused_with_a_reason() {
    let world = World::new().await;
    common::keygen(&world.path("ca"));
    common::keygen(&world.path("fresh"));
    let signed = std::process::Command::new("ssh-keygen")
        .args(["-q", "-s", "ca", "-I", "u", "-n", &world.project.to_string(), "-V", "-1m:+5m", "fresh.pub"])
        .current_dir(world.directory.path())
        .status()
        .unwrap();
    assert!(signed.success());
    let line = std::fs::read_to_string(world.path("fresh-cert.pub")).unwrap();
    let certificate = line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let (outside, inside) = (echo().await, free_port());
    for port in [world.direct, world.proxied] {
        let ssh = |arguments: &[&str]| {
            let mut command = tokio::process::Command::new("ssh");
            command
                .args(world.options("fresh"))
                .args([
                    "-o",
                    "BatchMode=yes",
                    "-v",
                    "-p",
                    &port.to_string(),
                    "-l",
                    &world.project.to_string(),
                ])
                .args(arguments)
                .env("SSH_AUTH_SOCK", "/nonexistent")
                .kill_on_drop(true);
            finish(command, b"")
        };
        let permit = |restrictions| {
            *world.rights.certificate.lock().unwrap() = Some((certificate.clone(), restrictions));
        };
        permit(Restrictions::all());
        let remote = format!("{inside}:127.0.0.1:{outside}");
        let output = ssh(&["-R", &remote, "127.0.0.1", "echo in"]).await;
        assert_eq!(text(&output.stdout), "in\n");
        assert!(text(&output.stderr).contains("does not permit to listen"), "{}", text(&output.stderr));
        let output = ssh(&["-W", "never.invalid:1", "127.0.0.1"]).await;
        assert!(text(&output.stderr).contains("administratively prohibited"), "{}", text(&output.stderr));
        // Listening on one port only.
        permit(Restrictions { listen: Ports::Only([inside].into()), ..Restrictions::all() });
        let command = format!("exec 3<>/dev/tcp/127.0.0.1/{inside}; head -c 5 <&3");
        let output = ssh(&["-R", &remote, "127.0.0.1", &command]).await;
        assert_eq!(text(&output.stdout), "hello", "{}", text(&output.stderr));
        let output = ssh(&["-R", "0:127.0.0.1:1", "127.0.0.1", "echo in"]).await;
        assert!(text(&output.stderr).contains("does not permit to listen"), "{}", text(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revocation_closes_what_listens() {
    let world = World::new().await;
    let (outside, inside) = (echo().await, free_port());
    let remote = format!("{inside}:127.0.0.1:{outside}");
    let mut ssh =
        world.ssh(world.proxied, &["-N", "-R", &remote, "127.0.0.1"]).stdin(Stdio::null()).spawn().unwrap();
    until("it listens", || std::net::TcpStream::connect(("127.0.0.1", inside)).is_ok()).await;
    let mut open = TcpStream::connect(("127.0.0.1", inside)).await.unwrap();
    let mut hello = [0; 6];
    within(20, open.read_exact(&mut hello)).await.unwrap();
    world.rights.revoke();
    let mut rest = Vec::new();
    let _ = within(20, open.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
    until("nothing listens", || std::net::TcpStream::connect(("127.0.0.1", inside)).is_err()).await;
    within(20, ssh.wait()).await.unwrap();
}
