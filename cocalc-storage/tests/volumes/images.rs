//! Images: what may be in one, what it is called, and its way to another host.

use std::{
    fs,
    io::Cursor,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::{Duration, Instant},
};

use cocalc_core::ids::ImageDigest;
use cocalc_storage::{Btrfs, ImageError, ImageHeader, ImageLimits};
use tokio::io::AsyncReadExt as _;

use crate::stores;

/// A tar archive, written block by block, so that it can be a hostile one.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(mut self, name: &str, kind: u8, link: &str, content: &[u8]) -> Self {
        self.header(name, kind, link, content.len() as u64, 0);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(name, b'0', "", content.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.add(name, b'5', "", b"")
    }

    fn symlink(self, name: &str, to: &str) -> Self {
        self.add(name, b'2', to, b"")
    }

    fn header(&mut self, name: &str, kind: u8, link: &str, length: u64, owner: u32) {
        let mut block = [0_u8; 512];
        let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, if kind == b'5' { "0000755\0" } else { "0000644\0" });
        put(108, &format!("{owner:07o}\0"));
        put(116, &format!("{owner:07o}\0"));
        put(124, &format!("{length:011o}\0"));
        put(136, "14000000000\0");
        put(148, "        ");
        put(157, link);
        put(257, "ustar\x0000");
        put(329, "0000001\0");
        put(337, "0000003\0");
        block[156] = kind;
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(block);
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn plain() -> Archive {
    Archive::default().directory("./").directory("./bin").file("./bin/sh", "#!/bin/true").directory("./etc")
}

async fn import(store: &Btrfs, archive: Vec<u8>, limits: &ImageLimits) -> Result<ImageDigest, ImageError> {
    store.import_image(Box::pin(Cursor::new(archive)), limits).await
}

async fn nothing_staged(store: &Btrfs) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while fs::read_dir(store.path().join("staging")).unwrap().count() > 0 {
        assert!(Instant::now() < deadline, "something is left in staging");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_archive_writes_nothing_outside_and_makes_no_device() {
    let one = stores::one().await;
    let (store, limits) = (&one.store, ImageLimits::default());
    let outside = one.root.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "the host's").unwrap();
    let before = fs::metadata(outside.join("secret")).unwrap();
    let out = outside.to_str().unwrap();
    let up = format!("{}{}", "../".repeat(24), out.trim_start_matches('/'));
    let attacks = [
        ("an absolute path", plain().file(&format!("{out}/made"), "x")),
        ("a path upwards", plain().file(&format!("{up}/made"), "x")),
        ("an absolute link, then through it", plain().symlink("./l", out).file("./l/made", "x")),
        ("a link upwards, then through it", plain().symlink("./l", &up).file("./l/made", "x")),
        ("a link in two steps", plain().symlink("./a", ".").symlink("./a/b", &up).file("./b/made", "x")),
        (
            "a hard link to the host's file",
            plain().add("./h", b'1', &format!("{out}/secret"), b"").file("./h", "x"),
        ),
        ("a hard link upwards", plain().add("./h", b'1', &format!("{up}/secret"), b"").file("./h", "x")),
        (
            "a hard link through a link",
            plain().symlink("./l", out).add("./h", b'1', "./l/secret", b"").file("./h", "x"),
        ),
        ("a device", plain().add("./disk", b'4', "", b"").add("./null", b'3', "", b"")),
        ("a link over a directory", plain().directory("./d").symlink("./d", out).file("./d/made", "x")),
    ];
    for (attack, archive) in attacks {
        // Refused, or harmless.
        match import(store, archive.end(), &limits).await {
            Err(ImageError::BadArchive { .. }) => {}
            Err(error) => panic!("{attack}: {error:?}"),
            Ok(digest) => {
                let root = store.image_path(&digest).await.unwrap();
                for found in walk(&root) {
                    let kind = fs::symlink_metadata(&found).unwrap();
                    assert!(!kind.file_type().is_char_device(), "{attack}: {}", found.display());
                    assert!(!kind.file_type().is_block_device(), "{attack}: {}", found.display());
                    assert_ne!((kind.dev(), kind.ino()), (before.dev(), before.ino()), "{attack}");
                }
            }
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{attack} wrote outside");
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "the host's", "{attack}");
        assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1, "{attack}");
    }
    nothing_staged(store).await;
}

fn walk(root: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_much_for_an_image_is_refused_with_the_reason() {
    let one = stores::one().await;
    let store = &one.store;
    let refused =
        async |archive: Vec<u8>, limits: ImageLimits, what: &str| match import(store, archive, &limits).await
        {
            Err(ImageError::BadArchive { reason }) => assert!(reason.contains(what), "{reason}"),
            other => panic!("{what}: {other:?}"),
        };
    let limits = ImageLimits { bytes: 1 << 20, names: 100, ..ImageLimits::default() };
    refused(plain().add("./big", b'0', "", &vec![1; 2 << 20]).end(), limits, "larger than").await;
    let many = (0..200).fold(plain(), |archive, number| archive.file(&format!("./f{number}"), "x"));
    refused(many.end(), limits, "at most 100 names").await;
    let mut owned = plain();
    owned.header("./theirs", b'0', "", 0, 70_000);
    refused(owned.end(), limits, "70000").await;
    // Far more than the archive: a file of a terabyte that is one hole.
    let tree = one.root.path().join("bomb");
    fs::create_dir(&tree).unwrap();
    fs::File::create(tree.join("hole")).unwrap().set_len(1 << 40).unwrap();
    let mut tar = std::process::Command::new("tar");
    tar.args(["--create", "--sparse", "--format=pax", "--file=-", "--directory"]).arg(&tree).arg(".");
    let bomb = tar.output().unwrap();
    assert!(bomb.status.success() && bomb.stdout.len() < 1 << 20);
    refused(bomb.stdout, limits, "larger than").await;
    for (magic, what) in
        [(&b"\x1f\x8b\x08"[..], "gzip -d"), (b"\x28\xb5\x2f\xfd", "zstd -d"), (b"\xfd7zXZ", "xz -d")]
    {
        refused([magic, &[0; 4096]].concat(), limits, what).await;
    }
    // A volume that is as good as full takes none.
    let full = ImageLimits { free_bytes: u64::MAX, ..limits };
    assert!(matches!(import(store, plain().end(), &full).await, Err(ImageError::NoSpace)));
    assert!(store.images().await.unwrap().is_empty());
    nothing_staged(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_digest_is_of_the_tree_and_of_all_of_it() {
    let one = stores::one().await;
    let (store, limits) = (&one.store, ImageLimits::default());
    let base = || plain().file("./etc/a", "one").symlink("./etc/l", "a");
    let digest = import(store, base().end(), &limits).await.unwrap();
    // Another archive of the same tree, with a device, which is left out.
    let again = base().directory("./dev").end();
    let with_dev = import(store, again, &limits).await.unwrap();
    let device = base().directory("./dev").add("./dev/null", b'3', "", b"").end();
    assert_eq!(import(store, device, &limits).await.unwrap(), with_dev);
    assert_ne!(with_dev, digest);
    let padded = [base().end(), vec![0; 8192]].concat();
    assert_eq!(import(store, padded, &limits).await.unwrap(), digest);
    let mut seen = vec![digest];
    let mut other = plain();
    other.header("./etc/a", b'0', "", 3, 7);
    other.0.extend(b"one");
    other.0.resize(other.0.len().next_multiple_of(512), 0);
    for changed in [
        plain().file("./etc/a", "two").symlink("./etc/l", "a"),
        plain().file("./etc/b", "one").symlink("./etc/l", "a"),
        plain().file("./etc/a", "one").symlink("./etc/l", "b"),
        plain().file("./etc/a", "one").file("./etc/l", "a"),
        other.symlink("./etc/l", "a"),
    ] {
        let digest = import(store, changed.end(), &limits).await.unwrap();
        assert!(!seen.contains(&digest));
        seen.push(digest);
    }
    let record = |images: Vec<(ImageDigest, cocalc_storage::ImageRecord)>| {
        images.into_iter().find(|(known, _)| *known == digest).unwrap().1
    };
    assert_eq!(record(store.images().await.unwrap()).sources.len(), 2, "both archives are noted");
    store
        .note_image(&digest, |record| {
            record.names.insert("debian:12".into());
        })
        .await
        .unwrap();
    assert!(record(store.images().await.unwrap()).names.contains("debian:12"));

    store.remove_image(&digest).await.unwrap();
    store.remove_image(&digest).await.expect("it can be repeated");
    assert!(matches!(store.image_path(&digest).await, Err(ImageError::NotFound { .. })));
    assert!(store.note_image(&digest, |_| ()).await.is_err());
    assert!(!store.path().join("images").join(format!("{digest}.json")).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_travels_and_only_the_one_that_was_named_is_taken() {
    let (a, b) = (stores::one().await, stores::one().await);
    let limits = ImageLimits::default();
    let archive = plain().file("./etc/a", "one").symlink("./etc/l", "/nowhere").add("./pipe", b'6', "", b"");
    let digest = import(&a.store, archive.end(), &limits).await.unwrap();
    a.store
        .note_image(&digest, |record| {
            record.names.insert("mine".into());
            record.pinned = true;
        })
        .await
        .unwrap();
    let other = import(&a.store, plain().file("./etc/a", "evil").end(), &limits).await.unwrap();
    let sent = async |store: &Btrfs, digest: &ImageDigest| -> (ImageHeader, Vec<u8>) {
        let mut stream = store.send_image(digest, u32::MAX).await.unwrap();
        let mut bytes = Vec::new();
        stream.reader.read_to_end(&mut bytes).await.unwrap();
        (stream.header, bytes)
    };
    let (header, bytes) = sent(&a.store, &digest).await;
    let (evil, evil_bytes) = sent(&a.store, &other).await;
    let receive = async |header: &ImageHeader, bytes: &[u8]| {
        b.store.receive_image(header, Box::pin(Cursor::new(bytes.to_vec())), &limits).await
    };
    // Another image under the name of the wanted one: its stream, or its header.
    assert!(matches!(receive(&header, &evil_bytes).await, Err(ImageError::BadArchive { .. })));
    let lie = ImageHeader { digest, ..evil };
    let refused = receive(&lie, &evil_bytes).await;
    assert!(refused.is_err(), "{refused:?}");
    for length in [0, 20, bytes.len() / 2, bytes.len() - 1] {
        assert!(receive(&header, &bytes[..length]).await.is_err(), "cut at {length}");
    }
    let mut flipped = bytes.clone();
    let middle = bytes.len() / 2;
    flipped[middle] ^= 1;
    assert!(receive(&header, &flipped).await.is_err());
    let small = ImageLimits { bytes: 4, ..limits };
    assert!(b.store.receive_image(&header, Box::pin(Cursor::new(bytes.clone())), &small).await.is_err());
    assert!(b.store.images().await.unwrap().is_empty());

    assert_eq!(receive(&header, &bytes).await.unwrap(), digest);
    assert_eq!(receive(&header, b"").await.unwrap(), digest, "what is here is not read again");
    let (_, record) = b.store.images().await.unwrap().remove(0);
    assert!(record.names.contains("mine") && !record.pinned, "a pin is of one host: {record:?}");
    assert!(record.imported.is_some());
    // And on, from there.
    let (onward, onward_bytes) = sent(&b.store, &digest).await;
    a.store.remove_image(&digest).await.unwrap();
    let back = a.store.receive_image(&onward, Box::pin(Cursor::new(onward_bytes)), &limits).await.unwrap();
    assert_eq!(back, digest);
    let path = a.store.image_path(&digest).await.unwrap();
    assert_eq!(fs::read_to_string(path.join("etc/a")).unwrap(), "one");
    assert!(fs::write(path.join("f"), "x").is_err(), "an image is read-only");
    assert!(a.store.send_image(&ImageDigest::from_bytes([9; 32]), 1).await.is_err());
    nothing_staged(&b.store).await;
}

/// Bytes that come without end, and how many have.
struct Endless {
    start: Cursor<Vec<u8>>,
    came: u64,
}

impl tokio::io::AsyncRead for Endless {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let _ = std::pin::Pin::new(&mut self.start).poll_read(cx, buf);
        if buf.filled().len() == before {
            buf.initialize_unfilled().fill(0x5a);
            buf.advance(buf.remaining());
        }
        self.came += (buf.filled().len() - before) as u64;
        std::task::Poll::Ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_an_image_comes_some_space_stays_free_whatever_is_said_of_its_size() {
    const MIB: u64 = 1 << 20;
    let root = tempfile::tempdir().unwrap();
    let (small, large) =
        (stores::volume(root.path(), "s", 512 * MIB), stores::volume(root.path(), "l", 1 << 30));
    for volume in [&small, &large] {
        Btrfs::initialize(volume.path()).unwrap();
    }
    let (store, other) = (Btrfs::open(small.path()).await.unwrap(), Btrfs::open(large.path()).await.unwrap());
    let empty = store.free_bytes().unwrap();
    let limits = ImageLimits { free_bytes: empty - 160 * MIB, ..ImageLimits::default() };
    let given_back = async || {
        nothing_staged(&store).await;
        let deadline = Instant::now() + Duration::from_secs(60);
        while store.free_bytes().unwrap() + 16 * MIB < empty {
            assert!(Instant::now() < deadline, "{} of {empty}", store.free_bytes().unwrap());
            // Has the kernel give back what was deleted sooner than by itself.
            let sync =
                std::process::Command::new("btrfs").args(["filesystem", "sync"]).arg(small.path()).output();
            assert!(sync.unwrap().status.success());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(store.images().await.unwrap().is_empty());
    };

    // An archive with a file that does not end.
    let mut archive = plain();
    archive.header("./big", b'0', "", 7 << 30, 0);
    let (reader, mut writer) = tokio::io::duplex(1 << 16);
    let feed = tokio::spawn(async move {
        let mut endless = Endless { start: Cursor::new(archive.0), came: 0 };
        // Until nobody reads it any more.
        let _ = tokio::io::copy(&mut endless, &mut writer).await;
        endless.came
    });
    let refused = store.import_image(Box::pin(reader), &limits).await;
    assert!(matches!(refused, Err(ImageError::NoSpace)), "{refused:?}");
    let came = feed.await.unwrap();
    assert!((64 * MIB..260 * MIB).contains(&came), "{} MiB came", came / MIB);
    given_back().await;

    // Another host's, which says that it is small.
    let mut archive = plain();
    archive = archive.add("./big", b'0', "", &vec![0x5a; 300 << 20]);
    let digest = import(&other, archive.end(), &ImageLimits::default()).await.unwrap();
    let mut sent = other.send_image(&digest, 2).await.unwrap();
    let refused = store.receive_image(&sent.header, sent.reader, &limits).await;
    assert!(matches!(refused, Err(ImageError::NoSpace)), "it says its size: {refused:?}");
    sent = other.send_image(&digest, 2).await.unwrap();
    let lies = ImageHeader {
        record: cocalc_storage::ImageRecord { bytes: 0, ..sent.header.record.clone() },
        ..sent.header.clone()
    };
    let refused = store.receive_image(&lies, sent.reader, &limits).await;
    assert!(matches!(refused, Err(ImageError::NoSpace)), "{refused:?}");
    given_back().await;

    // A file of an archive that cannot fit is not begun with.
    let file = root.path().join("image.tar");
    fs::write(&file, plain().add("./big", b'0', "", &vec![0x5a; 200 << 20]).end()).unwrap();
    let refused = store.import_image_file(&file, &limits).await;
    assert!(matches!(refused, Err(ImageError::NoSpace)), "{refused:?}");
    let less = ImageLimits { free_bytes: 16 * MIB, ..limits };
    assert_eq!(store.import_image_file(&file, &less).await.unwrap(), store.images().await.unwrap()[0].0);
    let sent = other.send_image(&digest, 2).await.unwrap();
    let refused = store.receive_image(&sent.header, sent.reader, &less).await;
    assert!(matches!(refused, Err(ImageError::NoSpace)), "there is no room for two: {refused:?}");
}
