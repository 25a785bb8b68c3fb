//! A broker on a port of its own, and clients of it.
#![allow(dead_code, reason = "each test binary uses its part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

pub(crate) mod raw;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_conat::{Authorizer, Bearer, Broker, BrokerConfig, Client, ClientOptions, Handshake, Identity};
use cocalc_core::{
    bus::{Bus, Error, Message, Payload, Subscription},
    subject::{self, Access},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// The token is the name. `all-…` may do everything, `open-…` what is below
/// `open.`, anybody else cannot sign in.
#[derive(Debug)]
pub(crate) struct ByName {
    pub(crate) queue_bytes_max: usize,
}

#[async_trait]
impl Authorizer for ByName {
    async fn sign_in(&self, handshake: &Handshake, auth: &Value) -> Result<Identity, String> {
        let bearer = auth.get("bearer").and_then(Value::as_str).or(handshake.bearer.as_deref());
        let name = bearer.ok_or("no token")?;
        if !name.starts_with("all-") && !name.starts_with("open-") {
            return Err("unknown token".to_owned());
        }
        Ok(Identity::new(name).user(json!({ "account_id": name })).queue_bytes_max(self.queue_bytes_max))
    }

    async fn may(&self, identity: &Identity, subject: &str, _: Access) -> bool {
        // Authorization that waits must not reorder anything.
        tokio::task::yield_now().await;
        identity.name().starts_with("all-") || subject::covers("open.>", subject)
    }
}

pub(crate) struct Server {
    pub(crate) broker: Broker,
    pub(crate) address: SocketAddr,
    task: Arc<Task>,
}

struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::with(BrokerConfig { seed: Some(1), ..BrokerConfig::default() }).await
    }

    pub(crate) async fn with(config: BrokerConfig) -> Self {
        Self::at(config, "127.0.0.1:0").await
    }

    pub(crate) async fn at(config: BrokerConfig, address: &str) -> Self {
        let authorizer = Arc::new(ByName { queue_bytes_max: 4 * 1024 * 1024 });
        Self::with_authorizer(config, address, authorizer).await
    }

    pub(crate) async fn with_authorizer(
        config: BrokerConfig,
        address: &str,
        authorizer: Arc<dyn Authorizer>,
    ) -> Self {
        let broker = Broker::start(config, authorizer);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = broker.clone();
        let task = Arc::new(Task(tokio::spawn(async move { serving.serve(listener).await })));
        Self { broker, address, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("ws://{}/", self.address)
    }

    /// A bus that keeps the server alive.
    pub(crate) fn keep(&self, bus: impl Bus) -> Arc<dyn Bus> {
        Arc::new(Kept { bus, _broker: self.broker.clone(), _task: self.task.clone() })
    }
}

pub(crate) async fn client(server: &Server, name: &str) -> Client {
    let options = ClientOptions {
        reconnect_min: Duration::from_millis(20),
        reconnect_max: Duration::from_millis(200),
        queue_bytes_max: 4 * 1024 * 1024,
        ..ClientOptions::default()
    };
    let client = Client::connect(&server.url(), Arc::new(Bearer(name.to_owned())), options).unwrap();
    client.ready(LIMIT).await.unwrap();
    client
}

pub(crate) fn text(text: &str) -> Payload {
    Payload { data: text.to_owned().into(), ..Payload::default() }
}

pub(crate) fn body(message: &Message) -> &str {
    std::str::from_utf8(&message.payload.data).unwrap()
}

pub(crate) async fn next(subscription: &mut Subscription) -> Message {
    tokio::time::timeout(LIMIT, subscription.next()).await.expect("in time").expect("goes on")
}

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[derive(Debug)]
struct Kept<B> {
    bus: B,
    _broker: Broker,
    _task: Arc<Task>,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Task")
    }
}

#[async_trait]
impl<B: Bus> Bus for Kept<B> {
    async fn publish(&self, subject: &str, payload: Payload) -> Result<usize, Error> {
        self.bus.publish(subject, payload).await
    }

    async fn subscribe(&self, pattern: &str, queue: Option<&str>) -> Result<Subscription, Error> {
        self.bus.subscribe(pattern, queue).await
    }

    async fn request(&self, subject: &str, payload: Payload, limit: Duration) -> Result<Message, Error> {
        self.bus.request(subject, payload, limit).await
    }

    async fn wait_for_interest(&self, subject: &str, limit: Duration) -> Result<bool, Error> {
        self.bus.wait_for_interest(subject, limit).await
    }
}
