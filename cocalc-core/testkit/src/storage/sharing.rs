//! The promises about what volumes have in common: comparing, copying and
//! counting.

use cocalc_core::{
    ids::{ProjectId, TreePath},
    storage::{Change, ChangeKind, CloneOptions, CopyOptions, Error, NodeKind, Place},
};

use super::{
    Harness, Host,
    promises::{name, project, tree},
};

pub(super) const MIB: usize = 1 << 20;

fn path(text: &str) -> TreePath {
    text.parse().unwrap()
}

/// Bytes that nothing compresses or stores inline.
pub(super) fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

fn unsupported<T>(got: &Result<T, Error>) -> bool {
    matches!(got, Err(Error::Unsupported { .. }))
}

pub(super) async fn footprint(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    h.write(Host::First, project, "home/a", &noise(1, 2 * MIB)).await.unwrap();
    let alone = store.footprint(project, None).await.unwrap();
    assert!(alone.total_bytes >= 2 * MIB as u64, "{alone:?}");
    assert!(alone.exclusive_bytes >= 2 * MIB as u64, "nothing else has them yet: {alone:?}");
    store.snapshot(project, &name("s")).await.unwrap();
    for snapshot in [None, Some(name("s"))] {
        let shared = store.footprint(project, snapshot.as_ref()).await.unwrap();
        assert!(shared.exclusive_bytes <= shared.total_bytes, "{shared:?}");
        assert!(shared.exclusive_bytes < MIB as u64, "a snapshot has them, too: {snapshot:?}, {shared:?}");
        assert!(shared.shared_bytes() >= 2 * MIB as u64 - (64 << 10), "{shared:?}");
    }
    h.write(Host::First, project, "home/b", &noise(2, 3 * MIB)).await.unwrap();
    let more = store.footprint(project, None).await.unwrap();
    assert!(more.total_bytes >= 5 * MIB as u64 && more.exclusive_bytes >= 3 * MIB as u64, "{more:?}");
    store.delete_snapshot(project, &name("s")).await.unwrap();
    // Whoever cleans up may take a while.
    let again = async {
        while store.footprint(project, None).await.unwrap().exclusive_bytes < 5 * MIB as u64 {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(super::promises::LIMIT, again)
        .await
        .expect("what nothing else has is exclusive again");
    store.delete(project).await.unwrap();
}

pub(super) async fn measured(h: &dyn Harness) {
    let store = h.store(Host::First);
    let project = project(h).await;
    let before = store.footprint(project, None).await;
    if unsupported(&before) {
        assert!(!store.capabilities().shares_bytes, "it shares bytes and cannot say how many");
        store.delete(project).await.unwrap();
        return;
    }
    let before = before.unwrap();
    for number in 0..10 {
        h.write(Host::First, project, &format!("home/{number}"), &noise(number, 100_000)).await.unwrap();
    }
    store.snapshot(project, &name("s")).await.unwrap();
    for snapshot in [None, Some(name("s"))] {
        let now = store.footprint(project, snapshot.as_ref()).await.unwrap();
        assert_eq!(now.entries - before.entries, 10, "{now:?}");
        assert!(now.total_bytes - before.total_bytes >= 1_000_000, "{now:?}");
        assert!(now.total_bytes - before.total_bytes < 2_000_000, "{now:?}");
        assert!(now.exclusive_bytes <= now.total_bytes, "{now:?}");
    }
    let missing = store.footprint(project, Some(&name("none"))).await;
    assert!(matches!(missing, Err(Error::NoSnapshot { .. })));
    assert!(matches!(store.footprint(ProjectId::random(), None).await, Err(Error::NotFound { .. })));
    store.delete(project).await.unwrap();
}

/// A project with snapshots `before` and `now`, and what lies between.
async fn edited(h: &dyn Harness) -> Option<(ProjectId, Vec<Change>)> {
    let store = h.store(Host::First);
    let project = project(h).await;
    for file in ["home/d/one", "home/d/two", "home/d.x/three", "home/gone/four", "home/gone/five", "home/six"]
    {
        h.write(Host::First, project, file, file.as_bytes()).await.unwrap();
    }
    store.snapshot(project, &name("before")).await.unwrap();
    if unsupported(&store.diff(project, &name("before"), None, None, 10).await) {
        store.delete(project).await.unwrap();
        return None;
    }
    let same = store.diff(project, &name("before"), None, None, 10).await.unwrap();
    assert_eq!((same.changes.len(), same.more), (0, false), "nothing has changed: {same:?}");
    h.write(Host::First, project, "home/d/two", b"home/d/TWO").await.unwrap();
    h.write(Host::First, project, "home/six", b"longer than before").await.unwrap();
    h.write(Host::First, project, "home/d.x/added", b"12345").await.unwrap();
    h.write(Host::First, project, "home/e/f/g", b"in new directories").await.unwrap();
    h.remove(Host::First, project, "home/d/one").await.unwrap();
    let change = |at, kind, bytes| Change { path: path(at), kind, node: NodeKind::File, bytes };
    let expected = vec![
        change("home/d/one", ChangeKind::Removed, 10),
        change("home/d/two", ChangeKind::Modified, 10),
        change("home/d.x/added", ChangeKind::Added, 5),
        Change { node: NodeKind::Directory, ..change("home/e", ChangeKind::Added, 0) },
        change("home/six", ChangeKind::Modified, 18),
    ];
    store.snapshot(project, &name("now")).await.unwrap();
    Some((project, expected))
}

pub(super) async fn diff(h: &dyn Harness) {
    let store = h.store(Host::First);
    let Some((project, expected)) = edited(h).await else { return };
    let (before, now) = (name("before"), name("now"));
    let forth = store.diff(project, &before, Some(&now), None, 100).await.unwrap();
    assert_eq!((forth.changes, forth.more), (expected.clone(), false), "between two snapshots");
    let live = store.diff(project, &before, None, None, 100).await.unwrap();
    assert_eq!(live.changes, expected, "and to what is live");
    let back = store.diff(project, &now, Some(&before), None, 100).await.unwrap();
    let kinds: Vec<_> = back.changes.iter().map(|change| change.kind).collect();
    use ChangeKind::{Added, Modified, Removed};
    assert_eq!(kinds, [Added, Modified, Removed, Removed, Modified], "the other way round");
    for (from, to) in [("none", Some("now")), ("now", Some("none")), ("none", None)] {
        let to = to.map(name);
        let got = store.diff(project, &name(from), to.as_ref(), None, 1).await;
        assert!(matches!(got, Err(Error::NoSnapshot { .. })), "{from} {to:?}");
    }
    store.delete(project).await.unwrap();
}

pub(super) async fn diff_pages(h: &dyn Harness) {
    let store = h.store(Host::First);
    let Some((project, expected)) = edited(h).await else { return };
    for page in 1..=expected.len() + 1 {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let got =
                store.diff(project, &name("before"), Some(&name("now")), after.as_ref(), page).await.unwrap();
            assert!(got.changes.len() <= page && (got.changes.len() == page || !got.more), "{got:?}");
            after = got.changes.last().map(|change| change.path.clone());
            seen.extend(got.changes);
            if !got.more {
                break;
            }
        }
        assert_eq!(seen, expected, "in pages of {page}");
    }
    store.delete(project).await.unwrap();
}

pub(super) async fn copies(h: &dyn Harness) {
    let store = h.store(Host::First);
    let (one, two) = (project(h).await, project(h).await);
    h.write(Host::First, one, "home/d/a", b"1").await.unwrap();
    h.write(Host::First, one, "home/d/e/b", &noise(3, 100_000)).await.unwrap();
    h.write(Host::First, two, "home/x", b"x").await.unwrap();
    store.snapshot(one, &name("s")).await.unwrap();
    let d = Place::live(one, path("home/d"));
    let options = CopyOptions::default();
    let first = store.copy(&d, &Place::live(two, path("home/new")), &options).await;
    if unsupported(&first) {
        store.delete(one).await.unwrap();
        store.delete(two).await.unwrap();
        return;
    }
    let copied = first.unwrap();
    assert_eq!(copied.bytes, 100_001);
    assert_eq!(copied.shared_bytes, 0, "between owners nothing is shared");
    let source = h.live(Host::First, one).await.unwrap();
    let there = h.live(Host::First, two).await.unwrap();
    for file in ["a", "e/b"] {
        assert_eq!(there[&format!("home/new/{file}")], source[&format!("home/d/{file}")], "{file}");
    }
    assert_eq!(there.len(), 3, "and nothing else is there");

    // Independent, and back from a snapshot.
    h.write(Host::First, two, "home/new/a", b"2").await.unwrap();
    assert_eq!(h.live(Host::First, one).await.unwrap()["home/d/a"], b"1");
    h.write(Host::First, one, "home/d/a", b"spoiled").await.unwrap();
    h.write(Host::First, one, "home/d/extra", b"").await.unwrap();
    h.write(Host::First, one, "home/kept", b"kept").await.unwrap();
    let frozen = Place::frozen(one, name("s"), path("home/d"));
    store.copy(&frozen, &d, &CopyOptions { replace: true, ..options }).await.unwrap();
    let mut expected = source;
    expected.insert("home/kept".to_owned(), b"kept".to_vec());
    assert_eq!(
        h.live(Host::First, one).await.unwrap(),
        expected,
        "one path is restored, whole, and no other"
    );
    let file = Place::frozen(one, name("s"), path("home/d/a"));
    store.copy(&file, &Place::live(one, path("home/a2")), &options).await.unwrap();
    assert_eq!(h.live(Host::First, one).await.unwrap()["home/a2"], b"1", "a single file");
    assert_eq!(h.frozen(Host::First, one, &name("s")).await.unwrap()["home/d/a"], b"1");
    store.delete(one).await.unwrap();
    store.delete(two).await.unwrap();
}

pub(super) async fn copies_refused(h: &dyn Harness) {
    let store = h.store(Host::First);
    let one = project(h).await;
    h.write(Host::First, one, "home/d/a", b"1").await.unwrap();
    h.write(Host::First, one, "home/x", b"x").await.unwrap();
    store.snapshot(one, &name("s")).await.unwrap();
    let live = |text: &str| Place::live(one, path(text));
    if unsupported(&store.copy(&live("home/d"), &live("home/new"), &CopyOptions::default()).await) {
        store.delete(one).await.unwrap();
        return;
    }
    let before = h.live(Host::First, one).await.unwrap();
    let refused = async |from: Place, to: Place| {
        let got = store.copy(&from, &to, &CopyOptions::default()).await.expect_err("it is refused");
        assert_eq!(h.live(Host::First, one).await.unwrap(), before, "refused: nothing changes");
        got
    };
    assert!(matches!(refused(live("home/d"), live("home/x")).await, Error::AlreadyExists { .. }));
    assert!(matches!(refused(live("home/d"), live("home/new")).await, Error::AlreadyExists { .. }));
    assert!(matches!(refused(live("home/none"), live("home/y")).await, Error::Path { .. }));
    assert!(matches!(refused(live("home/x"), live("home/none/y")).await, Error::Path { .. }));
    assert!(matches!(refused(live("home/x"), live("")).await, Error::Path { .. }));
    let frozen = Place::frozen(one, name("s"), path("home/y"));
    assert!(matches!(refused(live("home/x"), frozen).await, Error::Path { .. }), "snapshots never change");
    let missing = Place::frozen(one, name("none"), path("home/x"));
    assert!(matches!(refused(missing, live("home/y")).await, Error::NoSnapshot { .. }));
    let unknown = Place::live(ProjectId::random(), path("home/x"));
    assert!(matches!(refused(unknown.clone(), live("home/y")).await, Error::NotFound { .. }));
    assert!(matches!(refused(live("home/x"), unknown).await, Error::NotFound { .. }));
    store.delete(one).await.unwrap();
}

pub(super) async fn charged(h: &dyn Harness) {
    const SLACK: u64 = 1 << 20;
    let store = h.store(Host::First);
    let (one, two, clone) = (project(h).await, project(h).await, ProjectId::random());
    h.write(Host::First, one, "home/d/a", &noise(5, 4 * MIB)).await.unwrap();
    store.snapshot(one, &name("s")).await.unwrap();
    let full = 4 * MIB as u64;
    let before = store.usage(one).await.unwrap().charged_bytes;
    assert!((full..full + SLACK).contains(&before), "a snapshot shares, and is charged once: {before}");
    let (from, to) = (Place::live(one, path("home/d")), Place::live(two, path("d")));
    store.copy(&from, &to, &CopyOptions::default()).await.unwrap();
    store.clone_volume(one, &name("s"), clone, &CloneOptions::default()).await.unwrap();
    for project in [two, clone] {
        let charged = store.usage(project).await.unwrap().charged_bytes;
        assert!(charged >= full, "its own bytes are charged to it: {charged}");
    }
    assert_eq!(h.live(Host::First, clone).await.unwrap(), tree([("home/d/a", &noise(5, 4 * MIB))]));
    // The source may go; its bytes are not the others' burden.
    store.delete(one).await.unwrap();
    for project in [two, clone] {
        let charged = store.usage(project).await.unwrap().charged_bytes;
        assert!((full..full + 2 * SLACK).contains(&charged), "still its own: {charged}");
        store.delete(project).await.unwrap();
    }
}
