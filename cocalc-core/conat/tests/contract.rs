//! The contract of the bus, kept by the broker's clients, near and far.

mod common;

use std::{sync::Arc, time::Duration};

use cocalc_conat::Identity;
use cocalc_core::{bus::Bus, memory::bus::MemoryBus, subject};
use cocalc_testkit::bus::{self, Fixture};
use common::{Server, client};

const QUEUE: usize = 4 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_keeps_the_contract() {
    let fixture = async || {
        let server = Server::start().await;
        let (one, two, limited) =
            (client(&server, "all-1").await, client(&server, "all-2").await, client(&server, "open-3").await);
        let (one, two, limited) = (server.keep(one), server.keep(two), server.keep(limited));
        // What waits in the client and in the broker, and in the kernel.
        Fixture { one, two, limited, overflow: 12 * QUEUE }
    };
    bus::bus(fixture).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_local_client_keeps_the_contract() {
    let fixture = async || {
        let server = Server::start().await;
        let local =
            |name: &str| server.keep(server.broker.local_bus(Identity::new(name).queue_bytes_max(QUEUE)));
        Fixture { one: local("all-1"), two: local("all-2"), limited: local("open-3"), overflow: 4 * QUEUE }
    };
    bus::bus(fixture).await;
}

#[tokio::test]
async fn the_memory_bus_keeps_the_contract() {
    bus::bus(async || {
        let bus = MemoryBus::with_queue_bytes(QUEUE);
        let all = |_: subject::Access, _: &str| true;
        Fixture {
            one: bus.client("one", all),
            two: bus.client("two", all),
            limited: bus.client("limited", |_, subject| subject::covers("open.>", subject)),
            overflow: 4 * QUEUE,
        }
    })
    .await;
}

/// Both kinds of client of one broker reach each other.
#[tokio::test]
async fn near_and_far_reach_each_other() {
    let server = Server::start().await;
    let near = server.broker.local_bus(Identity::new("all-near"));
    let far = client(&server, "all-far").await;
    let mut service = near.subscribe("open.near", None).await.unwrap();
    let limit = Duration::from_secs(10);
    let (reply, ()) = tokio::join!(far.request("open.near", Default::default(), limit), async {
        let request = service.next().await.unwrap();
        near.publish(&request.reply.unwrap(), Default::default()).await.unwrap();
    });
    assert!(reply.unwrap().subject.starts_with("_INBOX.all-far."));
    let far: Arc<dyn Bus> = Arc::new(far);
    let mut service = far.subscribe("open.far", None).await.unwrap();
    let (reply, ()) = tokio::join!(near.request("open.far", Default::default(), limit), async {
        let request = service.next().await.unwrap();
        far.publish(&request.reply.unwrap(), Default::default()).await.unwrap();
    });
    assert!(reply.unwrap().subject.starts_with("_INBOX.all-near."));
}
