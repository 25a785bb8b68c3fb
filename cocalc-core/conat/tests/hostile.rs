//! What a broken or hostile client can do: lose its own connection.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

mod common;

use std::time::Duration;

use cocalc_conat::BrokerConfig;
use cocalc_core::bus::Bus;
use common::{
    LIMIT, Server, body, client, next,
    raw::{Raw, expect, raw, signed_in, with_bearer},
    text, until,
};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

async fn ends(ws: &mut Raw) {
    let end = async { while let Some(Ok(_)) = ws.next().await {} };
    tokio::time::timeout(LIMIT, end).await.expect("the connection ends");
}

#[tokio::test]
async fn malformed_frames_end_only_their_own_connection() {
    let server = Server::start().await;
    let one = client(&server, "all-1").await;
    let two = client(&server, "all-2").await;
    let mut reader = two.subscribe("a", None).await.unwrap();
    let place = r#"{"_placeholder":true,"num":0}"#;
    let frames: Vec<Vec<Message>> = vec![
        vec![Message::text("garbage")],
        vec![Message::text("")],
        vec![Message::text("42[")],
        vec![Message::binary(vec![0; 100])],
        vec![Message::text(format!(r#"452-["publish",[{place},{place}]]"#))],
        vec![Message::text(format!(r#"451-["publish",["a","i",0,1,0,{place}]]"#)), Message::text("2")],
        vec![Message::text(format!("42[\"publish\",{}", "[".repeat(500_000)))],
        vec![Message::text(r#"42["publish",["a","i",0,1,0,{"_placeholder":true,"num":9}]]"#)],
        vec![Message::text("x".repeat(2_000_000))],
        vec![Message::binary(vec![0; 9_000_000])],
        vec![Message::text("40")],
        vec![Message::text("41")],
        vec![Message::text("1")],
    ];
    for bad in frames {
        let name = format!("{:.60?}", bad[0]);
        let mut ws = signed_in(&server, "all-bad").await;
        for frame in bad {
            // It may be gone before all of a large frame is written.
            let _ = ws.send(frame).await;
        }
        ends(&mut ws).await;
        assert_eq!(one.publish("a", text(&name)).await.unwrap(), 1);
        assert_eq!(body(&next(&mut reader).await), name);
    }
    until("bad connections are forgotten", async || server.broker.connections() == 2).await;
    assert_eq!(*one.generation().borrow(), 1, "the others never lost their connection");
    assert_eq!(*two.generation().borrow(), 1);
}

#[tokio::test]
async fn malformed_requests_are_answered() {
    let server = Server::start().await;
    let mut ws = signed_in(&server, "all-1").await;
    let many = "a.".repeat(2000);
    for (ack, request) in [
        r#"["publish",["a"]]"#.to_owned(),
        r#"["publish",null]"#.to_owned(),
        r#"["publish"]"#.to_owned(),
        r#"["subscribe",{"queue":"x"}]"#.to_owned(),
        r#"["subscribe",{"subject":7}]"#.to_owned(),
        format!(r#"["subscribe",{{"subject":"{many}b"}}]"#),
        r#"["wait-for-interest",{"subject":"a","timeout":"soon"}]"#.to_owned(),
        r#"["wait-for-interest",{"subject":"a.*","timeout":1}]"#.to_owned(),
        r#"["fast-rpc",{}]"#.to_owned(),
        r#"["unheard of",1]"#.to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        ws.send(Message::text(format!("42{ack}{request}"))).await.unwrap();
        let answer = expect(&mut ws, "43").await;
        assert!(answer.starts_with(&format!("43{ack}[{{\"error\":\"Error: ")), "{request}: {answer}");
    }
}

#[tokio::test]
async fn half_handshakes_and_other_requests_are_refused() {
    let server = Server::start().await;
    let good = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let path = "/conat/?EIO=4&transport=websocket";
    let big = format!("X: {}\r\n", "x".repeat(10_000_000));
    for (request, answer) in [
        (format!("GET {path} HTTP/1.1\r\n{good}\r\n"), "HTTP/1.1 101 "),
        (format!("GET /base{path} HTTP/1.1\r\n{good}Origin: http://x\r\n\r\n"), "HTTP/1.1 101 "),
        ("GET /conat/?EIO=4&transport=polling HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
        (format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 400 "),
        (format!("POST {path} HTTP/1.1\r\n{good}\r\n"), "HTTP/1.1 400 "),
        (format!("GET /other HTTP/1.1\r\n{good}\r\n"), "HTTP/1.1 404 "),
        (format!("GET {path} HTTP/1.1\r\n{good}Origin: http://evil\r\n\r\n"), "HTTP/1.1 403 "),
        (format!("GET {path} HTTP/1.1\r\n{big}{good}\r\n"), "HTTP/1.1 431 "),
        ("\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
    ] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let (mut reader, mut writer) = stream.split();
        // What is too long may be answered, and closed, before it is all sent.
        let (_, got) = tokio::join!(writer.write_all(request.as_bytes()), async {
            let mut got = vec![0; answer.len()];
            let read = reader.read_exact(&mut got);
            tokio::time::timeout(LIMIT, read).await.expect("an answer in time").unwrap();
            String::from_utf8(got).unwrap()
        });
        assert_eq!(got, answer, "{request:.80}");
    }
    // A head that stops in the middle holds up nobody.
    let mut half = TcpStream::connect(server.address).await.unwrap();
    half.write_all(b"GET /conat/?EIO=4&tra").await.unwrap();
    client(&server, "all-1").await;
}

#[tokio::test]
async fn who_sends_no_first_packet_or_no_pong_is_closed() {
    let config = BrokerConfig {
        connect_limit: Duration::from_millis(300),
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_millis(50),
        ..BrokerConfig::default()
    };
    let server = Server::with(config).await;
    let mut mute = raw(&server).await;
    ends(&mut mute).await;
    let mut deaf = signed_in(&server, "all-deaf").await;
    expect(&mut deaf, "2").await;
    ends(&mut deaf).await;
    let mut alive = signed_in(&server, "all-alive").await;
    for _ in 0..10 {
        expect(&mut alive, "2").await;
        alive.send(Message::text("3")).await.unwrap();
    }
}

#[tokio::test]
async fn info_is_repeated_until_it_is_acknowledged() {
    let config = BrokerConfig {
        info_interval: Duration::from_millis(50),
        info_limit: Duration::from_millis(180),
        ..BrokerConfig::default()
    };
    let server = Server::with(config).await;
    let mut ws = raw(&server).await;
    ws.send(Message::text(r#"40{"bearer":"all-1"}"#)).await.unwrap();
    for ack in 0..3 {
        let info = expect(&mut ws, "42").await;
        assert!(info.starts_with(&format!("42{ack}[\"info\"")), "{info}");
    }
    ends(&mut ws).await;
}

#[tokio::test]
async fn who_cannot_sign_in_is_told_why() {
    let config = BrokerConfig { connections_per_identity_max: 2, ..BrokerConfig::default() };
    let server = Server::with(config).await;
    for (connect, reason) in [("40", "no token"), (r#"40{"bearer":"x"}"#, "unknown token")] {
        let mut ws = raw(&server).await;
        ws.send(Message::text(connect)).await.unwrap();
        expect(&mut ws, "40{").await;
        let info = expect(&mut ws, "42").await;
        assert!(info.contains(&format!("\"error\":\"Error: {reason}\"")), "{info}");
        expect(&mut ws, "41").await;
        ends(&mut ws).await;
    }
    let _first = signed_in(&server, "all-1").await;
    let second = signed_in(&server, "all-1").await;
    let mut third = raw(&server).await;
    third.send(Message::text(r#"40{"bearer":"all-1"}"#)).await.unwrap();
    let info = expect(&mut third, "42").await;
    assert!(info.contains("too many connections"), "{info}");
    let _other = signed_in(&server, "all-2").await;
    drop(second);
    until("a place is free again", async || server.broker.connections() == 2).await;
    signed_in(&server, "all-1").await;
}

#[tokio::test]
async fn who_says_nothing_keeps_out_nobody_with_a_token() {
    for (signing_in_max, signing_in_per_address_max) in [(3, 64), (1000, 3)] {
        let config = BrokerConfig { signing_in_max, signing_in_per_address_max, ..BrokerConfig::default() };
        let server = Server::with(config).await;
        let mut idle = Vec::new();
        for _ in 0..3 {
            let mut ws = raw(&server).await;
            expect(&mut ws, "0{").await;
            idle.push(ws);
        }
        let mut one_more = raw(&server).await;
        ends(&mut one_more).await;
        // A client sends its token with the upgrade; the wrong one is no help.
        let known = client(&server, "all-1").await;
        assert_eq!(known.publish("a", text("here")).await.unwrap(), 0);
        let mut stranger = with_bearer(&server, "stranger").await;
        ends(&mut stranger).await;
        // Who leaves makes room, and so does who signs in.
        drop(idle.pop());
        until("a place is free", async || {
            let mut ws = raw(&server).await;
            matches!(ws.next().await, Some(Ok(Message::Text(_))))
        })
        .await;
        let mut ws = idle.pop().unwrap();
        ws.send(Message::text(r#"40{"bearer":"all-2"}"#)).await.unwrap();
        expect(&mut ws, "40{").await;
        let _signed_in = ws;
        until("two places are free", async || {
            let (mut one, mut two) = (raw(&server).await, raw(&server).await);
            let (one, two) = (one.next().await, two.next().await);
            matches!((one, two), (Some(Ok(Message::Text(_))), Some(Ok(Message::Text(_)))))
        })
        .await;
    }
}

#[tokio::test]
async fn an_answer_goes_to_an_inbox_of_who_asked_only() {
    let server = Server::start().await;
    let service = client(&server, "all-service").await;
    let mut requests = service.subscribe("open.service", None).await.unwrap();
    let mut ws = signed_in(&server, "open-1").await;
    let ask = async |ws: &mut Raw, ack: u32, headers: &str| {
        let place = r#"{"_placeholder":true,"num":0}"#;
        let request = format!(r#"451-{ack}["publish",["open.service","id{ack}",0,1,1,{place},{headers}]]"#);
        ws.send(Message::text(request)).await.unwrap();
        ws.send(Message::binary(b"1".to_vec())).await.unwrap();
        expect(ws, &format!("43{ack}[")).await
    };
    for (ack, headers) in [
        r#"{"CN-Reply":"secret.stream"}"#,
        r#"{"CN-Reply":"_INBOX.all-2.x"}"#,
        r#"{"CN-Reply":"_INBOX.open-1"}"#,
        r#"{"CN-Reply":"_INBOX.open-12.x"}"#,
        r#"{"CN-Reply":"_INBOX.open-1.x","CN-Reply":"secret.stream"}"#,
        r#"{"CN\u002dReply":"secret.stream"}"#,
    ]
    .into_iter()
    .enumerate()
    {
        let answer = ask(&mut ws, u32::try_from(ack).unwrap(), headers).await;
        assert!(answer.contains("permission denied") && answer.contains("403"), "{headers}: {answer}");
    }
    let answer = ask(&mut ws, 50, r#"{"CN-Reply":"_INBOX.open-1.x","other":"secret.stream"}"#).await;
    assert!(answer.contains("\"count\":1"), "{answer}");
    assert_eq!(next(&mut requests).await.reply.as_deref(), Some("_INBOX.open-1.x"), "the only one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_disconnected_and_nobody_else() {
    let server = Server::start().await;
    let publisher = client(&server, "all-publisher").await;
    let reader = client(&server, "all-reader").await;
    let mut good = reader.subscribe("a", None).await.unwrap();
    let mut slow = signed_in(&server, "all-slow").await;
    slow.send(Message::text(r#"420["subscribe",{"subject":"a","queue":"slow"}]"#)).await.unwrap();
    expect(&mut slow, "430[").await;
    let mut count = 2;
    let mut sent = 0;
    // 4 MiB may wait; the kernel takes a few more.
    while count == 2 {
        count = publisher.publish("a", text(&"x".repeat(100_000))).await.unwrap();
        assert_eq!(next(&mut good).await.payload.data.len(), 100_000);
        sent += 1;
        assert!(sent < 1000, "the queue is not bounded");
    }
    assert_eq!(count, 1);
    assert!(sent > 40, "it may be behind by what the bound allows");
    ends(&mut slow).await;
    assert_eq!(*reader.generation().borrow(), 1);
    assert_eq!(*publisher.generation().borrow(), 1);
}

#[tokio::test]
async fn provoked_refusals_are_bounded_too() {
    let server = Server::start().await;
    let mut ws = signed_in(&server, "open-1").await;
    let subject = format!("secret.{}", "x".repeat(1900));
    let request = format!(r#"42["subscribe",{{"subject":"{subject}","queue":"q"}}]"#);
    // Each is refused by an event longer than the request, and none is read.
    let flood = async {
        for _ in 0..100_000 {
            if ws.send(Message::text(request.as_str())).await.is_err() {
                return true;
            }
        }
        false
    };
    assert!(tokio::time::timeout(LIMIT, flood).await.expect("not stuck"), "who floods is disconnected");
}

#[tokio::test]
async fn a_clean_close_is_a_clean_close() {
    let server = Server::start().await;
    let mut ws = signed_in(&server, "all-1").await;
    let frame =
        tokio_tungstenite::tungstenite::protocol::CloseFrame { code: CloseCode::Normal, reason: "".into() };
    ws.close(Some(frame)).await.unwrap();
    ends(&mut ws).await;
    until("it is forgotten", async || server.broker.connections() == 0).await;
}
