//! What the contract promises, a function for each promise.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cocalc_core::backups::{
    Backup, BackupKind, BackupSource, Backups, CheckOptions, Erased, Error, Phase, Progress, PruneOptions,
};
use cocalc_core::storage::{Change, ChangeKind, Changes, NodeKind};
use cocalc_ids::{Epoch, HostId, ProjectId, Timestamp, TreePath};
use futures_util::future::join_all;
use tempfile::TempDir;

use super::zoo::{Facts, differences, edit, facts, plant};
use crate::storage;

/// A backend under test, and room for trees.
#[derive(Debug)]
pub struct Subject<'a> {
    backups: &'a dyn Backups,
    scratch: &'a Path,
    minute: AtomicU64,
}

impl<'a> Subject<'a> {
    /// Takes a backend, and a directory that stays for its life.
    pub fn new(backups: &'a dyn Backups, scratch: &'a Path) -> Self {
        Self { backups, scratch, minute: AtomicU64::new(0) }
    }

    fn directory(&self) -> TempDir {
        tempfile::tempdir_in(self.scratch).unwrap()
    }

    fn planted(&self, seed: u64) -> TempDir {
        let tree = self.directory();
        plant(tree.path(), seed);
        tree
    }

    /// A source: each is a minute later than the one before.
    pub fn source(&self, project: ProjectId, path: &Path, parent: Option<&Backup>) -> BackupSource {
        let minute = self.minute.fetch_add(1, Ordering::Relaxed);
        BackupSource {
            project,
            host: HostId::random(),
            epoch: Epoch::new(7).unwrap(),
            snapshot: "auto-1".parse().unwrap(),
            taken: Timestamp::from_secs(1_700_000_000 + 60 * i64::try_from(minute).unwrap()),
            path: path.to_owned(),
            kind: BackupKind::Manual,
            parent: parent.map(|backup| backup.id.clone()),
            moved: false,
            excludes: Vec::new(),
        }
    }

    async fn back_up(&self, source: &BackupSource) -> Backup {
        self.backups.back_up(source, &|_| ()).await.expect("a backup is made")
    }

    /// Restores into a new directory and says what is there.
    async fn restored(&self, backup: &Backup) -> BTreeMap<Vec<u8>, Facts> {
        let target = self.directory();
        let project = backup.project;
        self.backups
            .restore(project, &backup.id, &TreePath::root(), target.path(), &|_| ())
            .await
            .expect("what is listed restores");
        facts(target.path())
    }

    async fn assert_restores(&self, backup: &Backup, as_was: &BTreeMap<Vec<u8>, Facts>) {
        let differences = differences(as_was, &self.restored(backup).await);
        assert!(differences.is_empty(), "restored is not what was backed up: {differences:#?}");
    }

    async fn listed(&self, project: ProjectId) -> Vec<Backup> {
        self.backups.list(project).await.expect("backups are listed")
    }
}

fn path(text: &str) -> TreePath {
    text.parse().unwrap()
}

pub(super) async fn identity(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(1));
    assert_eq!(subject.listed(project).await, [], "an unknown project has no backups");
    let as_was = facts(tree.path());
    let source = subject.source(project, tree.path(), None);
    let told = Mutex::new(Vec::<Progress>::new());
    let backup = subject.backups.back_up(&source, &|state| told.lock().unwrap().push(state)).await.unwrap();
    assert_eq!((backup.project, backup.host, backup.epoch), (project, source.host, source.epoch));
    assert_eq!((backup.taken, backup.kind), (source.taken, source.kind));
    let files: Vec<_> = as_was.values().filter(|facts| !facts.is_directory()).collect();
    assert_eq!(backup.files, files.len() as u64, "files are counted");
    let bytes = files.iter().map(|facts| facts.size()).sum::<u64>();
    assert!(backup.bytes >= bytes, "bytes are counted: {} of {bytes}", backup.bytes);
    assert_eq!(subject.listed(project).await, std::slice::from_ref(&backup));

    let target = subject.directory();
    let restored = subject
        .backups
        .restore(project, &backup.id, &TreePath::root(), target.path(), &|state| {
            told.lock().unwrap().push(state);
        })
        .await
        .unwrap();
    let differences = differences(&as_was, &facts(target.path()));
    assert!(differences.is_empty(), "restored is not what was backed up: {differences:#?}");
    assert_eq!(restored.entries, as_was.len() as u64 - 1, "everything but the root is counted");
    assert_eq!(restored.bytes, bytes);
    let told = told.into_inner().unwrap();
    for phase in [Phase::Storing, Phase::Restoring] {
        let bytes: Vec<_> =
            told.iter().filter(|state| state.phase == phase).map(|state| state.bytes).collect();
        assert!(bytes.is_sorted(), "progress went back: {bytes:?}");
        assert!(bytes.last().is_some_and(|bytes| *bytes > 0), "nothing was told of {phase:?}: {told:?}");
    }
    // Who waits sees what goes on before there are bytes to count, and how much
    // of a restore is left, to its end.
    let mut phases: Vec<_> = told.iter().map(|state| state.phase).collect();
    phases.dedup();
    let all = [Phase::Opening, Phase::Storing, Phase::Opening, Phase::Restoring, Phase::Verifying];
    assert_eq!(phases, all, "{told:?}");
    for phase in [Phase::Restoring, Phase::Verifying] {
        let last = told.iter().rfind(|state| state.phase == phase).unwrap();
        assert_eq!(last.total_bytes, Some(last.bytes), "the end of {phase:?} was not told: {told:?}");
    }
    let checked =
        subject.backups.check(project, &CheckOptions { read_data: true, ..Default::default() }).await;
    assert!(checked.unwrap().is_sound());
}

/// What the contract suite of volumes plants; a socket need not come back.
pub(super) async fn what_volumes_hold(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.directory());
    fs::create_dir(tree.path().join("home")).unwrap();
    storage::plant(tree.path());
    let told = |tree: &Path| {
        let mut told = storage::manifest(tree);
        told.remove(&b"home/socket"[..]);
        told
    };
    let assert_same = |as_was: &BTreeMap<Vec<u8>, String>, tree: &Path| {
        let restored = told(tree);
        let names = as_was.keys().chain(restored.keys()).collect::<BTreeSet<_>>();
        let different: Vec<_> = names
            .into_iter()
            .filter(|name| as_was.get(*name) != restored.get(*name))
            .map(|name| (String::from_utf8_lossy(name), as_was.get(name), restored.get(name)))
            .collect();
        assert!(different.is_empty(), "restored is not what was backed up: {different:#?}");
    };
    let mut parent = None;
    for disturbed in [false, true] {
        if disturbed {
            storage::disturb(tree.path());
        }
        let as_was = told(tree.path());
        let backup = subject.back_up(&subject.source(project, tree.path(), parent.as_ref())).await;
        let target = subject.directory();
        let root = TreePath::root();
        subject.backups.restore(project, &backup.id, &root, target.path(), &|_| ()).await.unwrap();
        assert_same(&as_was, target.path());
        parent = Some(backup);
    }
}

/// Hosts whose clocks are wrong.
pub(super) async fn wrong_clocks(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(14));
    let at = |secs, parent: Option<&Backup>| BackupSource {
        taken: Timestamp::from_secs(secs),
        ..subject.source(project, tree.path(), parent)
    };
    let ahead = subject.back_up(&at(7_258_118_400, None)).await;
    fs::write(tree.path().join("home/notes.txt"), "after the year 2200").unwrap();
    let as_was = facts(tree.path());
    let behind = subject.back_up(&at(3, Some(&ahead))).await;
    assert!(behind.files_read < behind.files, "the parent is from the future, and known");
    let listed: Vec<_> = subject.listed(project).await.into_iter().map(|backup| backup.id).collect();
    assert_eq!(listed, [behind.id.clone(), ahead.id.clone()], "by when they were taken, as was said");
    // Nothing is thought old, or new, because of that.
    subject.backups.prune(project, &PruneOptions::default()).await.unwrap();
    subject.assert_restores(&behind, &as_was).await;
    assert_eq!(subject.restored(&ahead).await.len(), as_was.len());
}

pub(super) async fn one_path(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(2));
    let backup = subject.back_up(&subject.source(project, tree.path(), None)).await;
    let as_was = facts(tree.path());
    for wanted in
        ["home/many", "home/not utf-8 %FF%C3", "home/link", "home/holey", "home/nothing", "home/fifo"]
    {
        let wanted = path(wanted);
        let target = subject.directory();
        let restored = subject.backups.restore(project, &backup.id, &wanted, target.path(), &|_| ()).await;
        assert!(restored.unwrap().entries > 0);
        let there = facts(target.path());
        let (above, name) = wanted.split_last().unwrap();
        for (below, facts) in &there {
            if below.is_empty() {
                continue;
            }
            assert!(below.starts_with(name), "{below:?} was not asked for");
            let full = [above.as_bytes(), b"/", below].concat();
            assert_eq!(Some(facts), as_was.get(&full), "{wanted} came back changed");
        }
        let expected = as_was.keys().filter(|full| TreePath::from_bytes(full).unwrap().is_within(&wanted));
        assert_eq!(there.len() - 1, expected.count(), "{wanted} came back in part");
    }
    let target = subject.directory();
    let missing =
        subject.backups.restore(project, &backup.id, &path("home/no such"), target.path(), &|_| ()).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
}

pub(super) async fn browsing(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(3));
    let backup = subject.back_up(&subject.source(project, tree.path(), None)).await;
    let root = subject.backups.ls(project, &backup.id, &TreePath::root(), None, 100).await.unwrap();
    assert_eq!(
        root.entries.iter().map(|entry| entry.path.to_string()).collect::<Vec<_>>(),
        ["home", "system"]
    );
    let whole = subject.backups.ls(project, &backup.id, &path("home"), None, 1000).await.unwrap();
    assert!(!whole.truncated);
    assert_eq!(whole.entries.len(), fs::read_dir(tree.path().join("home")).unwrap().count());
    let mut paged = Vec::new();
    loop {
        let after = paged.last().map(|entry: &cocalc_core::backups::Entry| &entry.path);
        let page = subject.backups.ls(project, &backup.id, &path("home"), after, 7).await.unwrap();
        paged.extend(page.entries);
        if !page.truncated {
            break;
        }
    }
    assert_eq!(paged, whole.entries, "pages make the whole");
    let found = subject.backups.find(project, &backup.id, "BOTTOM", 10).await.unwrap();
    assert_eq!(found.entries.len(), 1);
    assert!(found.entries[0].path.to_string().ends_with("level-39/bottom"));
    let found = subject.backups.find(project, &backup.id, "l", 3).await.unwrap();
    assert!(found.truncated && found.entries.len() == 3);
    for missing in [("home/no such", backup.id.as_str()), ("home/notes.txt", &backup.id), ("home", "0000")] {
        let answer = subject.backups.ls(project, missing.1, &path(missing.0), None, 10).await;
        assert!(matches!(answer, Err(Error::NotFound { .. })), "{missing:?}: {answer:?}");
    }
}

pub(super) async fn incremental_is_full(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(4));
    let first_facts = facts(tree.path());
    let first = subject.back_up(&subject.source(project, tree.path(), None)).await;
    let same = subject.back_up(&subject.source(project, tree.path(), Some(&first))).await;
    assert_eq!(same.files_read, 0, "nothing has changed, so nothing is read");
    assert!(same.added_bytes < 100_000, "nothing has changed, but {} bytes were added", same.added_bytes);
    edit(tree.path(), 5);
    let second_facts = facts(tree.path());
    let incremental = subject.back_up(&subject.source(project, tree.path(), Some(&same))).await;
    assert!(incremental.files_read > 0 && incremental.files_read < incremental.files / 2);
    // Where a large file is cut into chunks differs between repositories; at
    // worst it is one chunk, and 100,000 bytes are in a new file.
    assert!(
        incremental.added_bytes < first.added_bytes + 150_000,
        "{} bytes were added by a few edits, {} by all of it",
        incremental.added_bytes,
        first.added_bytes
    );
    let full = subject.back_up(&subject.source(project, tree.path(), None)).await;
    assert_eq!(full.files_read, full.files, "without a parent every file is read");
    subject.assert_restores(&incremental, &second_facts).await;
    subject.assert_restores(&full, &second_facts).await;
    subject.assert_restores(&first, &first_facts).await;
    let listed: Vec<_> = subject.listed(project).await.into_iter().map(|backup| backup.id).collect();
    assert_eq!(listed, [first.id, same.id, incremental.id, full.id], "oldest first");
}

pub(super) async fn moved(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(6));
    let first = subject.back_up(&subject.source(project, tree.path(), None)).await;
    // As a move does it: the same files, with new change times and inodes.
    let target = subject.directory();
    subject.backups.restore(project, &first.id, &TreePath::root(), target.path(), &|_| ()).await.unwrap();
    fs::write(target.path().join("home/many/0"), "changed").unwrap();
    let as_was = facts(target.path());
    let source = BackupSource { moved: true, ..subject.source(project, target.path(), Some(&first)) };
    let after = subject.back_up(&source).await;
    assert_eq!(after.files_read, 1, "only what has changed is read");
    subject.assert_restores(&after, &as_was).await;
}

pub(super) async fn excludes(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(7));
    let excludes = vec!["many".to_owned(), "*.bin".to_owned()];
    let source = BackupSource { excludes, ..subject.source(project, tree.path(), None) };
    let backup = subject.back_up(&source).await;
    let mut as_was = facts(tree.path());
    as_was.retain(|name, _| !name.starts_with(b"home/many") && !name.ends_with(b".bin"));
    subject.assert_restores(&backup, &as_was).await;
    // From the root, as in a `.gitignore` there.
    let excludes = ["home/many", "/system", "many/7"].map(str::to_owned).to_vec();
    let source = BackupSource { excludes, ..subject.source(project, tree.path(), None) };
    let backup = subject.back_up(&source).await;
    let left = subject.restored(&backup).await;
    assert!(left.contains_key(&b"home/large.bin"[..]) && !left.contains_key(&b"home/many"[..]));
    assert!(!left.contains_key(&b"system"[..]), "a pattern from the root leaves out");
    let excludes = vec!["!home".to_owned()];
    let source = BackupSource { excludes, ..subject.source(project, tree.path(), None) };
    let refused = subject.backups.back_up(&source, &|_| ()).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}

/// What is different now from a backup: all kinds of changes, and no others.
pub(super) async fn comparing(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(15));
    let (home, now) = (tree.path().join("home"), tree.path());
    fs::create_dir(home.join("left out")).unwrap();
    // Two that change places have not only the same size.
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(home.join("many/6")).unwrap().set_modified(long_ago).unwrap();
    let excludes = vec!["home/left out".to_owned(), "*.tmp".to_owned()];
    let source = BackupSource { excludes, ..subject.source(project, now, None) };
    let backup = subject.back_up(&source).await;
    let root = TreePath::root();
    let diff = async |directory: &TreePath, after: Option<&TreePath>, max| {
        subject.backups.diff(project, &backup.id, now, directory, after, max).await
    };
    assert_eq!(diff(&root, None, 10).await.unwrap(), Changes::default(), "nothing has changed");

    fs::write(home.join("left out/more"), "more").unwrap();
    fs::write(home.join("a.tmp"), "not backed up").unwrap();
    edit(now, 16);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(home.join(".hidden"), mode).unwrap();
    rustix::fs::lsetxattr(home.join("many/1"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    fs::remove_file(home.join("link")).unwrap();
    std::os::unix::fs::symlink("elsewhere", home.join("link")).unwrap();
    use ChangeKind::{Added, Metadata, Modified, Removed};
    let expected = [
        ("home/.hidden", Metadata),
        ("home/deep", Removed),
        ("home/large.bin", Modified),
        ("home/link", Modified),
        ("home/many/1", Metadata),
        ("home/many/5", Removed),
        ("home/many/6", Modified),
        ("home/many/7", Modified),
        ("home/many/8", Modified),
        ("home/many/9", Metadata),
        ("home/new", Added),
        ("home/notes.txt", Modified),
        ("system/linked", Modified),
        ("system/moved", Added),
    ];
    let told = |changes: &[Change]| -> Vec<(String, ChangeKind)> {
        changes.iter().map(|change| (change.path.to_string(), change.kind)).collect()
    };
    let whole = diff(&root, None, 1000).await.unwrap();
    let wanted: Vec<_> = expected.iter().map(|(path, kind)| ((*path).to_owned(), *kind)).collect();
    assert_eq!(told(&whole.changes), wanted, "what was changed is told");
    assert!(!whole.more);
    let new = whole.changes.iter().find(|change| change.path == path("home/new")).unwrap();
    assert_eq!((new.node, new.bytes), (NodeKind::File, 100_000));

    // Pages make the whole, whatever their size; a directory shows its own.
    for size in [1, 3, 13, 14] {
        let mut paged: Vec<Change> = Vec::new();
        loop {
            let page = diff(&root, paged.last().map(|change| &change.path), size).await.unwrap();
            assert!(page.changes.len() <= size && (!page.more || page.changes.len() == size));
            paged.extend(page.changes);
            if !page.more {
                break;
            }
        }
        assert_eq!(paged, whole.changes, "pages of {size} make the whole");
    }
    let many = diff(&path("home/many"), None, 100).await.unwrap();
    assert_eq!(told(&many.changes), wanted[4..10]);
    let gone = diff(&path("home/deep"), None, 2).await.unwrap();
    assert!(gone.changes.iter().all(|change| change.kind == Removed) && !gone.changes.is_empty());
    let missing = diff(&path("home/nowhere"), None, 2).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    let missing = subject.backups.diff(project, &"ab".repeat(32), now, &root, None, 2).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
}

pub(super) async fn isolation(subject: &Subject<'_>) {
    let (one, other, tree) = (ProjectId::random(), ProjectId::random(), subject.planted(8));
    let of_one = subject.back_up(&subject.source(one, tree.path(), None)).await;
    let of_other = subject.back_up(&subject.source(other, tree.path(), None)).await;
    subject.backups.forget(other, std::slice::from_ref(&of_one.id)).await.unwrap();
    assert_eq!(subject.listed(one).await, std::slice::from_ref(&of_one));
    let target = subject.directory();
    let refused = subject.backups.restore(other, &of_one.id, &TreePath::root(), target.path(), &|_| ()).await;
    assert!(matches!(refused, Err(Error::NotFound { .. })), "{refused:?}");
    subject.backups.erase(other).await.unwrap();
    assert_eq!(subject.listed(other).await, []);
    assert_ne!(of_one.id, of_other.id);
    subject.assert_restores(&of_one, &facts(tree.path())).await;
}

pub(super) async fn refusals(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(9));
    let backup = subject.back_up(&subject.source(project, tree.path(), None)).await;
    let occupied = subject.directory();
    fs::write(occupied.path().join("precious"), "precious").unwrap();
    let absent = PathBuf::from("/nonexistent/target");
    let linked = subject.directory();
    let empty = subject.directory();
    std::os::unix::fs::symlink(empty.path(), linked.path().join("link")).unwrap();
    for target in [occupied.path(), &absent, &linked.path().join("link")] {
        let refused = subject.backups.restore(project, &backup.id, &TreePath::root(), target, &|_| ()).await;
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{}: {refused:?}", target.display());
    }
    assert_eq!(fs::read_dir(occupied.path()).unwrap().count(), 1);
    let refused = subject.backups.back_up(&subject.source(project, &absent, None), &|_| ()).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    // A parent that is gone is no reason not to back up.
    let gone = Backup { id: "ab".repeat(32), ..backup };
    subject.back_up(&subject.source(project, tree.path(), Some(&gone))).await;
}

pub(super) async fn together(subject: &Subject<'_>) {
    // The first of a project, so that they also meet in making the repository.
    let project = ProjectId::random();
    let trees: Vec<_> = (0..3).map(|seed| subject.planted(20 + seed % 2)).collect();
    let sources: Vec<_> = trees.iter().map(|tree| subject.source(project, tree.path(), None)).collect();
    let made = join_all(sources.iter().map(|source| subject.back_up(source))).await;
    assert_eq!(subject.listed(project).await.len(), trees.len());
    for (backup, tree) in made.iter().zip(&trees) {
        subject.assert_restores(backup, &facts(tree.path())).await;
    }
}

pub(super) async fn forgetting(subject: &Subject<'_>) {
    let at_once = PruneOptions { grace: Duration::ZERO };
    let (project, tree) = (ProjectId::random(), subject.planted(10));
    assert_eq!(subject.backups.prune(project, &at_once).await.unwrap().freed_bytes, 0);
    let first = subject.back_up(&subject.source(project, tree.path(), None)).await;
    fs::write(tree.path().join("home/large.bin"), vec![7; 100]).unwrap();
    let as_was = facts(tree.path());
    let second = subject.back_up(&subject.source(project, tree.path(), Some(&first))).await;
    subject.backups.forget(project, std::slice::from_ref(&first.id)).await.unwrap();
    subject.backups.forget(project, std::slice::from_ref(&first.id)).await.unwrap();
    assert_eq!(subject.listed(project).await, std::slice::from_ref(&second));
    // Nothing goes before its time.
    let marked = subject.backups.prune(project, &PruneOptions::default()).await.unwrap();
    assert_eq!(marked.freed_bytes, 0);
    let marked_bytes = subject.backups.prune(project, &PruneOptions::default()).await.unwrap().marked_bytes;
    let mut freed = 0;
    for _ in 0..3 {
        freed += subject.backups.prune(project, &at_once).await.unwrap().freed_bytes;
    }
    assert!(freed >= 3 << 20, "{freed} bytes came back, {marked_bytes} were marked");
    subject.assert_restores(&second, &as_was).await;
    let checked =
        subject.backups.check(project, &CheckOptions { read_data: true, ..Default::default() }).await;
    assert!(checked.unwrap().is_sound());
}

pub(super) async fn pruned_while_backing_up(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(11));
    let first = subject.back_up(&subject.source(project, tree.path(), None)).await;
    subject.backups.forget(project, &[first.id]).await.unwrap();
    let as_was = facts(tree.path());
    let source = subject.source(project, tree.path(), None);
    // What the first one stored is being marked while the second counts on it.
    let prunes = async {
        for _ in 0..2 {
            subject.backups.prune(project, &PruneOptions::default()).await.unwrap();
        }
    };
    let (second, ()) = tokio::join!(subject.back_up(&source), prunes);
    subject.backups.prune(project, &PruneOptions::default()).await.unwrap();
    subject.assert_restores(&second, &as_was).await;
}

pub(super) async fn cancelled(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(12));
    let source = subject.source(project, tree.path(), None);
    for millis in [0, 5, 50, 150] {
        let cut =
            tokio::time::timeout(Duration::from_millis(millis), subject.backups.back_up(&source, &|_| ()));
        let listed = match cut.await {
            Ok(done) => vec![done.unwrap()],
            Err(_) => Vec::new(),
        };
        let there = subject.listed(project).await;
        // The last step may have been taken, unheard.
        assert!(there.len() <= 1 && listed.iter().all(|backup| there.contains(backup)));
        for backup in there {
            subject.assert_restores(&backup, &facts(tree.path())).await;
            subject.backups.forget(project, &[backup.id]).await.unwrap();
        }
    }
    let backup = subject.back_up(&source).await;
    subject.assert_restores(&backup, &facts(tree.path())).await;
}

pub(super) async fn erased(subject: &Subject<'_>) {
    let (project, tree) = (ProjectId::random(), subject.planted(13));
    subject.back_up(&subject.source(project, tree.path(), None)).await;
    let erased = subject.backups.erase(project).await.unwrap();
    // Where others share the repository, a prune has still to free them.
    assert!(erased.objects > 0 && erased.freed_bytes + erased.marked_bytes > 3 << 20, "{erased:?}");
    assert_eq!(subject.listed(project).await, []);
    assert_eq!(subject.backups.erase(project).await.unwrap(), Erased::default());
    // The project may begin anew.
    let backup = subject.back_up(&subject.source(project, tree.path(), None)).await;
    subject.assert_restores(&backup, &facts(tree.path())).await;
}
