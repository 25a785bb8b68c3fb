//! What an enemy tried: each a way in, or a way to stay, that there was once.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::timeout,
};

use crate::support::*;

/// An answer of ten bytes may take hours: it is no less open for saying how short
/// it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_answer_that_takes_its_time_ends_with_the_right_to_it() {
    let world = World::new().await;
    let secret = Arc::new(Notify::new());
    let told = secret.clone();
    let (port, _app) = scripted(move |mut stream: TcpStream, _| {
        let told = told.clone();
        async move {
            until(&mut stream, "\r\n\r\n").await?;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n").await?;
            told.notified().await;
            stream.write_all(b"0123456789").await
        }
    })
    .await;
    for (address, base, name) in world.ways() {
        let mut client = TcpStream::connect(address).await.unwrap();
        let ask = format!(
            "GET {base}/{}/port/{port}/ HTTP/1.1\r\nHost: localhost:{}\r\nAuthorization: Bearer {}\r\n\r\n",
            world.project,
            address.port(),
            world.token()
        );
        client.write_all(ask.as_bytes()).await.unwrap();
        let head = heard(&mut client, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{name}: {head}");
        // As a connection that lasts it is known, and ends with the right.
        eventually("it is known that it goes on", || world.auth.admitted() > 0).await;
        world.auth.revoke();
        let mut rest = Vec::new();
        let ended = timeout(DEADLINE, client.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty(), "{name}: {ended:?} {rest:?}");
        secret.notify_waiters();
        world.auth.restore();
    }
}

/// A page may set a cookie that has no name: browsers send what it says as it is,
/// and it looks like any other.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_sets_no_cookie_that_is_sent_as_one_of_ours() {
    let world = World::new().await;
    let planted = format!("=cocalc-session-http-{}=planted", world.host);
    let (port, _app) = scripted(move |mut stream: TcpStream, _| {
        let planted = planted.clone();
        async move {
            let answer = format!(
                "HTTP/1.1 200 OK\r\nSet-Cookie: {planted}; Path=/\r\nSet-Cookie: ={planted}\r\n\
                 Set-Cookie: own=1\r\nNEL: {{}}\r\nReport-To: {{}}\r\nContent-Length: 0\r\n\r\n"
            );
            loop {
                until(&mut stream, "\r\n\r\n").await?;
                stream.write_all(answer.as_bytes()).await?;
            }
        }
    })
    .await;
    for (address, base, name) in world.ways() {
        let url = format!("http://localhost:{}{base}/{}/port/{port}/", address.port(), world.project);
        let answer = curl(&["-i", "-H", &format!("Authorization: Bearer {}", world.token()), &url]).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("own=1"), "{name}: {answer}");
        assert!(!answer.to_lowercase().contains("cocalc-session"), "{name}: {answer}");
        assert!(!answer.contains("report-to") && !answer.contains("nel:"), "{name}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_out_twice_is_no_mistake() {
    let world = World::new().await;
    for (address, base, name) in world.ways() {
        let url = format!("http://localhost:{}{base}/{}/.cocalc/session", address.port(), world.project);
        let bearer = format!("Authorization: Bearer {}", world.token());
        let opened = curl(&["-i", "-X", "POST", "-H", &bearer, &url]).await;
        let cookies: Vec<&str> =
            opened.lines().filter_map(|line| line.strip_prefix("set-cookie: ")?.split(';').next()).collect();
        let cookie = format!("Cookie: {}", cookies.join("; "));
        for _ in 0..2 {
            let closed = curl(&["-i", "-X", "DELETE", "-H", &cookie, &url]).await;
            assert!(closed.starts_with("HTTP/1.1 204 ") && closed.contains("Max-Age=0"), "{name}: {closed}");
        }
        let evil = ["-i", "-X", "DELETE", "-H", &cookie, "-H", "Origin: https://evil.example", &url];
        assert!(curl(&evil).await.contains("cocalc-code: origin_refused"), "{name}");
    }
}

/// Who may have no more, and reads nothing, would keep what is on its way to them: the
/// connection ends nevertheless, in all versions and for files, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_does_not_stay() {
    let world = World::new().await;
    let (port, _app) = scripted(|mut stream: TcpStream, _| async move {
        until(&mut stream, "\r\n\r\n").await?;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n").await?;
        loop {
            stream.write_all(&[b'x'; 65536]).await?;
        }
    })
    .await;
    std::fs::File::create(world.path("huge")).unwrap().set_len(1 << 34).unwrap();
    for (address, base, name) in world.ways() {
        for place in [format!("port/{port}/"), "files/huge".to_owned()] {
            let mut client = TcpStream::connect(address).await.unwrap();
            let ask = format!(
                "GET {base}/{}/{place} HTTP/1.1\r\nHost: localhost:{}\r\nAuthorization: Bearer {}\r\n\r\n",
                world.project,
                address.port(),
                world.token()
            );
            client.write_all(ask.as_bytes()).await.unwrap();
            let head = heard(&mut client, "\r\n\r\n").await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{name} {place}: {head}");
            eventually("it is known that it goes on", || world.auth.admitted() > 0).await;
            // Until nothing more fits in between.
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            world.auth.revoke();
            eventually(&format!("{name} {place} is closed"), || world.auth.admitted() == 0).await;
            world.auth.restore();
        }
    }
}
