//! The promises about streams between two stores.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{Error, SendHeader, SendOptions, Snapshot},
    stream::BoxRead,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

use super::{
    Harness, Host,
    promises::{name, project},
};

/// How many places each kind of damage is tried at.
const PLACES: usize = 12;

/// A whole stream, in memory.
async fn collect(
    h: &dyn Harness,
    host: Host,
    project: ProjectId,
    n: &str,
    base: Option<&str>,
) -> (SendHeader, Vec<u8>) {
    let base = base.map(name);
    let mut sent = h.store(host).send(project, &name(n), &SendOptions::since(base.as_ref())).await.unwrap();
    let mut bytes = Vec::new();
    sent.reader.read_to_end(&mut bytes).await.expect("the sender succeeds");
    assert!(sent.header.extra.len() <= 4096, "what travels beside the stream is at most 4 KiB");
    (sent.header, bytes)
}

/// Gives a few bytes at a time, and then ends, fails, or waits for ever.
struct Trickle {
    bytes: Vec<u8>,
    at: usize,
    step: usize,
    end: End,
}

enum End {
    Well,
    Fails,
    Never,
}

impl AsyncRead for Trickle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.step.min(self.bytes.len() - self.at).min(buf.remaining());
        if length == 0 {
            return match self.end {
                End::Well => Poll::Ready(Ok(())),
                End::Fails => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                End::Never => Poll::Pending,
            };
        }
        let at = self.at;
        buf.put_slice(&self.bytes[at..at + length]);
        self.at += length;
        Poll::Ready(Ok(()))
    }
}

fn stream(bytes: &[u8]) -> BoxRead {
    Box::pin(io::Cursor::new(bytes.to_vec()))
}

async fn names(h: &dyn Harness, host: Host, project: ProjectId) -> Vec<SnapshotName> {
    h.store(host).snapshots(project).await.unwrap().into_iter().map(|snapshot| snapshot.name).collect()
}

async fn pass(h: &dyn Harness, from: Host, project: ProjectId, n: &str, base: Option<&str>) -> Snapshot {
    let base = base.map(name);
    let sent = h.store(from).send(project, &name(n), &SendOptions::since(base.as_ref())).await.unwrap();
    h.store(from.other()).receive(&sent.header, sent.reader).await.unwrap()
}

/// A project with one snapshot, `one`, on the first host.
async fn prepared(h: &dyn Harness) -> (ProjectId, Snapshot) {
    let project = project(h).await;
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    h.write(Host::First, project, "home/deep/er/b", &[7; 100_000]).await.unwrap();
    let one = h.store(Host::First).snapshot(project, &name("one")).await.unwrap();
    (project, one)
}

async fn clean(h: &dyn Harness, project: ProjectId) {
    for host in [Host::First, Host::Second] {
        h.store(host).delete(project).await.unwrap();
    }
}

pub(super) async fn whole(h: &dyn Harness) {
    let (project, one) = prepared(h).await;
    let store = h.store(Host::Second);
    assert!(
        matches!(
            h.store(Host::First).send(project, &name("none"), &SendOptions::whole()).await,
            Err(Error::NoSnapshot { name: missing, .. }) if missing == name("none")
        ),
        "what is not there cannot be sent"
    );
    let (header, bytes) = collect(h, Host::First, project, "one", None).await;
    assert_eq!(header.backend, store.capabilities().backend);
    assert_eq!((header.project, &header.name, header.origin), (project, &one.name, one.origin));
    assert_eq!(header.base, None);

    let step = 97;
    let trickle = Trickle { bytes: bytes.clone(), at: 0, step, end: End::Well };
    let got = store.receive(&header, Box::pin(trickle)).await.expect("a stream may come in small pieces");
    assert_eq!((got.project, &got.name, got.origin), (project, &one.name, one.origin), "it keeps its origin");
    assert_eq!(
        h.frozen(Host::Second, project, &name("one")).await.unwrap(),
        h.frozen(Host::First, project, &name("one")).await.unwrap(),
        "what was received is what was sent"
    );
    assert_eq!(store.snapshots(project).await.unwrap().as_slice(), std::slice::from_ref(&got));
    assert!(matches!(store.volume(project).await, Err(Error::NotFound { .. })), "nothing is live yet");
    let again = Trickle { bytes: Vec::new(), at: 0, step, end: End::Fails };
    assert_eq!(
        store.receive(&header, Box::pin(again)).await.expect("what is here is not read again"),
        got,
        "a repeated receive gives the same answer"
    );

    let volume = store.restore(project, &name("one"), &name("former")).await.unwrap();
    assert_eq!(
        h.live(Host::Second, project).await.unwrap(),
        h.frozen(Host::First, project, &name("one")).await.unwrap(),
        "a received snapshot comes to life"
    );
    h.write(Host::Second, project, "home/a", b"2").await.unwrap();
    assert_eq!(
        store.restore(project, &name("one"), &name("former")).await.unwrap(),
        volume,
        "same answer again"
    );
    assert_eq!(names(h, Host::Second, project).await, [name("one")], "nothing was kept");
    assert_eq!(h.frozen(Host::Second, project, &name("one")).await.unwrap()["home/a"], b"1");
    clean(h, project).await;
}

pub(super) async fn deltas(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let noise: Vec<u8> = (0..200_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    h.write(Host::First, project, "home/big", &noise).await.unwrap();
    h.store(Host::First).snapshot(project, &name("two")).await.unwrap();
    h.write(Host::First, project, "home/a", b"changed").await.unwrap();
    h.write(Host::First, project, "home/new", b"new").await.unwrap();
    h.remove(Host::First, project, "home/deep/er/b").await.unwrap();
    let three = h.store(Host::First).snapshot(project, &name("three")).await.unwrap();

    pass(h, Host::First, project, "two", None).await;
    let (full, delta) = (
        collect(h, Host::First, project, "three", None).await,
        collect(h, Host::First, project, "three", Some("two")).await,
    );
    assert_eq!(delta.0.base.as_ref().map(|(base, _)| base), Some(&name("two")), "the header names the base");
    if h.store(Host::First).capabilities().deltas {
        assert!(delta.1.len() * 2 < full.1.len(), "a delta is smaller than a full stream");
    }
    let got = h.store(Host::Second).receive(&delta.0, stream(&delta.1)).await.unwrap();
    assert_eq!(got.origin, three.origin);
    let expected = h.frozen(Host::First, project, &name("three")).await.unwrap();
    assert_eq!(
        h.frozen(Host::Second, project, &name("three")).await.unwrap(),
        expected,
        "a delta gives the same"
    );
    assert_eq!(names(h, Host::Second, project).await, [name("two"), name("three")]);

    // Back again, as a delta to what came from there.
    let second = h.store(Host::Second);
    second.restore(project, &name("three"), &name("former")).await.unwrap();
    h.write(Host::Second, project, "home/there", b"written on the second host").await.unwrap();
    second.snapshot(project, &name("four")).await.unwrap();
    let back = collect(h, Host::Second, project, "four", Some("three")).await;
    h.store(Host::First).receive(&back.0, stream(&back.1)).await.expect("the way back is a delta too");
    assert_eq!(
        h.frozen(Host::First, project, &name("four")).await.unwrap(),
        h.frozen(Host::Second, project, &name("four")).await.unwrap()
    );
    clean(h, project).await;
}

pub(super) async fn refused(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let (first, second) = (h.store(Host::First), h.store(Host::Second));
    h.write(Host::First, project, "home/a", b"2").await.unwrap();
    first.snapshot(project, &name("two")).await.unwrap();
    assert!(
        matches!(
            first.send(project, &name("two"), &SendOptions::since(Some(&name("none")))).await,
            Err(Error::NoSnapshot { name: missing, .. }) if missing == name("none")
        ),
        "the base must be there"
    );
    let (header, bytes) = collect(h, Host::First, project, "two", Some("one")).await;
    assert!(
        matches!(
            second.receive(&header, stream(&bytes)).await,
            Err(Error::NoSnapshot { name: missing, .. }) if missing == name("one")
        ),
        "a delta needs its base"
    );
    assert!(names(h, Host::Second, project).await.is_empty(), "refused: nothing is left");
    assert!(matches!(second.usage(project).await, Err(Error::NotFound { .. })), "refused: nothing is known");

    let (whole, whole_bytes) = collect(h, Host::First, project, "one", None).await;
    let foreign = SendHeader { backend: "another".to_owned(), ..whole.clone() };
    assert!(
        matches!(second.receive(&foreign, stream(&whole_bytes)).await, Err(Error::BadStream { .. })),
        "streams only pass between equal backends"
    );
    let mislabelled = SendHeader { origin: VolumeUuid::random(), ..whole.clone() };
    assert!(
        matches!(second.receive(&mislabelled, stream(&whole_bytes)).await, Err(Error::BadStream { .. })),
        "a stream that is not the announced one is refused"
    );
    assert!(names(h, Host::Second, project).await.is_empty(), "refused: nothing is left");

    // A snapshot of the same name that is another.
    pass(h, Host::First, project, "one", None).await;
    second.restore(project, &name("one"), &name("former")).await.unwrap();
    let own = second.snapshot(project, &name("two")).await.unwrap();
    assert!(
        matches!(second.receive(&header, stream(&bytes)).await, Err(Error::AlreadyExists { .. })),
        "another snapshot of that name is not replaced"
    );
    assert!(second.snapshots(project).await.unwrap().contains(&own));
    // A base of the same name that is another.
    second.delete_snapshot(project, &name("two")).await.unwrap();
    second.delete_snapshot(project, &name("one")).await.unwrap();
    second.snapshot(project, &name("one")).await.unwrap();
    assert!(
        matches!(second.receive(&header, stream(&bytes)).await, Err(Error::BadStream { .. })),
        "a base of the same name that is another is refused"
    );
    assert_eq!(names(h, Host::Second, project).await, [name("one")]);
    clean(h, project).await;
}

pub(super) async fn broken(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let second = h.store(Host::Second);
    let (header, bytes) = collect(h, Host::First, project, "one", None).await;
    let last = bytes.len() - 1;
    let places = (0..PLACES).map(|i| i * last / (PLACES - 1));
    for at in places {
        let cut = second.receive(&header, stream(&bytes[..at])).await;
        assert!(cut.is_err(), "a stream cut at byte {at} is refused");
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        let got = second.receive(&header, stream(&flipped)).await;
        assert!(got.is_err(), "a stream with a flipped bit in byte {at} is refused");
        assert!(names(h, Host::Second, project).await.is_empty(), "a broken stream leaves nothing");
    }
    for at in [last / 2, bytes.len()] {
        let trickle = Trickle { bytes: bytes[..at].to_vec(), at: 0, step: 4096, end: End::Fails };
        let got = second.receive(&header, Box::pin(trickle)).await;
        assert!(got.is_err(), "a failure of the sender after byte {at} is heard");
    }
    let third = bytes.len() / 3;
    let mut reordered = bytes.clone();
    reordered[..third * 2].rotate_left(third);
    let got = second.receive(&header, stream(&reordered)).await;
    assert!(got.is_err(), "a stream in another order is refused");
    let more = [bytes.as_slice(), b"x"].concat();
    assert!(second.receive(&header, stream(&more)).await.is_err(), "nothing may follow the end");
    assert!(names(h, Host::Second, project).await.is_empty(), "a broken stream leaves nothing");
    assert!(second.list().await.unwrap().iter().all(|volume| volume.project != project));
    second.receive(&header, stream(&bytes)).await.expect("after all that, the whole stream is taken");
    clean(h, project).await;
}

pub(super) async fn cancelled(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let second = h.store(Host::Second);
    let (header, bytes) = collect(h, Host::First, project, "one", None).await;
    let endless = Trickle { bytes: bytes[..bytes.len() / 2].to_vec(), at: 0, step: 4096, end: End::Never };
    let dropped =
        tokio::time::timeout(Duration::from_millis(200), second.receive(&header, Box::pin(endless))).await;
    assert!(dropped.is_err(), "a stream that does not end is not received");
    assert!(names(h, Host::Second, project).await.is_empty(), "a dropped receive leaves nothing");
    let sent = h.store(Host::First).send(project, &name("one"), &SendOptions::whole()).await.unwrap();
    drop(sent);
    second.receive(&header, stream(&bytes)).await.expect("a dropped receive is in nobody's way");
    assert_eq!(names(h, Host::Second, project).await, [name("one")]);
    clean(h, project).await;
}

pub(super) async fn chain(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let (first, second) = (h.store(Host::First), h.store(Host::Second));
    pass(h, Host::First, project, "one", None).await;
    let mut before = "one".to_owned();
    for number in 0..5_u8 {
        let n = format!("n{number}");
        h.write(Host::First, project, &format!("home/{}", number % 3), &vec![number; 5000]).await.unwrap();
        h.write(Host::First, project, "home/deep/er/b", &vec![number; 70_000 - usize::from(number)])
            .await
            .unwrap();
        if number == 3 {
            h.remove(Host::First, project, "home/a").await.unwrap();
        }
        first.snapshot(project, &name(&n)).await.unwrap();
        pass(h, Host::First, project, &n, Some(&before)).await;
        assert_eq!(
            h.frozen(Host::Second, project, &name(&n)).await.unwrap(),
            h.frozen(Host::First, project, &name(&n)).await.unwrap(),
            "link {number} of the chain"
        );
        before = n;
    }
    second.delete(project).await.unwrap();
    pass(h, Host::First, project, &before, None).await;
    assert_eq!(
        h.frozen(Host::Second, project, &name(&before)).await.unwrap(),
        h.frozen(Host::First, project, &name(&before)).await.unwrap(),
        "the whole gives the same"
    );
    clean(h, project).await;
}

pub(super) async fn at_once(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let (other, _) = prepared(h).await;
    h.write(Host::First, other, "home/a", b"the other's").await.unwrap();
    h.store(Host::First).snapshot(other, &name("two")).await.unwrap();
    let (one, bytes) = collect(h, Host::First, project, "one", None).await;
    let (two, others) = collect(h, Host::First, other, "two", None).await;
    let store = h.store(Host::Second);
    let trickle = |bytes: &[u8]| -> BoxRead {
        Box::pin(Trickle { bytes: bytes.to_vec(), at: 0, step: 1000, end: End::Well })
    };
    let all = async {
        tokio::join!(
            store.receive(&one, trickle(&bytes)),
            store.receive(&two, trickle(&others)),
            store.receive(&one, trickle(&bytes)),
        )
    };
    let (a, b, c) = tokio::time::timeout(super::promises::LIMIT, all).await.expect("they end");
    let (a, b, c) = (a.expect("received"), b.expect("received"), c.expect("received twice"));
    assert_eq!((a.origin, b.origin), (one.origin, two.origin));
    assert_eq!(a, c, "received twice at once, it is there once");
    for (project, n) in [(project, "one"), (other, "two")] {
        assert_eq!(names(h, Host::Second, project).await, [name(n)]);
        assert_eq!(
            h.frozen(Host::Second, project, &name(n)).await.unwrap(),
            h.frozen(Host::First, project, &name(n)).await.unwrap(),
            "they do not mix"
        );
    }
    clean(h, project).await;
    clean(h, other).await;
}

pub(super) async fn repeatable(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    h.write(Host::First, project, "home/a", b"2").await.unwrap();
    h.store(Host::First).snapshot(project, &name("two")).await.unwrap();
    for base in [None, Some("one")] {
        let first = collect(h, Host::First, project, "two", base).await;
        // Other work of the store comes between.
        h.write(Host::First, project, "home/a", b"3").await.unwrap();
        h.store(Host::First).snapshot(project, &name("three")).await.unwrap();
        let second = collect(h, Host::First, project, "two", base).await;
        assert!(first.1 == second.1, "sent again, base {base:?}, it is another stream");
        assert_eq!(first.0, second.0);
        h.store(Host::First).delete_snapshot(project, &name("three")).await.unwrap();
    }
    clean(h, project).await;
}

pub(super) async fn held(h: &dyn Harness) {
    let (project, _) = prepared(h).await;
    let store = h.store(Host::First);
    h.write(Host::First, project, "home/more", &vec![5; 3 << 20]).await.unwrap();
    store.snapshot(project, &name("two")).await.unwrap();
    let mut sent = store.send(project, &name("two"), &SendOptions::since(Some(&name("one")))).await.unwrap();
    let mut some = [0; 100];
    sent.reader.read_exact(&mut some).await.unwrap();
    for n in ["one", "two"] {
        let got = store.delete_snapshot(project, &name(n)).await;
        assert!(matches!(got, Err(Error::InUse { .. })), "{n} is being sent from: {got:?}");
    }
    drop(sent);
    // It may take a moment until the sender has physically stopped.
    let deleted = async {
        for n in ["one", "two"] {
            while store.delete_snapshot(project, &name(n)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    tokio::time::timeout(super::promises::LIMIT, deleted)
        .await
        .expect("a stream that is dropped holds nothing");
    clean(h, project).await;
}
