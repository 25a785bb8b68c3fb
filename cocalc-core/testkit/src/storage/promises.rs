//! The promises about one store.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{CloneOptions, CopyOptions, Error, Place, SendOptions, VolumeOptions},
};
use futures_util::future::join_all;

use super::{Harness, Host, Tree};

/// How long calls may take that wait for each other, or space to come back:
/// far longer than they do, so that only those that hang are caught.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

pub(super) fn tree<const N: usize>(files: [(&str, &[u8]); N]) -> Tree {
    files.into_iter().map(|(path, content)| (path.to_owned(), content.to_vec())).collect()
}

/// A new project with a volume on the first host.
pub(super) async fn project(h: &dyn Harness) -> ProjectId {
    let project = ProjectId::random();
    h.store(Host::First).create(project, &VolumeOptions::default()).await.unwrap();
    project
}

pub(super) async fn volumes(h: &dyn Harness) {
    let store = h.store(Host::First);
    let options = VolumeOptions::default();
    let project = ProjectId::random();
    assert!(
        matches!(store.volume(project).await, Err(Error::NotFound { .. })),
        "volume of an unknown project"
    );
    assert!(matches!(store.usage(project).await, Err(Error::NotFound { .. })), "usage of an unknown project");
    assert!(store.snapshots(project).await.unwrap().is_empty(), "an unknown project has no snapshots");
    store.delete(project).await.expect("deleting what is not there is harmless");

    let made = store.create(project, &options).await.unwrap();
    assert_eq!(made.project, project);
    assert_eq!(h.live(Host::First, project).await.unwrap(), Tree::new(), "a new volume is empty");
    assert_eq!(store.volume(project).await.unwrap(), made, "volume tells what create told");
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    assert!(
        matches!(store.create(project, &options).await, Err(Error::AlreadyExists { .. })),
        "create twice says AlreadyExists"
    );
    assert_eq!(
        h.live(Host::First, project).await.unwrap(),
        tree([("home/a", b"1")]),
        "create twice changes nothing"
    );

    let other = self::project(h).await;
    let listed: Vec<_> = store.list().await.unwrap().into_iter().map(|volume| volume.project).collect();
    assert!(listed.is_sorted(), "the list is ordered by project");
    assert!(listed.contains(&project) && listed.contains(&other), "the list holds what was created");
    assert!(
        h.store(Host::Second).list().await.unwrap().iter().all(|v| v.project != project),
        "hosts are separate"
    );

    store.snapshot(project, &name("s")).await.unwrap();
    for _ in 0..2 {
        store.delete(project).await.expect("delete can be repeated");
        assert!(
            matches!(store.volume(project).await, Err(Error::NotFound { .. })),
            "deleted volumes are gone"
        );
        assert!(store.snapshots(project).await.unwrap().is_empty(), "delete takes the snapshots too");
        assert!(
            store.list().await.unwrap().iter().all(|v| v.project != project),
            "deleted volumes are not listed"
        );
    }
    let again = store.create(project, &options).await.unwrap();
    assert_ne!(again.uuid, made.uuid, "a volume created again has another uuid");
    assert_eq!(h.live(Host::First, project).await.unwrap(), Tree::new(), "nothing comes back");
    store.delete(project).await.unwrap();
    store.delete(other).await.unwrap();
}

pub(super) async fn snapshots(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    let first = store.snapshot(project, &name("first")).await.unwrap();
    assert_eq!((first.project, &first.name), (project, &name("first")));
    assert_eq!(first.origin, first.uuid, "a snapshot taken here has its own origin");

    h.write(Host::First, project, "home/a", b"2").await.unwrap();
    h.write(Host::First, project, "home/b", b"3").await.unwrap();
    let frozen = tree([("home/a", b"1")]);
    assert_eq!(
        h.frozen(Host::First, project, &name("first")).await.unwrap(),
        frozen,
        "later writes don't reach it"
    );
    assert_eq!(
        store.snapshot(project, &name("first")).await.unwrap(),
        first,
        "a snapshot that has this name is returned unchanged"
    );
    assert_eq!(h.frozen(Host::First, project, &name("first")).await.unwrap(), frozen, "and not taken again");

    // Names that sort otherwise than they were taken.
    let second = store.snapshot(project, &name("a-second")).await.unwrap();
    let third = store.snapshot(project, &name("Third")).await.unwrap();
    assert_ne!(second.origin, first.origin, "each snapshot has its own origin");
    assert_eq!(
        store.snapshots(project).await.unwrap(),
        [first.clone(), second.clone(), third.clone()],
        "the list is oldest first, and tells what snapshot told"
    );
    h.remove(Host::First, project, "home/b").await.unwrap();
    for _ in 0..2 {
        store.delete_snapshot(project, &name("a-second")).await.expect("delete_snapshot can be repeated");
        assert_eq!(store.snapshots(project).await.unwrap(), [first.clone(), third.clone()]);
    }
    assert_eq!(
        h.live(Host::First, project).await.unwrap(),
        tree([("home/a", b"2")]),
        "the live volume is untouched"
    );
    assert_eq!(
        h.frozen(Host::First, project, &name("first")).await.unwrap(),
        frozen,
        "and so are other snapshots"
    );
    let unknown = ProjectId::random();
    assert!(
        matches!(store.snapshot(unknown, &name("s")).await, Err(Error::NotFound { .. })),
        "nothing to freeze"
    );
    store.delete_snapshot(unknown, &name("s")).await.expect("deleting what is not there is harmless");
    store.delete(project).await.unwrap();
}

pub(super) async fn restores(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    let (s, former) = (name("s"), name("former"));
    assert!(
        matches!(store.restore(project, &s, &former).await, Err(Error::NoSnapshot { .. })),
        "what is not there cannot be restored"
    );
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    store.snapshot(project, &s).await.unwrap();
    h.write(Host::First, project, "home/a", b"2").await.unwrap();
    let before = store.volume(project).await.unwrap();

    let restored = store.restore(project, &s, &former).await.unwrap();
    assert_ne!(restored.uuid, before.uuid, "a restored volume is another");
    assert_eq!(
        h.live(Host::First, project).await.unwrap(),
        tree([("home/a", b"1")]),
        "restore brings it back"
    );
    assert_eq!(
        h.frozen(Host::First, project, &former).await.unwrap(),
        tree([("home/a", b"2")]),
        "the last state is kept as former"
    );
    h.write(Host::First, project, "home/c", b"3").await.unwrap();
    assert_eq!(h.frozen(Host::First, project, &s).await.unwrap(), tree([("home/a", b"1")]), "it is a copy");
    assert_eq!(
        store.restore(project, &s, &former).await.unwrap(),
        restored,
        "a repeated restore gives the same answer"
    );
    assert!(h.live(Host::First, project).await.unwrap().contains_key("home/c"), "and changes nothing");
    assert!(
        matches!(store.restore(project, &former, &s).await, Err(Error::AlreadyExists { .. })),
        "a snapshot is never overwritten by what was live"
    );
    assert_eq!(h.frozen(Host::First, project, &s).await.unwrap(), tree([("home/a", b"1")]));
    assert!(
        h.live(Host::First, project).await.unwrap().contains_key("home/c"),
        "a refused restore changes nothing"
    );

    // The same snapshot again, under another name for what was live.
    store.restore(project, &s, &name("former-2")).await.unwrap();
    assert_eq!(h.live(Host::First, project).await.unwrap(), tree([("home/a", b"1")]));
    assert_eq!(
        h.frozen(Host::First, project, &name("former-2")).await.unwrap(),
        tree([("home/a", b"1"), ("home/c", b"3")])
    );
    let names: Vec<_> = store.snapshots(project).await.unwrap().into_iter().map(|s| s.name).collect();
    assert_eq!(names, [s, former, name("former-2")], "nothing else is listed");
    store.delete(project).await.unwrap();
}

pub(super) async fn set_aside(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    store.snapshot(project, &name("taken")).await.unwrap();
    assert!(
        matches!(store.set_aside(project, &name("taken")).await, Err(Error::AlreadyExists { .. })),
        "a snapshot is never overwritten"
    );
    assert_eq!(
        h.live(Host::First, project).await.unwrap(),
        tree([("home/a", b"1")]),
        "refused: nothing changes"
    );

    h.write(Host::First, project, "home/a", b"2").await.unwrap();
    let kept = store.set_aside(project, &name("kept")).await.unwrap();
    assert!(
        matches!(store.volume(project).await, Err(Error::NotFound { .. })),
        "it takes the live volume away"
    );
    assert!(store.list().await.unwrap().iter().all(|v| v.project != project), "and off the list");
    assert_eq!(h.frozen(Host::First, project, &name("kept")).await.unwrap(), tree([("home/a", b"2")]));
    assert_eq!(store.set_aside(project, &name("kept")).await.unwrap(), kept, "it can be repeated");
    assert!(
        matches!(store.set_aside(project, &name("other")).await, Err(Error::NotFound { .. })),
        "nothing to set aside"
    );
    // Without a live volume, nothing is kept.
    let volume = store.restore(project, &name("kept"), &name("former")).await.unwrap();
    assert_eq!(h.live(Host::First, project).await.unwrap(), tree([("home/a", b"2")]));
    assert_eq!(
        store.restore(project, &name("kept"), &name("former")).await.unwrap(),
        volume,
        "same answer again"
    );
    let names: Vec<_> = store.snapshots(project).await.unwrap().into_iter().map(|s| s.name).collect();
    assert_eq!(names, [name("taken"), name("kept")]);
    store.delete(project).await.unwrap();
}

pub(super) async fn clones(h: &dyn Harness) {
    let store = h.store(Host::First);
    let (source, target) = (project(h).await, ProjectId::random());
    assert!(
        matches!(
            store.clone_volume(source, &name("s"), target, &CloneOptions::default()).await,
            Err(Error::NoSnapshot { project, .. }) if project == source
        ),
        "there is no snapshot to clone"
    );
    assert!(matches!(store.volume(target).await, Err(Error::NotFound { .. })), "refused: nothing is made");
    h.write(Host::First, source, "home/a", b"1").await.unwrap();
    store.snapshot(source, &name("s")).await.unwrap();
    let made = store.clone_volume(source, &name("s"), target, &CloneOptions::default()).await.unwrap();
    assert_eq!(made.project, target);
    assert_eq!(h.live(Host::First, target).await.unwrap(), tree([("home/a", b"1")]), "a clone is equal");
    assert!(store.snapshots(target).await.unwrap().is_empty(), "a clone has no snapshots");
    assert!(
        matches!(
            store.clone_volume(source, &name("s"), target, &CloneOptions::default()).await,
            Err(Error::AlreadyExists { project, .. }) if project == target
        ),
        "clone twice says AlreadyExists"
    );
    h.write(Host::First, target, "home/a", b"2").await.unwrap();
    assert_eq!(
        h.live(Host::First, source).await.unwrap(),
        tree([("home/a", b"1")]),
        "clones are independent"
    );
    let shared = ProjectId::random();
    let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
    store.clone_volume(source, &name("s"), shared, &options).await.unwrap();
    assert_eq!(h.live(Host::First, shared).await.unwrap(), tree([("home/a", b"1")]), "one owner's too");
    h.write(Host::First, shared, "home/a", b"3").await.unwrap();
    store.delete(source).await.unwrap();
    assert_eq!(
        h.live(Host::First, target).await.unwrap(),
        tree([("home/a", b"2")]),
        "also of a deleted source"
    );
    assert_eq!(h.live(Host::First, shared).await.unwrap(), tree([("home/a", b"3")]));
    store.delete(target).await.unwrap();
    store.delete(shared).await.unwrap();
}

pub(super) async fn isolation(h: &dyn Harness) {
    let store = h.store(Host::First);
    let (a, b) = (project(h).await, project(h).await);
    h.write(Host::First, a, "home/f", b"a").await.unwrap();
    h.write(Host::First, b, "home/f", b"b").await.unwrap();
    store.snapshot(a, &name("s")).await.unwrap();
    assert!(store.snapshots(b).await.unwrap().is_empty(), "snapshots belong to one project");
    assert!(
        matches!(store.restore(b, &name("s"), &name("former")).await, Err(Error::NoSnapshot { .. })),
        "another project's snapshot cannot be restored"
    );
    assert!(
        matches!(store.send(b, &name("s"), &SendOptions::whole()).await, Err(Error::NoSnapshot { .. })),
        "another project's snapshot cannot be sent"
    );
    store.snapshot(b, &name("s")).await.unwrap();
    store.delete(a).await.unwrap();
    assert_eq!(h.live(Host::First, b).await.unwrap(), tree([("home/f", b"b")]));
    assert_eq!(h.frozen(Host::First, b, &name("s")).await.unwrap(), tree([("home/f", b"b")]));
    store.delete(b).await.unwrap();
}

pub(super) async fn limits(h: &dyn Harness) {
    const LIMIT: u64 = 8 << 20;
    let store = h.store(Host::First);
    let project = project(h).await;
    let usage = store.usage(project).await.unwrap();
    assert_eq!(usage.limit_bytes, None, "no limit was set");
    if !store.capabilities().quotas {
        assert!(
            matches!(store.set_limit(project, Some(LIMIT)).await, Err(Error::Unsupported { .. })),
            "without quotas, set_limit says so"
        );
        store.delete(project).await.unwrap();
        return;
    }
    let unknown = ProjectId::random();
    assert!(
        matches!(store.set_limit(unknown, None).await, Err(Error::NotFound { .. })),
        "of an unknown project"
    );
    store.set_limit(project, Some(LIMIT)).await.unwrap();
    assert_eq!(store.usage(project).await.unwrap().limit_bytes, Some(LIMIT), "usage tells the limit");
    let chunk = vec![7; 1 << 20];
    for number in 0..6 {
        h.write(Host::First, project, &format!("home/{number}"), &chunk)
            .await
            .expect("below the limit it never fails");
    }
    // What a snapshot holds is charged: rewriting does not free it.
    store.snapshot(project, &name("s")).await.unwrap();
    let others = vec![8; 1 << 20];
    let mut refused = false;
    for number in 0..6 {
        refused |= h.write(Host::First, project, &format!("home/{number}"), &others).await.is_err();
    }
    assert!(refused, "what a snapshot holds is charged: six and six are more than eight");
    let charged = store.usage(project).await.unwrap().charged_bytes;
    assert!(charged > 6 << 20, "and usage tells it: {charged}");
    for number in 6..16 {
        refused |= h.write(Host::First, project, &format!("home/{number}"), &chunk).await.is_err();
    }
    assert!(refused, "past the limit, writing fails");
    store.snapshot(project, &name("full")).await.expect("a full project can be frozen");
    let other = self::project(h).await;
    h.write(Host::First, other, "home/f", &chunk).await.expect("another project's limit does not matter");
    store.set_limit(project, None).await.unwrap();
    assert_eq!(store.usage(project).await.unwrap().limit_bytes, None, "the limit is lifted");
    h.write(Host::First, project, "home/more", &chunk).await.expect("without a limit it never fails");

    let limited = ProjectId::random();
    store.create(limited, &VolumeOptions { limit_bytes: Some(LIMIT) }).await.unwrap();
    assert_eq!(store.usage(limited).await.unwrap().limit_bytes, Some(LIMIT), "create applies the limit");
    for project in [project, other, limited] {
        store.delete(project).await.unwrap();
    }
}

pub(super) async fn deleted_when_full(h: &dyn Harness) {
    const LIMIT_BYTES: u64 = 8 << 20;
    let store = h.store(Host::First);
    let project = project(h).await;
    store.set_limit(project, Some(LIMIT_BYTES)).await.unwrap();
    let chunk = vec![9; 1 << 20];
    for number in 0..16 {
        if h.write(Host::First, project, &format!("home/{number}"), &chunk).await.is_err() {
            break;
        }
    }
    store.snapshot(project, &name("one")).await.unwrap();
    store.snapshot(project, &name("two")).await.unwrap();
    let charged = store.usage(project).await.unwrap().charged_bytes;
    assert!(charged > LIMIT_BYTES / 2, "what was written is charged, not {charged}");
    assert!(charged <= LIMIT_BYTES + (1 << 20), "what is charged stays near the limit, not {charged}");
    store.delete_snapshot(project, &name("one")).await.expect("a full project's snapshot can be deleted");
    store.delete(project).await.expect("a full project can be deleted");
    assert!(matches!(store.volume(project).await, Err(Error::NotFound { .. })));
    store.create(project, &VolumeOptions { limit_bytes: Some(LIMIT_BYTES) }).await.unwrap();
    for number in 0..6 {
        let written = h.write(Host::First, project, &format!("home/{number}"), &chunk).await;
        written.expect("what was deleted is not charged to another volume of its name");
    }
    store.delete(project).await.unwrap();
}

pub(super) async fn holds(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    assert!(
        matches!(store.hold(project, &name("s")).await, Err(Error::NoSnapshot { .. })),
        "what is not there cannot be held"
    );
    for n in ["s", "other"] {
        store.snapshot(project, &name(n)).await.unwrap();
    }
    let (one, two) =
        (store.hold(project, &name("s")).await.unwrap(), store.hold(project, &name("s")).await.unwrap());
    let in_use = |got| matches!(got, Err(Error::InUse { name: held, .. }) if held == name("s"));
    assert!(in_use(store.delete_snapshot(project, &name("s")).await), "a held snapshot stays");
    store.delete_snapshot(project, &name("other")).await.expect("others go");
    assert!(in_use(store.delete(project).await), "a project with a held snapshot stays");
    assert!(store.volume(project).await.is_ok(), "refused: nothing is deleted");
    drop(one);
    assert!(in_use(store.delete_snapshot(project, &name("s")).await), "until the last hold is dropped");
    assert_eq!(store.snapshots(project).await.unwrap().len(), 1);
    drop(two);
    store.delete_snapshot(project, &name("s")).await.expect("then it can be deleted");
    assert!(store.snapshots(project).await.unwrap().is_empty());
    store.delete(project).await.unwrap();
}

pub(super) async fn changes_noticed(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    assert!(
        matches!(store.changed_since(project, &name("s")).await, Err(Error::NoSnapshot { .. })),
        "since a snapshot that is not there"
    );
    let noticed = async |project, n: &str, how: &str| {
        assert!(store.changed_since(project, &name(n)).await.unwrap(), "not noticed: {how}");
    };
    store.snapshot(project, &name("empty")).await.unwrap();
    for round in 0..4 {
        let n = format!("s{round}");
        h.write(Host::First, project, "home/a", n.as_bytes()).await.unwrap();
        noticed(project, "empty", "a write").await;
        store.snapshot(project, &name(&n)).await.unwrap();
        h.write(Host::First, project, "home/a", format!("t{round}").as_bytes()).await.unwrap();
        noticed(project, &n, "a write of the same length, at once").await;
    }
    h.remove(Host::First, project, "home/a").await.unwrap();
    noticed(project, "s3", "a removal").await;
    store.restore(project, &name("s0"), &name("former")).await.unwrap();
    noticed(project, "s3", "a restore of another snapshot").await;
    h.write(Host::First, project, "home/a", b"after").await.unwrap();
    noticed(project, "s0", "a write after a restore").await;
    noticed(project, "former", "a restore, of what was live before").await;
    let clone = ProjectId::random();
    let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
    store.clone_volume(project, &name("s0"), clone, &options).await.unwrap();
    store.snapshot(clone, &name("c")).await.unwrap();
    h.write(Host::First, clone, "home/a", b"in the clone").await.unwrap();
    noticed(clone, "c", "a write in a clone").await;
    let unknown = ProjectId::random();
    assert!(store.changed_since(unknown, &name("s")).await.is_err(), "of an unknown project");
    store.delete(project).await.unwrap();
    store.delete(clone).await.unwrap();
}

pub(super) async fn no_change(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    for n in ["one", "two"] {
        h.write(Host::First, project, "home/a", n.as_bytes()).await.unwrap();
        store.snapshot(project, &name(n)).await.unwrap();
        for _ in 0..2 {
            assert!(!store.changed_since(project, &name(n)).await.unwrap(), "nothing was written since {n}");
        }
    }
    let other = self::project(h).await;
    h.write(Host::First, other, "home/a", b"other").await.unwrap();
    store.snapshot(other, &name("s")).await.unwrap();
    assert!(
        !store.changed_since(project, &name("two")).await.unwrap(),
        "another project's writes don't count"
    );
    store.delete(project).await.unwrap();
    store.delete(other).await.unwrap();
}

pub(super) async fn retried(h: &dyn Harness) {
    let (first, second) = (h.store(Host::First), h.store(Host::Second));
    let can = first.capabilities();
    let (project, other, clone) = (project(h).await, project(h).await, ProjectId::random());
    let volume = first.volume(project).await.unwrap();
    assert!(
        matches!(first.create(project, &VolumeOptions::default()).await, Err(Error::AlreadyExists { .. })),
        "create says that it is there"
    );
    assert_eq!(first.volume(project).await.unwrap(), volume, "and changes nothing");
    h.write(Host::First, project, "home/d/a", b"1").await.unwrap();

    // At once.
    let s = first.snapshot(project, &name("s")).await.unwrap();
    assert_eq!(first.snapshot(project, &name("s")).await.unwrap(), s);
    drop((first.hold(project, &name("s")).await.unwrap(), first.hold(project, &name("s")).await.unwrap()));
    h.write(Host::First, project, "home/d/a", b"22").await.unwrap();
    for _ in 0..2 {
        assert!(first.changed_since(project, &name("s")).await.unwrap());
        if can.quotas {
            first.set_limit(project, Some(1 << 30)).await.unwrap();
            assert_eq!(first.usage(project).await.unwrap().limit_bytes, Some(1 << 30));
        }
    }
    let ask = async || first.diff(project, &name("s"), None, None, 10).await;
    if let Ok(changes) = ask().await {
        assert_eq!(ask().await.unwrap(), changes, "diff");
    }
    let ask = async || first.footprint(project, Some(&name("s"))).await;
    if let Ok(footprint) = ask().await {
        let again = ask().await.unwrap();
        assert_eq!((again.entries, again.total_bytes), (footprint.entries, footprint.total_bytes));
    }
    let place = |project, text: &str| Place::live(project, text.parse().unwrap());
    let (from, to) = (place(project, "home/d"), place(other, "home/e"));
    let copy =
        async |replace| first.copy(&from, &to, &CopyOptions { replace, ..CopyOptions::default() }).await;
    let copied = copy(true).await;
    if !matches!(copied, Err(Error::Unsupported { .. })) {
        let copied = copied.unwrap();
        assert_eq!(copy(true).await.unwrap(), copied, "a copy that replaces");
        assert!(matches!(copy(false).await, Err(Error::AlreadyExists { .. })), "one that does not");
        assert_eq!(h.live(Host::First, other).await.unwrap(), tree([("home/e/a", b"22")]));
    }
    let ask = async || first.clone_volume(project, &name("s"), clone, &CloneOptions::default()).await;
    let cloned = ask().await.unwrap();
    assert!(matches!(ask().await, Err(Error::AlreadyExists { .. })), "clone says that it is there");
    assert_eq!(first.volume(clone).await.unwrap(), cloned, "and changes nothing");

    // Later, when much has been done in between.
    let restored = first.restore(project, &name("s"), &name("former")).await.unwrap();
    h.write(Host::First, project, "home/later", b"3").await.unwrap();
    let t = first.snapshot(project, &name("t")).await.unwrap();
    let state = h.live(Host::First, project).await.unwrap();
    assert_eq!(first.restore(project, &name("s"), &name("former")).await.unwrap(), restored);
    assert_eq!(h.live(Host::First, project).await.unwrap(), state, "a repeated restore changes nothing");
    assert_eq!(first.snapshot(project, &name("s")).await.unwrap(), s);

    let mut sent = Vec::new();
    for _ in 0..2 {
        let stream = first.send(project, &name("t"), &SendOptions::whole()).await.unwrap();
        sent.push((stream.header.clone(), second.receive(&stream.header, stream.reader).await.unwrap()));
    }
    assert_eq!(sent[0], sent[1], "sent and received twice");
    second.restore(project, &name("t"), &name("former")).await.unwrap();
    h.write(Host::Second, project, "home/later", b"4").await.unwrap();
    let aside = second.set_aside(project, &name("aside")).await.unwrap();
    let nothing = Box::pin(std::io::Cursor::new(Vec::new()));
    let got = second.receive(&sent[0].0, nothing).await.expect("what is here is not read again");
    assert_eq!(got, sent[0].1, "received again, after it was restored and set aside");
    assert_eq!(second.set_aside(project, &name("aside")).await.unwrap(), aside, "set aside again");
    assert_eq!(h.frozen(Host::Second, project, &name("t")).await.unwrap(), state);

    for _ in 0..2 {
        // A stream that was read to its end holds nothing, or not for long.
        let gone = async {
            while first.delete_snapshot(project, &name("t")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, gone).await.expect("it can be deleted");
        assert!(!first.snapshots(project).await.unwrap().contains(&t));
    }
    for store in [&first, &second] {
        for project in [project, other, clone] {
            for _ in 0..2 {
                store.delete(project).await.expect("deleted twice");
            }
            assert!(matches!(store.volume(project).await, Err(Error::NotFound { .. })));
        }
    }
}

pub(super) async fn concurrent(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    h.write(Host::First, project, "home/a", b"1").await.unwrap();
    store.snapshot(project, &name("base")).await.unwrap();
    let same = name("same");
    let taken = join_all((0..6).map(|_| store.snapshot(project, &same)));
    let taken = tokio::time::timeout(LIMIT, taken).await.expect("they end");
    let taken: Vec<_> = taken.into_iter().map(|got| got.expect("each is answered")).collect();
    assert!(taken.windows(2).all(|pair| pair[0] == pair[1]), "one snapshot, told to all: {taken:?}");

    // Everything at once, and again; no answer but those that an order explains.
    for round in 0..3 {
        let (n, m) = (name(&format!("n{round}")), name(&format!("m{round}")));
        let former = name(&format!("f{round}"));
        let base = name("base");
        let all = async {
            tokio::join!(
                store.snapshot(project, &n),
                store.delete_snapshot(project, &n),
                store.snapshot(project, &m),
                store.restore(project, &base, &former),
                async {
                    match store.send(project, &base, &SendOptions::whole()).await {
                        Ok(mut sent) => {
                            let mut bytes = Vec::new();
                            tokio::io::AsyncReadExt::read_to_end(&mut sent.reader, &mut bytes)
                                .await
                                .map(|_| ())
                        }
                        Err(error) => Err(std::io::Error::other(error)),
                    }
                },
                store.snapshots(project),
                store.changed_since(project, &base),
            )
        };
        let (a, b, c, d, e, f, g) = tokio::time::timeout(LIMIT, all).await.expect("they end");
        a.expect("a snapshot is taken, before or after");
        if let Err(error) = b {
            assert!(matches!(error, Error::InUse { .. }), "{error}");
        }
        c.expect("a snapshot is taken, before or after");
        d.expect("a restore is done, before or after");
        e.expect("what is there all the time can be sent");
        assert!(
            f.unwrap().iter().any(|snapshot| snapshot.name == base),
            "what is there all the time is listed"
        );
        g.unwrap();
        let names: Vec<_> = store.snapshots(project).await.unwrap().into_iter().map(|s| s.name).collect();
        assert!(names.contains(&m) && names.contains(&former) && names.contains(&base), "{names:?}");
    }
    let made = join_all((0..4).map(|_| async {
        let fresh = ProjectId::random();
        let made =
            join_all((0..3).map(|_| async { store.create(fresh, &VolumeOptions::default()).await.is_ok() }))
                .await;
        store.delete(fresh).await.unwrap();
        made.into_iter().filter(|made| *made).count()
    }));
    assert_eq!(made.await, [1; 4], "created once, whoever asks at the same time");
    store.delete(project).await.unwrap();
}

pub(super) async fn listed_meanwhile(h: &dyn Harness) {
    let store = h.store(Host::First);
    let stays = [project(h).await, project(h).await];
    let changing = async {
        for _ in 0..8 {
            let comes = project(h).await;
            store.snapshot(comes, &name("s")).await.unwrap();
            store.restore(comes, &name("s"), &name("former")).await.unwrap();
            store.set_aside(comes, &name("aside")).await.unwrap();
            store.delete(comes).await.unwrap();
        }
    };
    let listing = async {
        for _ in 0..24 {
            let listed = store.list().await.expect("a listing works during changes");
            let projects: Vec<_> = listed.iter().map(|volume| volume.project).collect();
            assert!(projects.windows(2).all(|pair| pair[0] < pair[1]), "in order, each once: {projects:?}");
            assert!(stays.iter().all(|project| projects.contains(project)), "what stays is always listed");
            tokio::task::yield_now().await;
        }
    };
    // What is deleted, or gets another in its place, at the moment in which it is looked at.
    let (kept, base) = (stays[0], name("base"));
    store.snapshot(kept, &base).await.unwrap();
    let done = AtomicBool::new(false);
    let replacing = async {
        for round in 0..24 {
            let (goes, former) = (name(&format!("goes-{round}")), name(&format!("former-{round}")));
            store.snapshot(kept, &goes).await.unwrap();
            store.delete_snapshot(kept, &goes).await.unwrap();
            store.restore(kept, &base, &former).await.unwrap();
            store.delete_snapshot(kept, &former).await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
    };
    let looking = async {
        while !done.load(Ordering::Relaxed) {
            let (snapshots, volume, listed) =
                tokio::join!(store.snapshots(kept), store.volume(kept), store.list());
            let snapshots = snapshots.expect("a listing of snapshots works while some are deleted");
            assert!(snapshots.iter().any(|snapshot| snapshot.name == base), "what stays is always listed");
            volume.expect("a volume is there while it is restored");
            let listed = listed.expect("a listing works during restores");
            assert!(stays.iter().all(|stays| listed.iter().any(|volume| volume.project == *stays)));
        }
    };
    tokio::join!(async { tokio::join!(changing, listing) }, async { tokio::join!(replacing, looking) });
    for project in stays {
        store.delete(project).await.unwrap();
    }
}
