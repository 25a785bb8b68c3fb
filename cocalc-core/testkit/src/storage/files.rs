//! The promises about real files: nothing that Linux knows of one is lost.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, symlink},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath},
    storage::{CloneOptions, CopyOptions, Error, Place, SendOptions},
};

use super::{
    Harness, Host,
    promises::{name, project},
    zoo::{disturb, manifest, plant},
};

type Manifest = BTreeMap<Vec<u8>, String>;

async fn at(h: &dyn Harness, host: Host, project: ProjectId, snapshot: Option<&SnapshotName>) -> PathBuf {
    h.path(host, project, snapshot).await.expect("a backend with files says where they are")
}

/// A project with everything that is hard to carry, frozen as `zoo`.
async fn zoo(h: &dyn Harness) -> (ProjectId, Manifest) {
    let project = project(h).await;
    let root = at(h, Host::First, project, None).await;
    plant(&root);
    h.store(Host::First).snapshot(project, &name("zoo")).await.unwrap();
    (project, manifest(&root))
}

fn same(got: &Manifest, expected: &Manifest, what: &str) {
    for (path, line) in expected {
        let path_text = String::from_utf8_lossy(path);
        assert_eq!(got.get(path).map(String::as_str), Some(line.as_str()), "{what}: {path_text:?}");
    }
    let more: Vec<_> = got.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{what}: there is more than there was: {more:?}");
}

async fn clean(h: &dyn Harness, projects: &[ProjectId]) {
    for host in [Host::First, Host::Second] {
        for project in projects {
            h.store(host).delete(*project).await.unwrap();
        }
    }
}

async fn sent(h: &dyn Harness, project: ProjectId, n: &str, base: Option<&str>) -> Manifest {
    let base = base.map(name);
    let sent =
        h.store(Host::First).send(project, &name(n), &SendOptions::since(base.as_ref())).await.unwrap();
    assert!(sent.header.left_out.is_empty(), "nothing of this is left out: {:?}", sent.header.left_out);
    h.store(Host::Second).receive(&sent.header, sent.reader).await.unwrap();
    // Alive, because a snapshot need not show the time of its root.
    h.store(Host::Second).restore(project, &name(n), &name(&format!("former-{n}"))).await.unwrap();
    manifest(&at(h, Host::Second, project, None).await)
}

pub(super) async fn snapshot(h: &dyn Harness) {
    let (project, expected) = zoo(h).await;
    let frozen = at(h, Host::First, project, Some(&name("zoo"))).await;
    same(&manifest(&frozen), &expected, "a snapshot");
    disturb(&at(h, Host::First, project, None).await);
    same(&manifest(&frozen), &expected, "a snapshot, after the volume has changed");
    clean(h, &[project]).await;
}

pub(super) async fn staged(h: &dyn Harness) {
    let (store, new, full) = (h.store(Host::First), ProjectId::random(), name("from-elsewhere"));
    // A project that this store has never had.
    let place = store.stage(new, &full).await.unwrap();
    fs::create_dir(place.path().join("home")).unwrap();
    plant(place.path());
    fs::write(place.path().join("bulk"), vec![7; 6_000_000]).unwrap();
    let expected = manifest(place.path());
    assert!(store.snapshots(new).await.unwrap().is_empty(), "what is staged is no snapshot");
    assert!(store.list().await.unwrap().iter().all(|volume| volume.project != new));
    let published = place.publish().await.unwrap();
    assert_eq!((published.project, &published.name), (new, &full));
    assert_eq!(store.snapshots(new).await.unwrap(), [published]);
    same(&manifest(&at(h, Host::First, new, Some(&full)).await), &expected, "what was published");
    store.restore(new, &full, &name("former")).await.unwrap();
    let live = at(h, Host::First, new, None).await;
    same(&manifest(&live), &expected, "what came to life of it");
    if store.capabilities().quotas {
        let charged = store.usage(new).await.unwrap().charged_bytes;
        assert!((6_000_000..60_000_000).contains(&charged), "charged once: {charged}");
    }
    // It is frozen, and its name is taken.
    disturb(&live);
    same(&manifest(&at(h, Host::First, new, Some(&full)).await), &expected, "after changes of the volume");
    assert!(matches!(store.stage(new, &full).await, Err(Error::AlreadyExists { .. })));
    let late = store.stage(new, &name("late")).await.unwrap();
    store.snapshot(new, &name("late")).await.unwrap();
    assert!(matches!(late.publish().await, Err(Error::AlreadyExists { .. })));
    // Dropped, and deleted meanwhile.
    let dropped = store.stage(new, &name("dropped")).await.unwrap();
    let (path, names) = (dropped.path().to_owned(), store.snapshots(new).await.unwrap());
    fs::write(path.join("bulk"), vec![8; 1_000_000]).unwrap();
    drop(dropped);
    gone(&path).await;
    assert_eq!(store.snapshots(new).await.unwrap(), names);
    let other = ProjectId::random();
    let orphan = store.stage(other, &full).await.unwrap();
    let path = orphan.path().to_owned();
    drop(orphan);
    gone(&path).await;
    assert!(store.snapshots(other).await.unwrap().is_empty());
    assert!(matches!(store.volume(other).await, Err(Error::NotFound { .. })));
    clean(h, &[new, other]).await;
}

async fn gone(path: &std::path::Path) {
    let patience = std::time::Instant::now();
    while path.exists() {
        assert!(patience.elapsed().as_secs() < 60, "{} is still there", path.display());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

pub(super) async fn restore(h: &dyn Harness) {
    let (project, expected) = zoo(h).await;
    disturb(&at(h, Host::First, project, None).await);
    let disturbed = manifest(&at(h, Host::First, project, None).await);
    let store = h.store(Host::First);
    store.restore(project, &name("zoo"), &name("former")).await.unwrap();
    same(&manifest(&at(h, Host::First, project, None).await), &expected, "a restored volume");
    same(&manifest(&at(h, Host::First, project, Some(&name("former"))).await), &disturbed, "what was live");
    clean(h, &[project]).await;
}

pub(super) async fn clone(h: &dyn Harness) {
    let (project, expected) = zoo(h).await;
    for same_owner in [false, true] {
        let target = ProjectId::random();
        let options = CloneOptions { same_owner, ..CloneOptions::default() };
        h.store(Host::First).clone_volume(project, &name("zoo"), target, &options).await.unwrap();
        same(&manifest(&at(h, Host::First, target, None).await), &expected, "a clone");
        clean(h, &[target]).await;
    }
    clean(h, &[project]).await;
}

pub(super) async fn stream(h: &dyn Harness) {
    let (project, expected) = zoo(h).await;
    same(&sent(h, project, "zoo", None).await, &expected, "what was received");
    clean(h, &[project]).await;
}

pub(super) async fn delta(h: &dyn Harness) {
    let (project, _) = zoo(h).await;
    sent(h, project, "zoo", None).await;
    let root = at(h, Host::First, project, None).await;
    disturb(&root);
    h.store(Host::First).snapshot(project, &name("after")).await.unwrap();
    same(&sent(h, project, "after", Some("zoo")).await, &manifest(&root), "what a delta gives");
    clean(h, &[project]).await;
}

pub(super) async fn copy(h: &dyn Harness) {
    let (one, _) = zoo(h).await;
    let two = project(h).await;
    let expected = manifest(&at(h, Host::First, one, None).await.join("home"));
    let home: TreePath = "home".parse().unwrap();
    for (number, from) in
        [Place::live(one, home.clone()), Place::frozen(one, name("zoo"), home)].iter().enumerate()
    {
        for same_owner in [false, true] {
            let to = format!("copy-{number}-{same_owner}");
            let options = CopyOptions { same_owner, replace: false };
            let place = Place::live(two, to.parse().unwrap());
            h.store(Host::First).copy(from, &place, &options).await.unwrap();
            same(&manifest(&at(h, Host::First, two, None).await.join(to)), &expected, "a copied directory");
        }
    }
    clean(h, &[one, two]).await;
}

/// What any backend with files keeps: also without privilege, and on file
/// systems without attributes.
pub(super) async fn basic(h: &dyn Harness) {
    use std::os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _};
    fn seen(root: &std::path::Path) -> BTreeMap<Vec<u8>, String> {
        let mut found = BTreeMap::new();
        let mut todo = vec![root.join("home")];
        while let Some(path) = todo.pop() {
            let about = fs::symlink_metadata(&path).unwrap();
            let content = if about.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                String::new()
            } else if about.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else {
                format!("{:?}", fs::read(&path).unwrap())
            };
            let time = if about.is_symlink() { (0, 0) } else { (about.mtime(), about.mtime_nsec()) };
            let links = if about.is_dir() { 1 } else { about.nlink() };
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            found.insert(name, format!("{content} {:o} {time:?} {links}", about.mode()));
        }
        found
    }
    let project = project(h).await;
    let root = at(h, Host::First, project, None).await;
    let home = root.join("home");
    fs::write(home.join(std::ffi::OsStr::from_bytes(b"\xff\n\xfe")), "bytes").unwrap();
    fs::write(home.join("y".repeat(255)), "long").unwrap();
    fs::write(home.join("script"), "#!").unwrap();
    fs::set_permissions(home.join("script"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::create_dir_all(home.join("d/empty")).unwrap();
    fs::hard_link(home.join("script"), home.join("d/again")).unwrap();
    symlink("../nowhere", home.join("d/link")).unwrap();
    super::zoo::set_time(&home.join("script"), 1_000_000_001);
    super::zoo::set_time(&home.join("d"), 1_000_000_002);
    super::zoo::set_time(&home, 1_000_000_003);
    let expected = seen(&root);
    let store = h.store(Host::First);
    store.snapshot(project, &name("s")).await.unwrap();
    assert_eq!(seen(&at(h, Host::First, project, Some(&name("s"))).await), expected, "a snapshot");
    let target = ProjectId::random();
    store.clone_volume(project, &name("s"), target, &CloneOptions::default()).await.unwrap();
    assert_eq!(seen(&at(h, Host::First, target, None).await), expected, "a clone");
    let stream = store.send(project, &name("s"), &SendOptions::whole()).await.unwrap();
    h.store(Host::Second).receive(&stream.header, stream.reader).await.unwrap();
    assert_eq!(seen(&at(h, Host::Second, project, Some(&name("s"))).await), expected, "what was received");
    store.delete(target).await.unwrap();
    let target = self::project(h).await;
    let (from, to) =
        (Place::live(project, "home".parse().unwrap()), Place::live(target, "home".parse().unwrap()));
    match store.copy(&from, &to, &CopyOptions { replace: true, ..CopyOptions::default() }).await {
        Err(Error::Unsupported { .. }) => {}
        copied => {
            copied.unwrap();
            assert_eq!(seen(&at(h, Host::First, target, None).await), expected, "a copy");
        }
    }
    clean(h, &[project, target]).await;
}

pub(super) async fn links(h: &dyn Harness) {
    let outside = tempfile::tempdir().unwrap();
    let canary = outside.path().join("canary");
    fs::create_dir(&canary).unwrap();
    fs::write(canary.join("secret"), "secret").unwrap();
    let before = manifest(&canary);
    let store = h.store(Host::First);
    let one = project(h).await;
    let root = at(h, Host::First, one, None).await;
    let home = root.join("home");
    fs::create_dir(home.join("real")).unwrap();
    fs::write(home.join("real/secret"), "mine").unwrap();
    fs::create_dir(home.join("out")).unwrap();
    symlink(&canary, home.join("link")).unwrap();
    symlink("/", home.join("root")).unwrap();
    store.snapshot(one, &name("s")).await.unwrap();
    let place = |text: &str| Place::live(one, text.parse().unwrap());
    let options = CopyOptions::default();
    let copies = !matches!(
        store.copy(&place("home/real"), &place("home/copy"), &options).await,
        Err(Error::Unsupported { .. })
    );
    if copies {
        for (from, to) in
            [("home/link/secret", "home/x"), ("home/real", "home/link/x"), ("home/root/etc/passwd", "home/x")]
        {
            let got = store.copy(&place(from), &place(to), &options).await;
            assert!(matches!(got, Err(Error::Path { .. })), "{from} to {to}: {got:?}");
        }
    }
    // A tenant that swaps as fast as it can.
    let stop = Arc::new(AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (stop, home, canary) = (Arc::clone(&stop), home.clone(), canary.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                for place in ["real", "out"] {
                    let (place, aside) = (home.join(place), home.join("aside"));
                    if fs::rename(&place, &aside).is_ok() {
                        let _ = symlink(&canary, &place);
                        let _ = fs::remove_file(&place);
                        let _ = fs::rename(&aside, &place);
                    }
                }
            }
        }
    });
    let mut made = 0;
    for round in 0..60 {
        if copies {
            match store.copy(&place("home/real/secret"), &place(&format!("home/out/{round}")), &options).await
            {
                Ok(_) => made += 1,
                Err(Error::Path { .. }) => {}
                Err(other) => panic!("{}", cocalc_core::chain(&other)),
            }
        }
        let _ = store.footprint(one, None).await;
        let _ = store.usage(one).await;
        let _ = store.diff(one, &name("s"), None, None, 100).await;
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    if copies {
        let out = fs::read_dir(home.join("out")).unwrap();
        let out: Vec<_> = out.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        assert_eq!(out.len(), made, "every copy that was made is there, and nothing else");
        assert!(out.iter().all(|copy| copy == b"mine"), "and none has what a link leads to");
    }
    same(&manifest(&canary), &before, "what links lead to");
    clean(h, &[one]).await;
}
