//! The promise that space comes back.

use std::time::Duration;

use cocalc_core::{
    ids::ProjectId,
    storage::{Error, SendOptions, VolumeOptions},
};
use tokio::io::AsyncReadExt as _;

use super::{
    Harness, Host,
    promises::{LIMIT, name, project},
    sharing::{MIB, noise},
};

/// What counting may be off by: metadata, and what a volume has when it is empty.
const SLACK: u64 = 512 << 10;
/// How much is written to see it in what is free on the volume, and how much of
/// that may be missing afterwards, because a file system keeps what it has once
/// taken for metadata: on Btrfs in twos of 51 MB, on a volume of 1 GiB.
const VISIBLE: usize = 256 * MIB;
const FREE_SLACK: u64 = 128 << 20;

/// Waits until it holds; whoever cleans up may take a while.
async fn soon(what: &str, mut holds: impl AsyncFnMut() -> Result<(), String>) {
    let mut last = String::new();
    let waited = async {
        while let Err(seen) = holds().await {
            last = seen;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(LIMIT, waited).await.is_err() {
        panic!("{what}: {last}");
    }
}

/// Waits until a project is charged for no more than this.
async fn charged_at_most(h: &dyn Harness, host: Host, project: ProjectId, most: u64, what: &str) {
    let store = h.store(host);
    soon(what, async || {
        // Harmless, and written out, with what was removed before.
        store.set_limit(project, None).await.unwrap();
        let charged = store.usage(project).await.unwrap().charged_bytes;
        if charged <= most { Ok(()) } else { Err(format!("{charged} bytes are charged, not {most}")) }
    })
    .await;
}

/// Deletes it; holds of what was sent may end a moment later.
async fn deleted(h: &dyn Harness, host: Host, project: ProjectId) {
    soon("it can be deleted", async || match h.store(host).delete(project).await {
        Err(error @ Error::InUse { .. }) => Err(error.to_string()),
        other => {
            other.unwrap();
            Ok(())
        }
    })
    .await;
}

async fn free_again(h: &dyn Harness, host: Host, before: Option<u64>, what: &str) {
    let Some(before) = before else { return };
    soon(what, async || {
        let free = h.free_bytes(host).await.unwrap_or(0);
        if free + FREE_SLACK >= before { Ok(()) } else { Err(format!("{free} bytes are free, not {before}")) }
    })
    .await;
}

pub(super) async fn returns(h: &dyn Harness) {
    if h.store(Host::First).capabilities().quotas {
        charges(h).await;
    }
    let before = [h.free_bytes(Host::First).await, h.free_bytes(Host::Second).await];
    let project = project(h).await;
    let (first, second) = (h.store(Host::First), h.store(Host::Second));
    let size = if before[0].is_some() { VISIBLE } else { MIB };
    for number in 0..16_u8 {
        h.write(Host::First, project, &format!("home/{number}"), &vec![number; size / 16]).await.unwrap();
    }
    first.snapshot(project, &name("one")).await.unwrap();
    if let (Some(before), Some(now)) = (before[0], h.free_bytes(Host::First).await) {
        assert!(now + FREE_SLACK < before, "what is written is seen in what is free: {before}, {now}");
    }
    let mut sent = first.send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    let mut most = Vec::new();
    sent.reader.read_to_end(&mut most).await.unwrap();
    most.truncate(most.len() / 10 * 9);
    let got = second.receive(&sent.header, Box::pin(std::io::Cursor::new(most))).await;
    assert!(got.is_err(), "a stream that is cut is not received");
    drop(sent.reader);
    assert!(second.usage(project).await.is_err(), "nothing of it is charged");
    free_again(h, Host::Second, before[1], "what was not received to its end takes no space").await;

    deleted(h, Host::First, project).await;
    assert!(first.usage(project).await.is_err(), "what is deleted is charged to nobody");
    free_again(h, Host::First, before[0], "what is deleted takes no space").await;
}

async fn charges(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    let full = 2 * MIB as u64;
    let empty = store.usage(project).await.unwrap().charged_bytes;
    assert!(empty < SLACK, "an empty volume takes next to nothing: {empty}");
    let at_most = async |most, what: &str| charged_at_most(h, Host::First, project, most, what).await;

    h.write(Host::First, project, "home/a", &noise(1, 2 * MIB)).await.unwrap();
    store.snapshot(project, &name("one")).await.unwrap();
    h.write(Host::First, project, "home/a", &noise(2, 2 * MIB)).await.unwrap();
    store.snapshot(project, &name("two")).await.unwrap();
    let charged = store.usage(project).await.unwrap().charged_bytes;
    assert!((2 * full..2 * full + 2 * SLACK).contains(&charged), "two states are charged: {charged}");
    store.delete_snapshot(project, &name("one")).await.unwrap();
    at_most(empty + full + SLACK, "a deleted snapshot's own bytes").await;
    store.restore(project, &name("two"), &name("former")).await.unwrap();
    h.write(Host::First, project, "home/a", b"").await.unwrap();
    for n in ["two", "former"] {
        store.delete_snapshot(project, &name(n)).await.unwrap();
    }
    at_most(empty + SLACK, "what a replaced volume had").await;

    // A second time of the same name, and what was not received.
    let second = h.store(Host::Second);
    h.write(Host::First, project, "home/a", &noise(3, 2 * MIB)).await.unwrap();
    store.snapshot(project, &name("one")).await.unwrap();
    let sent = store.send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    second.receive(&sent.header, sent.reader).await.unwrap();
    h.write(Host::First, project, "home/b", &noise(4, 2 * MIB)).await.unwrap();
    store.snapshot(project, &name("two")).await.unwrap();
    let options = SendOptions::since(Some(&name("one")));
    let mut sent = store.send(project, &name("two"), &options).await.unwrap();
    let mut bytes = Vec::new();
    sent.reader.read_to_end(&mut bytes).await.unwrap();
    bytes.truncate(bytes.len() / 10 * 9);
    for _ in 0..3 {
        let cut = Box::pin(std::io::Cursor::new(bytes.clone()));
        assert!(second.receive(&sent.header, cut).await.is_err(), "a stream that is cut is not received");
    }
    charged_at_most(h, Host::Second, project, full + SLACK, "what was not received to its end").await;
    drop(sent);
    for host in [Host::First, Host::Second] {
        deleted(h, host, project).await;
    }
    store.create(project, &VolumeOptions::default()).await.unwrap();
    let charged = store.usage(project).await.unwrap().charged_bytes;
    assert!(charged < SLACK, "another volume of that name begins with nothing: {charged}");
    store.delete(project).await.unwrap();
}
