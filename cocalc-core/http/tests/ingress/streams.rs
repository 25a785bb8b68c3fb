//! WebSockets, long responses, uploads, and what ends them.

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::frame::coding::CloseCode},
};

use crate::support::*;

async fn open(
    world: &World,
    address: SocketAddr,
    base: &str,
    port: u16,
    fields: &[(&'static str, &str)],
) -> Result<WebSocketStream<TcpStream>, tungstenite::Error> {
    let url = format!("ws://localhost:{}{base}/{}/port/{port}/ws", address.port(), world.project);
    let mut request = url.into_client_request().unwrap();
    for (name, value) in fields {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    let stream = TcpStream::connect(address).await.unwrap();
    timeout(DEADLINE, client_async(request, stream)).await.unwrap().map(|(socket, _)| socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_carry_both_ways() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        let bearer = format!("Bearer {}", world.token());
        let mut socket =
            open(&world, address, base, world.echo, &[("authorization", &bearer)]).await.unwrap();
        for size in [0, 1, 125, 126, 65_535, 65_536, 1 << 20] {
            let message = Message::binary(vec![7u8; size]);
            socket.send(message.clone()).await.unwrap();
            assert_eq!(timeout(DEADLINE, socket.next()).await.unwrap().unwrap().unwrap(), message);
        }
        socket.close(None).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_counts_as_a_connection_of_its_address() {
    let world = World::with(cocalc_http::Limits { connections_per_source: 2, ..quick() }).await;
    let bearer = format!("Bearer {}", world.token());
    let open = async || {
        open(&world, world.host_address, "", world.echo, &[("authorization", &bearer)]).await.unwrap()
    };
    let mut sockets = [open().await, open().await];
    for socket in &mut sockets {
        socket.send(Message::text("hello")).await.unwrap();
        assert_eq!(timeout(DEADLINE, socket.next()).await.unwrap().unwrap().unwrap(), Message::text("hello"));
    }
    assert_eq!(world.ingress.stats().connections, 2);
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert!(raw(world.host_address, request).await.is_empty(), "a third one is closed at once");
    drop(sockets);
    eventually("they are gone", || world.ingress.stats().connections == 0).await;
    assert!(!raw(world.host_address, request).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_of_other_sites_are_refused() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        let bearer = format!("Bearer {}", world.token());
        let session = format!("http://localhost:{}{base}/{}/.cocalc/session", address.port(), world.project);
        let opened = curl(&["-i", "-X", "POST", "-H", &format!("Authorization: {bearer}"), &session]).await;
        let cookie = opened.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
        let cookie = cookie.split(';').next().unwrap();
        let here = format!("http://localhost:{}", address.port());
        let cases = [
            (vec![("cookie", cookie), ("origin", &*here)], true),
            (vec![("authorization", &*bearer)], true),
            (vec![("authorization", &*bearer), ("origin", &*here)], true),
            (vec![("cookie", cookie)], false),
            (vec![("cookie", cookie), ("origin", "null")], false),
            (vec![("cookie", cookie), ("origin", "http://evil.example")], false),
            (vec![("cookie", cookie), ("origin", "http://localhost:1")], false),
            (vec![("cookie", cookie), ("origin", &*here), ("origin", &*here)], false),
            (vec![("authorization", &*bearer), ("origin", "http://evil.example")], false),
            (vec![("origin", &*here)], false),
        ];
        for (fields, expected) in cases {
            let opened = open(&world, address, base, world.echo, &fields).await;
            assert_eq!(opened.is_ok(), expected, "{fields:?}: {opened:?}");
            if let Err(tungstenite::Error::Http(response)) = opened {
                assert!([401, 403].contains(&response.status().as_u16()), "{response:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_switch_gets_no_bytes() {
    let world = World::new().await;
    for (address, base, _) in world.ways() {
        let bearer = format!("Bearer {}", world.token());
        let opened = open(&world, address, base, world.app.port, &[("authorization", &bearer)]).await;
        match opened {
            Err(tungstenite::Error::Http(response)) => assert_eq!(response.status(), 200),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revocation_ends_what_is_open_at_once() {
    let world = World::new().await;
    let bearer = format!("Bearer {}", world.token());
    let mut sockets = Vec::new();
    let mut streams = Vec::new();
    for (address, base, _) in world.ways() {
        let mut socket =
            open(&world, address, base, world.echo, &[("authorization", &bearer)]).await.unwrap();
        socket.send(Message::text("hello")).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("hello"));
        sockets.push(socket);
        for path in ["sse", "silent"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let path = format!("{base}{}/{path}", world.mount());
            let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            if path.ends_with("sse") {
                // Something has arrived, unbuffered.
                let mut seen = Vec::new();
                while !String::from_utf8_lossy(&seen).contains("data: 1") {
                    let byte = timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap();
                    seen.push(byte);
                }
            }
            streams.push((path, stream));
        }
    }
    eventually("all six connections are registered", || world.auth.admitted() >= 6).await;
    world.auth.revoke();
    for mut socket in sockets {
        match timeout(DEADLINE, socket.next()).await.unwrap() {
            Some(Ok(Message::Close(Some(close)))) => assert_eq!(close.code, CloseCode::Policy),
            other => panic!("{other:?}"),
        }
    }
    for (path, mut stream) in streams {
        let mut rest = Vec::new();
        let read = timeout(DEADLINE, async {
            let mut buffer = [0; 4096];
            loop {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => rest.extend_from_slice(&buffer[..read]),
                }
                if String::from_utf8_lossy(&rest).contains("access_denied") {
                    break;
                }
            }
        });
        read.await.unwrap_or_else(|_| panic!("{path} goes on"));
        if path.ends_with("silent") {
            assert_eq!(outcomes(&rest), [(403, "access_denied".to_owned())]);
        }
    }
    eventually("nothing is registered", || world.auth.admitted() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn big_bodies_stream_both_ways() {
    let world = World::new().await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let file = std::env::temp_dir().join(format!("cocalc-http-{}", world.project));
    std::fs::write(&file, vec![b'u'; 20 << 20]).unwrap();
    let upload = format!("@{}", file.display());
    for (address, base, _) in world.ways() {
        let url = format!("http://localhost:{}{base}{}", address.port(), world.mount());
        let got =
            curl(&["-H", &bearer, "-o", "/dev/null", "-w", "%{size_download}", &format!("{url}/big")]).await;
        assert_eq!(got, "8388608");
        for chunked in ["X-A: b", "Transfer-Encoding: chunked"] {
            let sent =
                curl(&["-H", &bearer, "-H", chunked, "--data-binary", &upload, &format!("{url}/upload")])
                    .await;
            assert_eq!(sent, (20 << 20).to_string());
        }
    }
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_lets_streams_end_by_a_deadline() {
    let mut world = World::new().await;
    let bearer = format!("Bearer {}", world.token());
    let mut socket =
        open(&world, world.host_address, "", world.echo, &[("authorization", &bearer)]).await.unwrap();
    let mut stream = TcpStream::connect(world.host_address).await.unwrap();
    let head =
        format!("GET {}/sse HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\n\r\n", world.mount());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.read_u8().await.unwrap();
    world.shut_down().await;
    match timeout(DEADLINE, socket.next()).await.unwrap() {
        Some(Ok(Message::Close(Some(close)))) => assert_eq!(close.code, CloseCode::Away),
        other => panic!("{other:?}"),
    }
    let mut rest = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.unwrap();
    assert!(TcpStream::connect(world.host_address).await.is_err(), "the listener is gone");
    eventually("every connection has ended", || world.ingress.stats().connections <= 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bus_is_spoken_over_websocket_and_revoked_too() {
    let world = World::new().await;
    let handshake = |address: SocketAddr, base: &str, fields: &str| {
        format!(
            "GET {base}/{}/conat/?EIO=4 HTTP/1.1\r\nHost: localhost:{}\r\nAuthorization: Bearer {}\r\n{fields}\r\n",
            world.project,
            address.port(),
            world.token()
        )
    };
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut open = Vec::new();
    for (address, base, _) in world.ways() {
        let plain = raw(address, handshake(address, base, "Connection: close\r\n")).await;
        assert_eq!(outcomes(&plain), [(426, "websocket_required".to_owned())]);
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(handshake(address, base, upgrade).as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap());
        }
        let head = text(head);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.contains("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{head}");
        stream.write_all(b"polly").await.unwrap();
        let mut heard = [0; 5];
        timeout(DEADLINE, stream.read_exact(&mut heard)).await.unwrap().unwrap();
        assert_eq!(&heard, b"polly");
        open.push(stream);
    }
    world.auth.revoke();
    for mut stream in open {
        let mut rest = Vec::new();
        let _ = timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("it goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_apps_are_used_again() {
    let world = World::new().await;
    let bearer = format!("Authorization: Bearer {}", world.token());
    let url = format!("http://localhost:{}{}/x", world.host_address.port(), world.mount());
    for _ in 0..10 {
        curl(&["-H", &bearer, &url, &url]).await;
    }
    assert_eq!(world.app.connections.load(std::sync::atomic::Ordering::Relaxed), 1);
    let stats = world.ingress.stats();
    assert_eq!((stats.requests, stats.denied, stats.websockets), (20, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_answers_for_itself() {
    let world = World::new().await;
    for path in ["healthz", "readyz", ".cocalc/x", "conat/", ""] {
        let url = format!("http://127.0.0.1:{}/{path}", world.host_address.port());
        let answer = curl(&["-w", "%{http_code}", &url]).await;
        let expected = if path == "healthz" { "alive200" } else { "404" };
        assert!(answer.ends_with(expected), "{path}: {answer}");
    }
}
