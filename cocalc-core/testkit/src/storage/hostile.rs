//! The promises about hostile names, and about tenants who change their files
//! during a call.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{ChangeKind, CloneOptions, CopyOptions, Error, Place, SendHeader, SendOptions},
};

use super::{
    Harness, Host,
    promises::{name, project},
    zoo::manifest,
};

/// No paths, whoever asks.
const NO_PATHS: &[&str] = &[
    "..",
    ".",
    "../x",
    "home/..",
    "home/../../x",
    "home/./x",
    "/",
    "/etc/passwd",
    "//x",
    "home//x",
    "home/",
    "home/\0",
    "\0",
    "%00",
    "home/%2E%2E/x",
    "%2e%2e",
    "home/%2F",
    "%2Fetc",
    "home%2F..%2Fx",
    "%",
    "%2",
    "%zz",
];
/// No names of snapshots.
const NO_NAMES: &[&str] =
    &["", ".", "..", "../x", "a/b", "/", "a\0", "\0", "-rf", ".hidden", "a b", "a\n", "a%2Fb", "\u{e9}", "~"];

/// Names of files like others, for all that they look like.
fn odd_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "%2E%2E",
        "%2e%2e%2f%2e%2e",
        "%00",
        "..\\..\\x",
        "...",
        ".. ",
        " ..",
        "-rf",
        "--",
        "--help",
        "*",
        "$(id)",
        "`id`",
        "a;b",
        "a|b",
        "~",
        "~root",
        "new\nline",
        "tab\t",
        "\u{202e}",
        "e\u{301}",
        "\u{e9}",
        "\u{2215}",
        "\u{ff0e}\u{ff0e}",
        "con",
        "a:b",
        "'",
        "\"",
        "\\",
        "\u{7f}",
        ".cocalc-copy-x",
        "home",
        ".snapshots",
    ]
    .map(str::to_owned)
    .into();
    names.push("n".repeat(255));
    names.push("\u{e9}".repeat(127));
    names
}

fn in_home(name: &str) -> TreePath {
    TreePath::from_bytes(format!("home/{name}").as_bytes()).unwrap()
}

/// The names beside each live volume and above it, which are the store's own.
async fn around(h: &dyn Harness, projects: &[ProjectId]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for project in projects {
        let Some(root) = h.path(Host::First, *project, None).await else { continue };
        for directory in root.ancestors().skip(1).take(2) {
            found.extend(fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

pub(super) async fn names(h: &dyn Harness) {
    refused_as_texts();
    let store = h.store(Host::First);
    let (one, two) = (project(h).await, project(h).await);
    let odd = odd_names();
    for (number, name) in odd.iter().enumerate() {
        h.write(Host::First, one, &format!("home/{name}"), format!("{number}").as_bytes()).await.unwrap();
    }
    store.snapshot(one, &name("s")).await.unwrap();
    let before = around(h, &[one, two]).await;
    let options = CopyOptions::default();
    let probe = store.copy(&Place::live(one, in_home("*")), &Place::live(two, in_home("*")), &options).await;
    let copies = !matches!(probe, Err(Error::Unsupported { .. }));
    for name in odd.iter().filter(|name| copies && *name != "*") {
        let (from, to) = (Place::live(one, in_home(name)), Place::live(two, in_home(name)));
        let copied = store.copy(&from, &to, &options).await;
        let copied = copied.unwrap_or_else(|error| panic!("{name:?}: {}", cocalc_core::chain(&error)));
        assert_eq!(copied.entries, 1, "{name:?}");
    }
    if copies {
        let (source, copy) =
            (h.live(Host::First, one).await.unwrap(), h.live(Host::First, two).await.unwrap());
        assert_eq!(copy, source, "each name is that name and no other");
        // And as a directory on the way.
        for name in ["%2E%2E", "...", "..\\..\\x"] {
            let into = Place::live(two, in_home(&format!("d-{name}")));
            store.copy(&Place::live(one, "home".parse().unwrap()), &into, &options).await.unwrap();
            let inner = TreePath::from_bytes(format!("home/d-{name}/{name}").as_bytes()).unwrap();
            let out = Place::live(two, in_home("out"));
            store
                .copy(&Place::live(two, inner), &out, &CopyOptions { replace: true, ..options })
                .await
                .unwrap();
            assert_eq!(h.live(Host::First, two).await.unwrap()["home/out"], source[&format!("home/{name}")]);
        }
    }
    told(h, one, &odd).await;
    carried(h, one).await;
    far_away(h, one, copies).await;
    let after = around(h, &[one, two]).await;
    let stray: Vec<_> = before.symmetric_difference(&after).collect();
    assert!(stray.is_empty(), "beside or above the volumes: {stray:?}");
    for host in [Host::First, Host::Second] {
        h.store(host).delete(one).await.unwrap();
        h.store(host).delete(two).await.unwrap();
    }
}

/// What must not even become a path or a name, in text or in JSON.
fn refused_as_texts() {
    let long = format!("home/{}", ["x"; 2045].join("/"));
    let too_long = [long.as_str(), "/x/x/x/x"].concat();
    let name_too_long = format!("home/{}", "n".repeat(256));
    for text in NO_PATHS.iter().copied().chain([too_long.as_str(), &name_too_long]) {
        assert!(text.parse::<TreePath>().is_err(), "{text:?} is no path");
        let place = serde_json::json!({
            "project": ProjectId::random(), "snapshot": null, "path": text,
        });
        assert!(serde_json::from_value::<Place>(place).is_err(), "{text:?} is no path");
    }
    assert!(long.parse::<TreePath>().is_ok(), "4 KiB are a path");
    let too_long = "n".repeat(101);
    for text in NO_NAMES.iter().copied().chain([too_long.as_str()]) {
        assert!(text.parse::<SnapshotName>().is_err(), "{text:?} is no name");
        let header = |name: &str, base: &str| {
            let (project, origin) = (ProjectId::random(), ProjectId::random());
            serde_json::json!({
                "backend": "x", "project": project, "name": name, "origin": origin,
                "base": [base, origin], "extra": "",
            })
        };
        assert!(serde_json::from_value::<SendHeader>(header("a", "b")).is_ok());
        assert!(serde_json::from_value::<SendHeader>(header(text, "b")).is_err(), "{text:?} is no name");
        assert!(serde_json::from_value::<SendHeader>(header("a", text)).is_err(), "{text:?} is no name");
    }
}

/// Differences name them as they are.
async fn told(h: &dyn Harness, project: ProjectId, odd: &[String]) {
    let store = h.store(Host::First);
    for name in odd {
        h.write(Host::First, project, &format!("home/{name}"), b"another").await.unwrap();
    }
    let changes = match store.diff(project, &name("s"), None, None, 1000).await {
        Err(Error::Unsupported { .. }) => return,
        told => told.unwrap().changes,
    };
    let changed: BTreeSet<Vec<u8>> = changes
        .iter()
        .filter(|change| change.kind == ChangeKind::Modified)
        .map(|change| change.path.as_bytes().to_vec())
        .collect();
    let expected: BTreeSet<Vec<u8>> = odd.iter().map(|name| in_home(name).as_bytes().to_vec()).collect();
    assert_eq!(changed, expected, "a difference names each as it is");
    for change in &changes {
        let text = change.path.to_string();
        assert_eq!(text.parse::<TreePath>().unwrap(), change.path, "{text} is read back");
        assert!(!text.contains(['\n', '\0', '\u{7f}']), "{text:?} can be shown");
    }
}

/// Streams carry them, under every name that a snapshot can have.
async fn carried(h: &dyn Harness, project: ProjectId) {
    let (first, second) = (h.store(Host::First), h.store(Host::Second));
    let longest = "x".repeat(100);
    for n in ["0", "a..b", "a.", "A", "a", "x.tmp", "x+y:z", "live", "tree", "home", &longest] {
        first.snapshot(project, &name(n)).await.unwrap();
        let sent = first.send(project, &name(n), &SendOptions::whole()).await.unwrap();
        second.receive(&sent.header, sent.reader).await.unwrap();
        assert_eq!(
            h.frozen(Host::Second, project, &name(n)).await.unwrap(),
            h.frozen(Host::First, project, &name(n)).await.unwrap(),
            "{n}"
        );
    }
    assert_eq!(second.snapshots(project).await.unwrap().len(), 11, "names differ also by case");
}

/// Paths that lead far, or through what is no directory.
async fn far_away(h: &dyn Harness, project: ProjectId, copies: bool) {
    let store = h.store(Host::First);
    let live = |path: TreePath| Place::live(project, path);
    let deep: TreePath = format!("home/{}", ["x"; 2045].join("/")).parse().unwrap();
    let wide: TreePath = format!("home/{}", ["n".repeat(255).as_str(); 15].join("/")).parse().unwrap();
    let bytes = TreePath::from_bytes(b"home/\xff\xfe").unwrap();
    let through = in_home("*/x");
    let options = CopyOptions::default();
    let before = h.live(Host::First, project).await.unwrap();
    for path in [&deep, &wide, &bytes, &through] {
        if copies {
            let got = store.copy(&live(path.clone()), &live(in_home("y")), &options).await;
            assert!(matches!(got, Err(Error::Path { .. })), "from {path:.40?}: {got:?}");
            let below = live(path.join(b"y").unwrap_or(deep.clone()));
            let got = store.copy(&live(in_home("*")), &below, &options).await;
            assert!(matches!(got, Err(Error::Path { .. })), "to below {path:.40?}: {got:?}");
        }
        // As the place where a page begins it need not be there.
        match store.diff(project, &name("s"), None, Some(path), 1000).await {
            Err(Error::Unsupported { .. }) => {}
            page => assert!(page.unwrap().changes.iter().all(|change| change.path.names().gt(path.names()))),
        }
    }
    assert_eq!(h.live(Host::First, project).await.unwrap(), before, "refused: nothing changes");
}

/// Swaps directories for links to outside, as fast as it can, until it is
/// dropped.
struct Swapper {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Swapper {
    fn start(home: PathBuf, places: &'static [&'static str], canary: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut swaps = 0;
                while !stop.load(Ordering::Relaxed) {
                    for place in places {
                        let (place, aside) = (home.join(place), home.join(".aside"));
                        // The volume itself may be another by now.
                        if fs::rename(&place, &aside).is_ok() {
                            let _ = symlink(&canary, &place);
                            swaps += 1;
                            let _ = fs::remove_file(&place);
                            let _ = fs::rename(&aside, &place);
                        }
                    }
                }
                swaps
            }
        });
        Self { stop, thread: Some(thread) }
    }

    fn stop(&mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |thread| thread.join().unwrap())
    }
}

impl Drop for Swapper {
    fn drop(&mut self) {
        self.stop();
    }
}

pub(super) async fn raced(h: &dyn Harness) {
    let outside = tempfile::tempdir().unwrap();
    let canary = outside.path().join("canary");
    fs::create_dir_all(canary.join("d/inner")).unwrap();
    fs::write(canary.join("d/inner/f"), "outside").unwrap();
    fs::write(canary.join("f"), "outside").unwrap();
    let before = manifest(&canary);
    let store = h.store(Host::First);
    let (one, two) = (project(h).await, project(h).await);
    let home = h.path(Host::First, one, None).await.unwrap().join("home");
    fs::create_dir_all(home.join("a/d/inner")).unwrap();
    fs::write(home.join("a/d/inner/f"), "inside").unwrap();
    fs::write(home.join("a/f"), "inside").unwrap();
    fs::create_dir_all(home.join("b/d")).unwrap();
    store.snapshot(one, &name("s")).await.unwrap();

    let mut swapper = Swapper::start(home, &["a", "a/d", "b", "b/d", "a/d/inner"], canary.clone());
    let path = |text: &str| -> TreePath { text.parse().unwrap() };
    let refused = |got: Result<_, Error>, what: &str| match got {
        Ok(_) => {}
        // Gone, or a link, at that moment; or there already.
        Err(
            Error::Path { .. }
            | Error::AlreadyExists { .. }
            | Error::Unsupported { .. }
            | Error::Backend { .. },
        ) => {}
        Err(error) => panic!("{what}: {}", cocalc_core::chain(&error)),
    };
    let replacing = CopyOptions { replace: true, ..CopyOptions::default() };
    for round in 0..12 {
        let n = format!("r{round}");
        // Out of what is swapped, and into it.
        let (from, to) = (Place::live(one, path("home/a")), Place::live(two, path("home/got")));
        refused(store.copy(&from, &to, &replacing).await.map(|_| ()), "copied out");
        let from = Place::live(one, path("home/a/d/inner/f"));
        refused(store.copy(&from, &Place::live(two, path("home/f")), &replacing).await.map(|_| ()), "a file");
        let (from, to) =
            (Place::frozen(one, name("s"), path("home/a/d")), Place::live(one, path("home/b/d")));
        refused(store.copy(&from, &to, &replacing).await.map(|_| ()), "copied in, over what is swapped");
        let to = Place::live(one, path(&format!("home/b/d/{n}")));
        refused(store.copy(&from, &to, &CopyOptions::default()).await.map(|_| ()), "copied in, below");
        let _ = store.diff(one, &name("s"), None, None, 1000).await;
        let _ = store.footprint(one, None).await;
        refused(store.snapshot(one, &name(&n)).await.map(|_| ()), "snapshot");
        if round % 4 == 3 {
            refused(store.restore(one, &name("s"), &name(&format!("f{round}"))).await.map(|_| ()), "restore");
        }
    }
    assert!(swapper.stop() > 0, "nothing was swapped");
    assert_eq!(manifest(&canary), before, "what the links lead to is as it was");
    // What was made of it, in whatever state, has nothing of the outside.
    let mut trees = vec![h.live(Host::First, one).await.unwrap(), h.live(Host::First, two).await.unwrap()];
    for snapshot in store.snapshots(one).await.unwrap() {
        trees.push(h.frozen(Host::First, one, &snapshot.name).await.unwrap());
    }
    for tree in trees {
        let outside: Vec<_> = tree.iter().filter(|(_, content)| *content == b"outside").collect();
        assert!(outside.is_empty(), "copied from outside: {outside:?}");
    }
    let clone = ProjectId::random();
    store.clone_volume(one, &name("s"), clone, &CloneOptions::default()).await.unwrap();
    assert_eq!(h.live(Host::First, clone).await.unwrap().len(), 2);
    for project in [one, two, clone] {
        store.delete(project).await.unwrap();
    }
    assert_eq!(manifest(&canary), before, "also after all is deleted");
}
