//! What streams between Btrfs volumes carry, what they say of what they do
//! not carry, and how they end. Needs root, loop devices, e2fsprogs and
//! btrfs-progs.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, VolumeUuid},
    storage::{CloneOptions, Error, SendHeader, SendOptions, Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, StreamGuard, loopback::Loopback};
use tokio::io::AsyncReadExt as _;

/// Two stores on one file system of their own, which goes with it.
struct Fixture {
    a: Btrfs,
    b: Btrfs,
    project: ProjectId,
    live: PathBuf,
    _volumes: [Loopback; 2],
    _root: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let root = tempfile::tempdir().unwrap();
    let volume = |name: &str| {
        let made =
            Loopback::create(&root.path().join(format!("{name}.img")), 512 << 20, &root.path().join(name));
        made.unwrap_or_else(|error| {
            panic!("needs root, mkfs.btrfs and loop devices: {}", cocalc_core::chain(&error))
        })
    };
    let volumes = [volume("a"), volume("b")];
    let open = async |volume: &Loopback| {
        Btrfs::initialize(volume.path()).unwrap();
        Btrfs::open(volume.path()).await.unwrap()
    };
    let (a, b) = (open(&volumes[0]).await, open(&volumes[1]).await);
    let project = ProjectId::random();
    let live = a.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    Fixture { a, b, project, live, _volumes: volumes, _root: root }
}

impl Fixture {
    async fn snapshot(&self, name: &str) {
        self.a.snapshot(self.project, &named(name)).await.unwrap();
    }

    async fn stream(&self, name: &str, options: &SendOptions) -> (SendHeader, Vec<u8>) {
        let mut sent = self.a.send(self.project, &named(name), options).await.unwrap();
        let mut bytes = Vec::new();
        sent.reader.read_to_end(&mut bytes).await.unwrap();
        (sent.header, bytes)
    }

    async fn receive(&self, header: &SendHeader, bytes: Vec<u8>) -> Result<(), Error> {
        self.b.receive(header, Box::pin(Cursor::new(bytes))).await.map(drop)
    }

    async fn same(&self, name: &str) {
        let at = async |store: &Btrfs| {
            common::manifest(&store.snapshot_path(self.project, &named(name)).await.unwrap())
        };
        assert_eq!(at(&self.b).await, at(&self.a).await, "{name}");
    }
}

fn named(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}");
}

fn compressed(base: Option<&str>) -> SendOptions {
    SendOptions { base: base.map(named), version_max: 2, ..SendOptions::default() }
}

/// Text that compresses well, and no two parts of it alike.
fn text(size: usize) -> Vec<u8> {
    (0u64..)
        .flat_map(|n| format!("line {n} of many lines that are nearly the same\n").into_bytes())
        .take(size)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_compressed_on_the_disk_travels_so() {
    let f = fixture().await;
    assert_eq!(f.a.capabilities().stream_version, 2, "needs Linux 6.0");
    for (directory, how) in [("zstd", "zstd"), ("lzo", "lzo"), ("zlib", "zlib")] {
        let directory = f.live.join("home").join(directory);
        fs::create_dir(&directory).unwrap();
        rustix::fs::setxattr(
            &directory,
            "btrfs.compression",
            how.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
        fs::write(directory.join("text"), text(5_000_000)).unwrap();
    }
    common::plant(&f.live);
    f.snapshot("one").await;
    let (_, plain) = f.stream("one", &SendOptions::whole()).await;
    let (header, small) = f.stream("one", &compressed(None)).await;
    assert_eq!((plain[13], small[13]), (1, 2), "the versions of the streams");
    assert!(plain.len() > 15_000_000 && small.len() < plain.len() / 3, "{} {}", plain.len(), small.len());
    f.receive(&header, small.clone()).await.unwrap();
    f.same("one").await;

    fs::write(f.live.join("home/zstd/more"), text(3_000_000)).unwrap();
    fs::remove_file(f.live.join("home/lzo/text")).unwrap();
    f.snapshot("two").await;
    let (header, delta) = f.stream("two", &compressed(Some("one"))).await;
    assert!(delta.len() < 1_000_000, "{}", delta.len());
    f.receive(&header, delta).await.unwrap();
    f.same("two").await;

    // Cut, flipped and stretched: as strict as with the first version.
    let mut header = header;
    header.base = None;
    let whole = f.stream("two", &compressed(None)).await.1;
    for at in [20, 1000, whole.len() / 2, whole.len() - 1] {
        assert!(guarded(&header, &whole[..at]).is_err(), "cut at {at}");
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        assert!(guarded(&header, &flipped).is_err(), "flipped at {at}");
    }
    assert_eq!(guarded(&header, &whole).unwrap(), whole);
    let mut encoded = 0;
    for (attribute, value) in
        [(28u16, u64::MAX), (28, (128 << 10) + 1), (27, 1 << 40), (29, 1 << 20), (30, 8), (31, 1)]
    {
        let crafted = craft(&whole, |command, body| {
            encoded += u32::from(command == 25);
            command == 25 && set_attribute(body, attribute, value)
        });
        assert_ne!(crafted, whole, "{attribute}");
        assert!(guarded(&header, &crafted).is_err(), "attribute {attribute} of {value}");
    }
    assert!(encoded > 0, "there are encoded writes");
}

fn guarded(header: &SendHeader, bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut guard =
        StreamGuard::new(&header.name, header.origin, header.base.as_ref().map(|(_, origin)| *origin));
    let mut safe = Vec::new();
    for piece in bytes.chunks(70_001) {
        guard.push(piece, &mut safe).map_err(|refused| refused.to_string())?;
    }
    guard.finish().map_err(|refused| refused.to_string())?;
    Ok(safe)
}

/// Edits commands in place, and gives those that `edit` changes a right
/// checksum.
fn craft(bytes: &[u8], mut edit: impl FnMut(u16, &mut [u8]) -> bool) -> Vec<u8> {
    let mut crafted = bytes.to_vec();
    let mut at = 17;
    while at + 10 <= crafted.len() {
        let length = u32::from_le_bytes(crafted[at..at + 4].try_into().unwrap()) as usize;
        let command = u16::from_le_bytes(crafted[at + 4..at + 6].try_into().unwrap());
        let end = at + 10 + length;
        if edit(command, &mut crafted[at + 10..end]) {
            crafted[at + 6..at + 10].fill(0);
            let sum = !crc32c::crc32c_append(!0, &crafted[at..end]);
            crafted[at + 6..at + 10].copy_from_slice(&sum.to_le_bytes());
        }
        at = end;
    }
    crafted
}

/// Sets a number among the attributes before the data.
fn set_attribute(body: &mut [u8], wanted: u16, value: u64) -> bool {
    let mut at = 0;
    while at + 4 <= body.len() {
        let kind = u16::from_le_bytes([body[at], body[at + 1]]);
        if kind == 19 {
            return false;
        }
        let length = usize::from(u16::from_le_bytes([body[at + 2], body[at + 3]]));
        if kind == wanted {
            body[at + 4..at + 4 + length].copy_from_slice(&value.to_le_bytes()[..length]);
            return true;
        }
        at += 4 + length;
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_leaves_out_is_said_and_its_length_estimated() {
    let f = fixture().await;
    common::plant(&f.live);
    f.snapshot("plain").await;
    let (header, bytes) = f.stream("plain", &SendOptions::whole()).await;
    assert_eq!(header.left_out, Vec::<String>::new(), "nothing is left out of what is planted");
    near(&header, &bytes);

    let home = f.live.join("home");
    for number in 0..5 {
        let path = home.join(format!("reserved {number}"));
        fs::write(&path, "x").unwrap();
        run("fallocate", &["--keep-size", "--length", "1M"], &path);
    }
    fs::create_dir(home.join("database")).unwrap();
    run("chattr", &["+C"], &home.join("database"));
    fs::write(home.join("fixed"), "x").unwrap();
    run("chattr", &["+i"], &home.join("fixed"));
    fs::write(home.join("big"), vec![7; 20 << 20]).unwrap();
    f.snapshot("flags").await;
    run("chattr", &["-i"], &home.join("fixed"));
    let (header, bytes) = f.stream("flags", &SendOptions::since(Some(&named("plain")))).await;
    near(&header, &bytes);
    assert!(header.extra.len() <= 4096);
    let said = header.left_out.join("\n");
    assert_eq!(header.left_out.len(), 3, "{said}");
    assert!(said.contains("5 files or directories with space reserved"), "{said}");
    assert!(said.contains("\"home/reserved 0\"") && said.contains(", …"), "{said}");
    assert!(said.contains("chattr +C") && said.contains("\"home/database\""), "{said}");
    assert!(said.contains("chattr +i") && said.contains("\"home/fixed\""), "{said}");
    let (whole, _) = f.stream("flags", &SendOptions::whole()).await;
    assert_eq!(whole.left_out, header.left_out, "of the whole the same");

    // What was there before is not said again of a delta.
    run("chattr", &["-C"], &home.join("database"));
    fs::write(home.join("small"), "y").unwrap();
    f.snapshot("later").await;
    let (header, bytes) = f.stream("later", &SendOptions::since(Some(&named("flags")))).await;
    near(&header, &bytes);
    assert!(!header.left_out.join("\n").contains("chattr"), "{:?}", header.left_out);
}

/// The estimate is near enough for a progress bar.
fn near(header: &SendHeader, bytes: &[u8]) {
    let (said, is) = (header.estimated_bytes, bytes.len() as u64);
    assert!(said <= is * 3 / 2 + 100_000 && is <= said * 3 / 2 + 100_000, "estimated {said}, sent {is}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_may_refer_to_further_snapshots_that_the_receiver_has() {
    let f = fixture().await;
    fs::write(f.live.join("home/old"), text(6_000_000)).unwrap();
    f.snapshot("source").await;
    let (header, bytes) = f.stream("source", &SendOptions::whole()).await;
    f.receive(&header, bytes).await.unwrap();
    fs::remove_file(f.live.join("home/old")).unwrap();
    f.snapshot("base").await;
    let (header, bytes) = f.stream("base", &SendOptions::since(Some(&named("source")))).await;
    f.receive(&header, bytes).await.unwrap();

    // Back from the older snapshot, which the base has not.
    let old = f.a.snapshot_path(f.project, &named("source")).await.unwrap().join("home/old");
    let status = Command::new("cp").arg("--reflink=always").arg(&old).arg(f.live.join("home/back")).status();
    assert!(status.unwrap().success());
    f.snapshot("next").await;
    let without = f.stream("next", &SendOptions::since(Some(&named("base")))).await.1;
    let options = SendOptions { base: Some(named("base")), sources: vec![named("source")], version_max: 0 };
    let (header, with) = f.stream("next", &options).await;
    assert!(without.len() > 6_000_000 && with.len() < 100_000, "{} {}", without.len(), with.len());

    // One that the receiver has not, and one that is not announced.
    let mut other = header.clone();
    other.extra =
        other.extra.replace(&f.origin("source").await.to_string(), &VolumeUuid::random().to_string());
    assert_ne!(other.extra, header.extra);
    let refused = f.receive(&other, with.clone()).await;
    assert!(matches!(refused, Err(Error::BadStream { .. })), "{refused:?}");
    assert!(guarded(&header, &with).is_err(), "it clones from what the guard was not told of");
    f.receive(&header, with).await.unwrap();
    f.same("next").await;
}

impl Fixture {
    async fn origin(&self, name: &str) -> VolumeUuid {
        let all = self.a.snapshots(self.project).await.unwrap();
        all.iter().find(|snapshot| snapshot.name == named(name)).unwrap().origin
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_the_same_again_and_keeps_when_its_snapshot_was_taken() {
    let f = fixture().await;
    common::plant(&f.live);
    f.snapshot("one").await;
    fs::write(f.live.join("home/more"), text(100_000)).unwrap();
    f.snapshot("two").await;
    for options in [SendOptions::whole(), SendOptions::since(Some(&named("one"))), compressed(None)] {
        assert_eq!(f.stream("two", &options).await, f.stream("two", &options).await, "{options:?}");
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for (name, base) in [("one", None), ("two", Some("one"))] {
        let (header, bytes) = f.stream(name, &SendOptions::since(base.map(named).as_ref())).await;
        f.receive(&header, bytes).await.unwrap();
    }
    let taken = async |store: &Btrfs| -> Vec<_> {
        let all = store.snapshots(f.project).await.unwrap();
        all.into_iter().map(|snapshot| (snapshot.name, snapshot.origin, snapshot.created)).collect()
    };
    assert_eq!(taken(&f.b).await, taken(&f.a).await);
    // And so it is on the way back, and after the store was opened again.
    let path = f.b.path().to_owned();
    let before = taken(&f.b).await;
    drop(f.b);
    // A call that has been answered may still be letting go of it.
    let mut tries = 0;
    let b = loop {
        match Btrfs::open(&path).await {
            Ok(store) => break store,
            Err(_) if tries < 300 => tries += 1,
            Err(error) => panic!("{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(taken(&b).await, before);
    f.a.delete_snapshot(f.project, &named("two")).await.unwrap();
    let sent = b.send(f.project, &named("two"), &SendOptions::since(Some(&named("one")))).await.unwrap();
    f.a.receive(&sent.header, sent.reader).await.unwrap();
    assert_eq!(taken(&f.a).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_holds_what_it_reads_until_it_is_dropped() {
    let f = fixture().await;
    fs::write(f.live.join("home/old"), vec![1; 8 << 20]).unwrap();
    f.snapshot("base").await;
    fs::write(f.live.join("home/new"), vec![2; 40 << 20]).unwrap();
    f.snapshot("one").await;
    let threads = || {
        let all = fs::read_dir("/proc/self/task").unwrap();
        let names = all.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.trim() == "btrfs-send").count()
    };
    for read in [0, 1, 3 << 20] {
        let options = SendOptions::since(Some(&named("base")));
        let mut sent = f.a.send(f.project, &named("one"), &options).await.unwrap();
        let mut some = vec![0; read];
        sent.reader.read_exact(&mut some).await.unwrap();
        for name in ["one", "base"] {
            let refused = f.a.delete_snapshot(f.project, &named(name)).await;
            assert!(matches!(refused, Err(Error::InUse { .. })), "{name}: {refused:?}");
        }
        drop(sent);
    }
    let deadline = Instant::now() + Duration::from_secs(120);
    for name in ["one", "base"] {
        while let Err(error) = f.a.delete_snapshot(f.project, &named(name)).await {
            assert!(Instant::now() < deadline, "{name} is still held: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    // Those of tests beside this one end too.
    while threads() > 0 {
        assert!(Instant::now() < deadline, "a thread goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let gone = f.a.send(f.project, &named("one"), &SendOptions::whole()).await;
    assert!(matches!(gone, Err(Error::NoSnapshot { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_data_is_refused() {
    let f = fixture().await;
    fs::write(f.live.join("home/file"), vec![1; 100_000]).unwrap();
    f.snapshot("one").await;
    let (header, bytes) = f.stream("one", &SendOptions::whole()).await;
    // A write becomes what a sender says who sends no data.
    let mut crafted = bytes.clone();
    let mut at = 17;
    while at + 10 <= crafted.len() {
        let length = u32::from_le_bytes(crafted[at..at + 4].try_into().unwrap()) as usize;
        let end = at + 10 + length;
        if crafted[at + 4..at + 6] == 15u16.to_le_bytes() {
            crafted[at + 4..at + 6].copy_from_slice(&22u16.to_le_bytes());
            crafted[at + 6..at + 10].fill(0);
            let sum = !crc32c::crc32c_append(!0, &crafted[at..end]);
            crafted[at + 6..at + 10].copy_from_slice(&sum.to_le_bytes());
        }
        at = end;
    }
    assert_ne!(crafted, bytes);
    let refused = f.receive(&header, crafted).await;
    assert!(
        matches!(&refused, Err(Error::BadStream { reason, .. }) if reason.contains("without the data")),
        "{refused:?}"
    );
    f.receive(&header, bytes).await.unwrap();
}

/// How often the kernel has committed the file system that this is on.
fn commits(path: &Path) -> u64 {
    let found = Command::new("findmnt").args(["-n", "-o", "UUID", "--target"]).arg(path).output().unwrap();
    let id = String::from_utf8(found.stdout).unwrap();
    let stats = fs::read_to_string(format!("/sys/fs/btrfs/{}/commit_stats", id.trim())).unwrap();
    let count = stats.lines().find_map(|line| line.strip_prefix("commits ")).unwrap();
    count.parse().unwrap()
}

/// What waits for the disk is what an operation costs. The kernel commits by
/// itself now and then, so the fewest of several counts.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_committed_than_must_be() {
    let f = fixture().await;
    let (here, there) = (f.a.path().to_owned(), f.b.path().to_owned());
    let mut fewest = [u64::MAX; 4];
    let mut base = None;
    for round in 0..4 {
        fs::write(f.live.join("home/file"), vec![round; 100_000]).unwrap();
        let name = format!("s{round}");
        let mut counted = [0; 4];
        let before = commits(&here);
        f.snapshot(&name).await;
        counted[0] = commits(&here) - before;

        let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
        let target = ProjectId::random();
        // The first clone of a project makes its quota group.
        let before = commits(&here);
        f.a.clone_volume(f.project, &named(&name), target, &options).await.unwrap();
        counted[1] = commits(&here) - before;

        let (header, bytes) = f.stream(&name, &SendOptions::since(base.as_ref())).await;
        let before = commits(&there);
        f.receive(&header, bytes).await.unwrap();
        counted[if base.is_some() { 3 } else { 2 }] = commits(&there) - before;
        for (fewest, counted) in fewest.iter_mut().zip(counted).filter(|(_, counted)| *counted > 0) {
            *fewest = counted.min(*fewest);
        }
        base = Some(named(&name));
        if round == 1 {
            // A whole one again.
            f.b.delete(f.project).await.unwrap();
            assert!(f.b.wait_trash_empty(Duration::from_secs(60)).await.unwrap());
            base = None;
        }
    }
    // A snapshot and a clone are one commit of the kernel's; a receive is that
    // of its copy of the base, of what was written, of its mark, and of its snapshot.
    assert_eq!(fewest, [1, 1, 3, 4], "snapshot, clone, whole receive, delta receive");
}

/// What the kernel sends of these it expects to be applied in its own way.
#[tokio::test(flavor = "multi_thread")]
async fn deltas_carry_what_shrank_and_what_changed_hands() {
    let f = fixture().await;
    let home = f.live.join("home");
    btrfs_property(&home);
    for (name, length) in [("large", 100_000), ("inline", 3_000), ("grown", 9_000), ("same", 50_000)] {
        fs::write(home.join(name), "compress me".repeat(length / 11)).unwrap();
    }
    for name in ["set", "plain"] {
        fs::write(home.join(name), name).unwrap();
    }
    let mode = |name: &str, mode: u32| {
        fs::set_permissions(home.join(name), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    mode("set", 0o6755);
    f.snapshot("one").await;
    let (header, bytes) = f.stream("one", &SendOptions::whole()).await;
    f.receive(&header, bytes).await.unwrap();
    f.same("one").await;

    for (name, length) in [("large", 9_000), ("inline", 1_500), ("grown", 90_000), ("same", 50_000)] {
        fs::write(home.join(name), "shorter now".repeat(length / 11)).unwrap();
    }
    for name in ["set", "plain"] {
        std::os::unix::fs::chown(home.join(name), Some(4242), Some(4243)).unwrap();
    }
    mode("set", 0o6755);
    f.snapshot("two").await;
    let options = SendOptions { version_max: 2, ..SendOptions::since(Some(&named("one"))) };
    let (header, bytes) = f.stream("two", &options).await;
    f.receive(&header, bytes).await.unwrap();
    f.same("two").await;
}

/// Lets what is made below a directory be compressed.
fn btrfs_property(directory: &Path) {
    let set =
        Command::new("btrfs").args(["property", "set"]).arg(directory).args(["compression", "zstd"]).status();
    assert!(set.unwrap().success());
}

/// A disk that takes no more than some of what is written to it says so late:
/// what was received then is not there.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_disk_did_not_take_is_not_received() {
    let f = fixture().await;
    for n in 0..40_u64 {
        // Nothing that compresses.
        fs::write(f.live.join(format!("home/{n}")), noise(n, 1 << 20)).unwrap();
    }
    f.snapshot("one").await;
    let (header, bytes) = f.stream("one", &SendOptions::whole()).await;
    let thin = Thin::new();
    Btrfs::initialize(thin.volume().path()).unwrap();
    let store = Btrfs::open(thin.volume().path()).await.unwrap();
    let got = store.receive(&header, Box::pin(Cursor::new(bytes))).await;
    assert!(got.is_err(), "{got:?}");
    // It may have turned read-only by now, which can still be read.
    if let Ok(there) = store.snapshots(f.project).await {
        assert!(there.is_empty(), "{there:?}");
    }
}

/// A volume that believes it has room, on a disk that has less.
struct Thin {
    volume: Option<Loopback>,
    disk: PathBuf,
    _root: tempfile::TempDir,
}

impl Thin {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("disk");
        fs::create_dir(&disk).unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=112m", "thin"]).arg(&disk).status();
        assert!(mount.unwrap().success());
        let mut thin = Self { volume: None, disk, _root: root };
        let at = thin.disk.with_file_name("volume");
        let image = thin.disk.join("image");
        thin.volume = Some(Loopback::create(&image, 512 << 20, &at).unwrap());
        // The file system's own blocks are at the front, and have their place:
        // only what files hold gets none.
        let placed = Command::new("fallocate").args(["-l", "104M"]).arg(&image).status();
        assert!(placed.unwrap().success());
        thin
    }

    fn volume(&self) -> &Loopback {
        self.volume.as_ref().unwrap()
    }
}

impl Drop for Thin {
    fn drop(&mut self) {
        self.volume = None;
        // What is left is told by the test that finds it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.disk).status();
    }
}

/// Bytes that do not repeat.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}
