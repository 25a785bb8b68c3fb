//! Broker and client together: order, amounts, reconnecting, revocation.

mod common;

use std::{sync::Arc, time::Duration};

use cocalc_conat::{Bearer, BrokerConfig, Client, ClientOptions, Identity};
use cocalc_core::bus::{Bus, Error, Payload};
use common::{ByName, LIMIT, Server, body, client, next, raw::signed_in, text, until};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_messages_of_two_publishers_keep_their_order() {
    let server = Server::start().await;
    let reader = client(&server, "all-reader").await;
    let mut messages = reader.subscribe("n.*", None).await.unwrap();
    let publish = async |name: &str| {
        let (mut sink, mut stream) = signed_in(&server, name).await.split();
        // All at once: authorization yields each time, and must not let one
        // overtake another.
        let send = async {
            for i in 0..5000 {
                let place = r#"{"_placeholder":true,"num":0}"#;
                let text = format!(r#"451-{i}["publish",["n.{name}","id{i}",0,1,1,{place}]]"#);
                sink.feed(Message::text(text)).await.unwrap();
                sink.feed(Message::binary(i.to_string().into_bytes())).await.unwrap();
            }
            sink.flush().await.unwrap();
        };
        let acknowledged = async {
            let mut next = 0;
            while next < 5000 {
                let frame = stream.next().await.unwrap().unwrap().into_text().unwrap();
                if frame.starts_with("43") {
                    assert!(frame.starts_with(&format!("43{next}[{{\"count\":1,")), "{next}: {frame}");
                    next += 1;
                }
            }
        };
        tokio::time::timeout(LIMIT, async { tokio::join!(send, acknowledged) }).await.expect("in time");
    };
    let read = async {
        let mut expected = [0, 0];
        for _ in 0..10_000 {
            let message = next(&mut messages).await;
            let of = usize::from(message.subject == "n.all-b");
            assert_eq!(body(&message), expected[of].to_string(), "{}", message.subject);
            expected[of] += 1;
        }
        assert_eq!(expected, [5000, 5000]);
    };
    tokio::join!(publish("all-a"), publish("all-b"), read);
}

#[tokio::test]
async fn a_client_survives_its_broker() {
    let server = Server::start().await;
    let address = server.address.to_string();
    let alone = client(&server, "all-1").await;
    let mut messages = alone.subscribe("a.*", Some("q")).await.unwrap();
    let _silent = alone.subscribe("silent", None).await.unwrap();
    let pending = tokio::spawn({
        let alone = alone.clone();
        async move { alone.request("silent", Payload::default(), Duration::from_secs(60)).await }
    });
    until("the request is under way", async || {
        server.broker.local_bus(Identity::new("all-0")).publish("silent", text("x")).await.unwrap() == 1
    })
    .await;
    drop(server);
    // What is under way fails at once, not at its limit.
    let error = tokio::time::timeout(LIMIT, pending).await.expect("at once").unwrap().unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    let mut connected = alone.connected();
    tokio::time::timeout(LIMIT, connected.wait_for(|up| !up)).await.expect("noticed").unwrap();
    // Without a connection calls fail too, each after its own limit.
    let error = alone.request("a.b", Payload::default(), Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error:?}");
    assert!(alone.last_error().is_some());

    let mut server = None;
    until("the port is free again", async || {
        let free = tokio::net::TcpListener::bind(&address).await.is_ok();
        if free {
            server = Some(Server::at(BrokerConfig::default(), &address).await);
        }
        free
    })
    .await;
    alone.ready(LIMIT).await.unwrap();
    assert_eq!(*alone.generation().borrow(), 2);
    assert_eq!(alone.publish("a.b", text("again")).await.unwrap(), 1, "subscribed again before it is ready");
    assert_eq!(body(&next(&mut messages).await), "again");
    let (reply, ()) = tokio::join!(alone.request("a.c", text("q"), LIMIT), async {
        let request = next(&mut messages).await;
        alone.publish(&request.reply.unwrap(), text("r")).await.unwrap();
    });
    assert_eq!(body(&reply.unwrap()), "r");
    drop(server);
}

#[tokio::test]
async fn revocation_ends_connections_at_once() {
    let server = Server::start().await;
    let stays = client(&server, "all-stays").await;
    let goes = client(&server, "all-goes").await;
    let near = server.broker.local_bus(Identity::new("all-goes"));
    let _far = goes.subscribe("a", None).await.unwrap();
    let mut near_messages = near.subscribe("a", None).await.unwrap();
    let mut own = stays.subscribe("a", None).await.unwrap();
    assert_eq!(stays.publish("a", text("1")).await.unwrap(), 3);
    // The connection, the local client's own socket, and its subscription.
    assert_eq!(server.broker.revoke("all-goes").await, 3);
    // From here on nothing more reaches them; a client whose token is still
    // good comes back.
    assert_eq!(body(&next(&mut near_messages).await), "1");
    let ended = tokio::time::timeout(LIMIT, near_messages.next()).await.expect("it ends");
    assert!(ended.is_none(), "{ended:?}");
    assert!(matches!(near.publish("a", text("x")).await, Err(Error::Disconnected { .. })));
    tokio::time::timeout(LIMIT, goes.generation().wait_for(|generation| *generation == 2))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(body(&next(&mut own).await), "1");
    assert_eq!(*stays.generation().borrow(), 1);
    assert_eq!(server.broker.revoke("nobody").await, 0);
}

#[tokio::test]
async fn a_client_that_cannot_sign_in_says_so_and_tries_again() {
    let server = Server::start().await;
    let options = ClientOptions {
        reconnect_min: Duration::from_millis(5),
        patience: Duration::from_millis(200),
        ..ClientOptions::default()
    };
    let client = Client::connect(&server.url(), Arc::new(Bearer("nobody".to_owned())), options).unwrap();
    until("it says why", async || client.last_error().is_some_and(|error| error.contains("unknown token")))
        .await;
    let error = client.publish("a", text("x")).await.unwrap_err();
    assert!(cocalc_core::chain(&error).contains("unknown token"), "{error:?}");
    assert!(!*client.connected().borrow());
}

#[tokio::test]
async fn an_identity_may_be_held_to_small_messages() {
    #[derive(Debug)]
    struct Small(ByName);

    #[async_trait::async_trait]
    impl cocalc_conat::Authorizer for Small {
        async fn sign_in(
            &self,
            handshake: &cocalc_conat::Handshake,
            auth: &serde_json::Value,
        ) -> Result<Identity, String> {
            Ok(self.0.sign_in(handshake, auth).await?.message_bytes_max(256 * 1024))
        }

        async fn may(
            &self,
            identity: &Identity,
            subject: &str,
            access: cocalc_core::subject::Access,
        ) -> bool {
            self.0.may(identity, subject, access).await
        }
    }

    let small = Small(ByName { queue_bytes_max: 4 * 1024 * 1024 });
    let server = Server::with_authorizer(BrokerConfig::default(), "127.0.0.1:0", Arc::new(small)).await;
    let one = client(&server, "all-1").await;
    let mut messages = one.subscribe("a", None).await.unwrap();
    let fits = text(&"x".repeat(200 * 1024));
    assert_eq!(one.publish("a", fits.clone()).await.unwrap(), 1);
    assert_eq!(next(&mut messages).await.payload, fits, "also in several chunks");
    let error = one.publish("a", text(&"x".repeat(300 * 1024))).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: 262_144, size: 307_200 }), "{error:?}");
    assert_eq!(one.publish("a", text("still here")).await.unwrap(), 1);
    assert_eq!(body(&next(&mut messages).await), "still here");
}

#[tokio::test]
async fn dropping_the_broker_or_the_client_leaves_nothing() {
    let server = Server::start().await;
    let one = client(&server, "all-1").await;
    let mut alone = one.subscribe("a", None).await.unwrap();
    let mut same = one.subscribe("a", None).await.unwrap();
    assert_eq!(server.broker.connections(), 2, "a second subscription to one pattern is a second connection");
    drop(one);
    assert!(tokio::time::timeout(LIMIT, alone.next()).await.expect("ends").is_none());
    assert!(tokio::time::timeout(LIMIT, same.next()).await.expect("ends").is_none());
    until("both connections end", async || server.broker.connections() == 0).await;
}
