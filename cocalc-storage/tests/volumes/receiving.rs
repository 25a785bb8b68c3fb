//! `btrfs receive` killed, stopped and left alone in the middle of its work.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::ProjectId,
    storage::{Error, SendHeader, SendOptions, Snapshot, Storage, VolumeOptions},
};
use cocalc_storage::Btrfs;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::stores::{self, One, name};

const PATIENCE: Duration = Duration::from_secs(60);

/// A stream of some megabytes, addressed to a project that has something here
/// already.
struct Prepared {
    one: One,
    target: ProjectId,
    header: SendHeader,
    bytes: Vec<u8>,
}

async fn prepared() -> Prepared {
    let one = stores::one().await;
    let (source, target) = (ProjectId::random(), ProjectId::random());
    let live = one.store.create(source, &VolumeOptions::default()).await.unwrap().path.unwrap();
    for number in 0..200_u8 {
        fs::write(live.join(format!("home/{number}")), vec![number; 60_000]).unwrap();
    }
    one.store.snapshot(source, &name("one")).await.unwrap();
    let mut sent = one.store.send(source, &name("one"), &SendOptions::whole()).await.unwrap();
    let mut bytes = Vec::new();
    sent.reader.read_to_end(&mut bytes).await.unwrap();
    let header = SendHeader { project: target, ..sent.header };
    drop(sent.reader);
    let live = one.store.create(target, &VolumeOptions::default()).await.unwrap().path.unwrap();
    fs::write(live.join("home/own"), "own").unwrap();
    one.store.snapshot(target, &name("own")).await.unwrap();
    Prepared { one, target, header, bytes }
}

/// What the target has, and who else is there.
async fn state(store: &Btrfs, target: ProjectId) -> (Vec<Snapshot>, usize, u64, String) {
    let live = store.volume(target).await.unwrap().path.unwrap();
    (
        store.snapshots(target).await.unwrap(),
        store.list().await.unwrap().len(),
        fs::read_dir(live.join("home")).unwrap().count() as u64,
        fs::read_to_string(live.join("home/own")).unwrap(),
    )
}

fn staged(store: &Btrfs) -> Vec<std::path::PathBuf> {
    fs::read_dir(store.path().join("staging")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The process that receives below `root`, once it has begun to.
async fn receiver(store: &Btrfs, snapshot: &str) -> Pid {
    let begun = async {
        loop {
            if staged(store).iter().any(|place| place.join(snapshot).is_dir())
                && let Some(pid) = find(store.path())
            {
                return pid;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("btrfs receive begins")
}

fn find(root: &Path) -> Option<Pid> {
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let entry = entry.ok()?;
        let number: i32 = entry.file_name().to_str()?.parse().ok()?;
        let words = String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).ok()?).into_owned();
        let words: Vec<_> = words.split('\0').collect();
        let ours = words.first() == Some(&"btrfs")
            && words.get(1) == Some(&"receive")
            && words.iter().any(|word| Path::new(word).starts_with(root));
        if ours { Pid::from_raw(number) } else { None }
    })
}

/// Receives, and when `share` of the stream has come sends the child `signal`.
async fn received(store: &Btrfs, p: &Prepared, share: usize, signal: Signal) -> Result<Snapshot, Error> {
    let (reader, mut writer) = tokio::io::duplex(64 << 10);
    let (begin, rest) = p.bytes.split_at(p.bytes.len() / 100 * share);
    let feeding = async move {
        writer.write_all(begin).await.unwrap();
        kill_process(receiver(store, "one").await, signal).unwrap();
        // Nobody may take it any more.
        let _ = writer.write_all(rest).await;
    };
    let both = async { tokio::join!(store.receive(&p.header, Box::pin(reader)), feeding).0 };
    timeout(PATIENCE, both).await.expect("it ends")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_killed_is_told_and_leaves_nothing() {
    let p = prepared().await;
    let store = &p.one.store;
    let before = state(store, p.target).await;
    for share in [20, 60, 95] {
        let got = received(store, &p, share, Signal::KILL).await;
        let Err(error) = got else { panic!("{got:?}") };
        assert!(matches!(error, Error::BadStream { project, .. } if project == p.target), "{error:?}");
        let text = cocalc_core::chain(&error);
        assert!(text.contains("btrfs receive failed") && text.contains("signal"), "{text}");
        assert_eq!(staged(store), Vec::<std::path::PathBuf>::new(), "nothing is left in staging");
        assert_eq!(state(store, p.target).await, before, "nothing else has changed");
    }
    again(store, &p).await;
}

/// After whatever there was, the whole stream is taken.
async fn again(store: &Btrfs, p: &Prepared) {
    let stream = Box::pin(std::io::Cursor::new(p.bytes.clone()));
    let got = store.receive(&p.header, stream).await.expect("again, and it is received");
    assert_eq!(got.origin, p.header.origin);
    let path = store.snapshot_path(p.target, &name("one")).await.unwrap();
    assert_eq!(fs::read_dir(path.join("home")).unwrap().count(), 200);
    assert_eq!(fs::read(path.join("home/199")).unwrap(), vec![199; 60_000]);
    assert!(staged(store).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_stands_still_is_given_up_in_time() {
    const STALL: Duration = Duration::from_secs(2);
    let mut p = prepared().await;
    let path = p.one.volume.path().to_owned();
    // One process has it open at a time.
    let spare = stores::one().await;
    drop(std::mem::replace(&mut p.one.store, spare.store.clone()));
    let store = Btrfs::builder(path).stall_limit(STALL).open().await.unwrap();
    let before = state(&store, p.target).await;
    // With much to come, which nobody takes, and with nothing but its end.
    for share in [20, 100] {
        let begun = Instant::now();
        let got = received(&store, &p, share, Signal::STOP).await;
        assert!(matches!(got, Err(Error::BadStream { .. })), "{got:?}");
        assert!(begun.elapsed() >= STALL, "it was given the time that it has");
        assert!(staged(&store).is_empty(), "nothing is left in staging");
        assert!(find(store.path()).is_none(), "no process is left");
        assert_eq!(state(&store, p.target).await, before, "nothing else has changed");
    }
    again(&store, &p).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_stands_still_can_be_left_alone() {
    let p = prepared().await;
    let store = &p.one.store;
    let before = state(store, p.target).await;
    let (reader, mut writer) = tokio::io::duplex(64 << 10);
    let feeding = async {
        writer.write_all(&p.bytes[..p.bytes.len() / 2]).await.unwrap();
        kill_process(receiver(store, "one").await, Signal::STOP).unwrap();
    };
    tokio::select! {
        got = store.receive(&p.header, Box::pin(reader)) => panic!("{got:?}"),
        // Then nobody waits for it any more.
        () = feeding => {}
    }
    let gone = async {
        while !staged(store).is_empty() || find(store.path()).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the child is ended and staging emptied");
    assert_eq!(state(store, p.target).await, before, "nothing else has changed");
    again(store, &p).await;
}
