//! This crate's own client, and clients that break the protocol. Needs the
//! package openssh-client.

#![allow(clippy::unwrap_used, reason = "a test fails by it, in its helpers too")]

mod common;

use std::{collections::BTreeMap, time::Duration};

use cocalc_core::{
    auth::Secret,
    runner::{Command, ExecRequest, Exit, Process, Pty, WindowSize},
};
use cocalc_ssh::client::{Client, ClientError, HostKeyCheck, Identity};
use common::{EXPIRED, TOKEN, World, text, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

fn token(token: &str) -> Identity {
    Identity::Token(Secret::new(token))
}

async fn connect(world: &World, port: u16, identity: &Identity) -> Result<Client, ClientError> {
    let keys = HostKeyCheck::Pinned(world.host_keys.clone());
    within(60, Client::connect(&format!("127.0.0.1:{port}"), world.project, identity, keys)).await
}

fn line(line: &str) -> ExecRequest {
    ExecRequest { command: Command::Line(line.into()), ..ExecRequest::default() }
}

async fn output(mut process: Process, input: &[u8]) -> (String, String, Exit) {
    let (mut out, mut err) = (String::new(), String::new());
    let mut stderr = process.stderr.take().unwrap();
    let mut stdin = process.stdin;
    let work = async {
        let feed = async {
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let (_, read, _, exit) = tokio::join!(
            feed,
            process.stdout.read_to_string(&mut out),
            stderr.read_to_string(&mut err),
            process.handle.wait()
        );
        read.unwrap();
        exit.unwrap()
    };
    let exit = within(60, work).await;
    (out, err, exit)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_runs_commands() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        for identity in [token(TOKEN), Identity::KeyFile(world.path("id"))] {
            let client = connect(&world, port, &identity).await.unwrap();
            for code in [0, 3, 255] {
                let process = client.exec(&line(&format!("cat; echo err >&2; exit {code}"))).await.unwrap();
                let (out, err, exit) = output(process, b"input").await;
                assert_eq!((out.as_str(), err.as_str(), exit), ("input", "err\n", Exit::Code(code)));
            }
            let argv = ["printf", "%s|", "a b", "it's"].map(String::from).to_vec();
            let request = ExecRequest { command: Command::Argv(argv), ..ExecRequest::default() };
            let (out, _, _) = output(client.exec(&request).await.unwrap(), b"").await;
            assert_eq!(out, "a b|it's|");
            let mut request = line("echo $COLOR");
            request.env = BTreeMap::from([("COLOR".to_owned(), "blue".to_owned())]);
            let (out, _, _) = output(client.exec(&request).await.unwrap(), b"").await;
            assert_eq!(out, "blue\n");
            let mut process = client.exec(&line("echo up; exec sleep 1000")).await.unwrap();
            let mut up = [0; 3];
            process.stdout.read_exact(&mut up).await.unwrap();
            process.handle.signal("TERM").await.unwrap();
            let exit = within(30, process.handle.wait()).await.unwrap();
            assert_eq!(exit, Exit::Signal("TERM".into()));
            client.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_has_terminals() {
    let world = World::new().await;
    let client = connect(&world, world.proxied, &token(TOKEN)).await.unwrap();
    let size = WindowSize { cols: 90, rows: 30 };
    let script = r#"stty size; until [ "$(stty size)" = "40 120" ]; do sleep 0.02; done; exit 5"#;
    let request = ExecRequest { pty: Some(Pty::new("vt100", size)), ..line(script) };
    let mut process = client.exec(&request).await.unwrap();
    assert!(process.stderr.is_none());
    let mut shown = [0; 7];
    within(30, process.stdout.read_exact(&mut shown)).await.unwrap();
    assert_eq!(text(&shown), "30 90\r\n");
    process.handle.resize(WindowSize { cols: 120, rows: 40 }).await.unwrap();
    assert_eq!(within(30, process.handle.wait()).await.unwrap(), Exit::Code(5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_is_told_why_not() {
    let world = World::new().await;
    for port in [world.direct, world.proxied] {
        let refused = connect(&world, port, &token(EXPIRED)).await.unwrap_err();
        assert!(refused.to_string().contains("token has expired"), "{refused}");
        let refused = connect(&world, port, &token("nonsense")).await.unwrap_err();
        assert!(refused.to_string().contains("Access denied"), "{refused}");
        let refused = connect(&world, port, &Identity::KeyFile(world.path("stranger"))).await.unwrap_err();
        assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
    }
    let address = format!("127.0.0.1:{}", world.direct);
    let others = HostKeyCheck::Pinned(vec![world.rights.key.clone()]);
    let refused = Client::connect(&address, world.project, &token(TOKEN), others).await.unwrap_err();
    assert!(matches!(refused, ClientError::HostKey), "{refused}");
    let nobody =
        Client::connect("127.0.0.1:1", world.project, &token(TOKEN), HostKeyCheck::Any).await.unwrap_err();
    assert!(matches!(nobody, ClientError::Unreachable { .. }), "{nobody}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_ends_its_own_connection_only() {
    let world = World::with(|builder| builder.login_grace(Duration::from_secs(2))).await;
    let client = connect(&world, world.direct, &token(TOKEN)).await.unwrap();
    let mut noise = vec![0_u8; 200_000];
    let mut state = 1_u32;
    for byte in &mut noise {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let banner = b"SSH-2.0-x\r\n".to_vec();
    let huge = [&banner[..], &[0x7f, 0xff, 0xff, 0xff, 4, 20]].concat();
    let noisy = [&banner[..], &noise].concat();
    let half = b"SSH-2.0-hal".to_vec();
    let lines = b"nonsense\r\n".repeat(5000);
    for garbage in [noise, noisy, huge, half, banner, lines, Vec::new()] {
        let mut stream = TcpStream::connect(("127.0.0.1", world.direct)).await.unwrap();
        let _ = stream.write_all(&garbage).await;
        // Nothing is shut down: the server has to end it.
        let mut rest = Vec::new();
        let _ = within(20, stream.read_to_end(&mut rest)).await;
        let (out, _, exit) = output(client.exec(&line("echo fine")).await.unwrap(), b"").await;
        assert_eq!((out.as_str(), exit), ("fine\n", Exit::Code(0)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_cannot_take_every_place() {
    let world = World::with(|builder| builder.connections_per_address_max(3)).await;
    let client = connect(&world, world.direct, &token(TOKEN)).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(("127.0.0.1", world.direct)).await.unwrap();
        let mut banner = [0; 4];
        within(20, stream.read_exact(&mut banner)).await.unwrap();
        assert_eq!(&banner, b"SSH-");
        open.push(stream);
    }
    let mut stream = TcpStream::connect(("127.0.0.1", world.direct)).await.unwrap();
    let mut nothing = Vec::new();
    let _ = within(20, stream.read_to_end(&mut nothing)).await;
    assert!(nothing.is_empty());
    // Places are given back.
    drop(open);
    for _ in 0..200 {
        let mut stream = TcpStream::connect(("127.0.0.1", world.direct)).await.unwrap();
        let mut banner = [0; 4];
        if stream.read_exact(&mut banner).await.is_ok() {
            client.close().await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no place was given back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_cannot_keep_others_from_logging_in() {
    let world = World::new().await;
    // It has logged in, and no longer counts.
    let client = connect(&world, world.direct, &token(TOKEN)).await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..100 {
        // It says nothing, and is either greeted or hung up on.
        let mut stream = TcpStream::connect(("127.0.0.1", world.direct)).await.unwrap();
        let mut banner = [0; 4];
        match within(20, stream.read_exact(&mut banner)).await {
            Ok(_) => idle.push(stream),
            Err(_) => assert_eq!(idle.len(), 50, "a quarter of all logins"),
        }
    }
    assert_eq!(idle.len(), 50);
    for _ in 0..10 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(([127, 0, 0, 1], world.direct).into()).await.unwrap();
        let mut banner = [0; 4];
        within(20, stream.read_exact(&mut banner)).await.unwrap();
        assert_eq!(&banner, b"SSH-");
    }
    client.close().await;
    // Who gives up makes room.
    drop(idle);
    let again = async {
        loop {
            match connect(&world, world.direct, &token(TOKEN)).await {
                Ok(client) => return client,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    within(20, again).await.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_of_a_connection_are_counted() {
    let world = World::with(|builder| builder.channels_max(2)).await;
    let client = connect(&world, world.direct, &token(TOKEN)).await.unwrap();
    let first = client.exec(&line("cat")).await.unwrap();
    let second = client.exec(&line("cat")).await.unwrap();
    assert!(client.exec(&line("cat")).await.is_err());
    assert_eq!(output(first, b"1").await.0, "1");
    assert_eq!(output(second, b"2").await.0, "2");
    for _ in 0..200 {
        if let Ok(third) = client.exec(&line("cat")).await {
            assert_eq!(output(third, b"3").await.0, "3");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no channel was given back");
}
