//! Writing the contents of files.
//!
//! rustic would read twenty packs at once, whatever they become when they are
//! decompressed: more than a gigabyte for ordinary files. Here a bounded part of
//! a pack is read at once, and one blob of it at a time is decompressed. All
//! else of a restore is rustic's.
//!
//! And reading them back. rustic does that with one file after the other, and
//! without a word: half of the time that a restore takes would be silent.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{File, FileTimes, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime},
};

use cocalc_backup::protocol::FailureKind;
use cocalc_core::backups::Phase;
use rustic_core::{
    DataId, Id, IndexedFullStatus, ProgressBars as _, ProgressType, Repository,
    repofile::{BlobType, Node},
};

use sha2::{Digest as _, Sha256};

use crate::{
    backend::Backend,
    failure::Failed,
    restore::{DIFFERENCES_MAX, Nodes},
    said::Bars,
};

/// How much of a pack is read at once.
const WINDOW_BYTES: u32 = 8 << 20;
/// How much between two blobs is read although nobody needs it, to read both at
/// once.
const GAP_BYTES: u32 = 256 << 10;
/// How many parts of packs are worked on at once: enough that a store which is
/// far away is not waited for.
const WORKERS: usize = 8;

/// A blob, and where it goes.
struct Piece {
    blob: DataId,
    length: u32,
    to: Vec<(usize, u64)>,
}

/// Blobs that are read from their pack at once.
struct Window {
    pack: Id,
    offset: u32,
    length: u32,
    pieces: Vec<Piece>,
}

/// What is to be written, by the places of the blobs.
#[derive(Default)]
struct Plan {
    files: Vec<(PathBuf, u64, Option<SystemTime>)>,
    pieces: BTreeMap<(Id, u32), Piece>,
    bytes: u64,
}

impl Plan {
    fn new(opened: &Repository<IndexedFullStatus>, target: &Path, nodes: &Nodes) -> Result<Self, Failed> {
        let mut plan = Self::default();
        let mut linked = HashSet::new();
        for (path, node) in nodes.iter().filter(|(_, node)| node.is_file()) {
            // rustic links the others to the first one.
            if !is_first(&mut linked, node) {
                continue;
            }
            let (file, mut at) = (plan.files.len(), 0);
            for blob in node.content.iter().flatten() {
                let entry = opened.get_index_entry(blob)?;
                let place = entry.location;
                if place.length < 32 {
                    return Err(Failed::new(FailureKind::Damaged, "the index has a blob that cannot be"));
                }
                let piece = Piece { blob: *blob, length: place.length, to: Vec::new() };
                plan.pieces.entry((*entry.pack, place.offset)).or_insert(piece).to.push((file, at));
                at += u64::from(place.data_length());
            }
            plan.bytes += at;
            plan.files.push((target.join(path), at, node.meta.mtime.and_then(time)));
        }
        Ok(plan)
    }

    /// Parts of packs that are read at once, in the order of the files: what is
    /// written one after the other lies so on the disk, too.
    fn windows(pieces: BTreeMap<(Id, u32), Piece>) -> Vec<Window> {
        let mut windows: Vec<Window> = Vec::new();
        for ((pack, offset), piece) in pieces {
            let end = offset.saturating_add(piece.length);
            match windows.last_mut() {
                Some(last)
                    if last.pack == pack
                        && offset <= last.offset.saturating_add(last.length).saturating_add(GAP_BYTES)
                        && end - last.offset <= WINDOW_BYTES =>
                {
                    last.length = last.length.max(end - last.offset);
                    last.pieces.push(piece);
                }
                _ => windows.push(Window { pack, offset, length: piece.length, pieces: vec![piece] }),
            }
        }
        let first = |window: &Window| window.pieces.iter().flat_map(|piece| &piece.to).min().copied();
        windows.sort_by_key(first);
        windows
    }
}

/// Writes the contents of all regular files among `nodes` below `target`, whose
/// directories are there, and sets their times of modification, by which
/// rustic knows that they are done.
pub(crate) fn write(
    opened: &Repository<IndexedFullStatus>,
    backend: &Backend,
    target: &Path,
    nodes: &Nodes,
) -> Result<(), Failed> {
    let Plan { files, pieces, bytes } = Plan::new(opened, target, nodes)?;
    for (path, size, _) in &files {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        // What is never written stays a hole.
        made.and_then(|file| file.set_len(*size)).map_err(|error| unwritten(path, &error))?;
    }
    let bar = Bars(Phase::Restoring).progress(ProgressType::Bytes, "");
    bar.set_length(bytes);
    each(Plan::windows(pieces), |window: Window| {
        let _read = backend.window(&window.pack, window.offset, window.length)?;
        let mut last = None;
        for piece in window.pieces {
            let data = opened.cat_blob(BlobType::Data, piece.blob.to_hex().as_str())?;
            let is_hole = data.iter().all(|byte| *byte == 0);
            for (file, at) in piece.to {
                // What goes to many places is written as often.
                bar.inc(data.len() as u64);
                let Some((path, ..)) = files.get(file).filter(|_| !is_hole) else { continue };
                let opened = match last.take() {
                    Some((of, opened)) if of == file => Ok(opened),
                    _ => open(path),
                };
                let written = opened.and_then(|opened| opened.write_all_at(&data, at).map(|()| opened));
                last = Some((file, written.map_err(|error| unwritten(path, &error))?));
            }
        }
        Ok(())
    })?;
    bar.finish();
    for (path, _, time) in &files {
        let Some(time) = time else { continue };
        let set = open(path).and_then(|file| file.set_times(FileTimes::new().set_modified(*time)));
        set.map_err(|error| unwritten(path, &error))?;
    }
    Ok(())
}

/// Reads the contents of all regular files among `nodes` below `target` back,
/// and compares them with what the backup says: which are not as they were, the
/// first few of them.
pub(crate) fn verify(
    opened: &Repository<IndexedFullStatus>,
    target: &Path,
    nodes: &Nodes,
) -> Result<Vec<String>, Failed> {
    let (mut files, mut linked, mut bytes) = (Vec::new(), HashSet::new(), 0);
    for (path, node) in nodes.iter().filter(|(_, node)| node.is_file()) {
        // The others are the same file, or should be: they are not read again.
        if is_first(&mut linked, node) {
            bytes += node.meta.size;
            files.push((path, node));
        }
    }
    let bar = Bars(Phase::Verifying).progress(ProgressType::Bytes, "");
    bar.set_length(bytes);
    let wrong = Mutex::new(Vec::new());
    each(files, |(path, node)| {
        let mut blobs = Vec::new();
        for blob in node.content.iter().flatten() {
            blobs.push((*blob, u64::from(opened.get_index_entry(blob)?.location.data_length())));
        }
        let words = match reading(&target.join(path)).and_then(|file| is_of(file, &blobs, &|n| bar.inc(n))) {
            Ok(true) => return Ok(()),
            Ok(false) => format!("what is in {} is not what was backed up", path.display()),
            Err(error) => format!("{}: {error}", path.display()),
        };
        let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if wrong.len() < DIFFERENCES_MAX {
            wrong.push(words);
        }
        Ok(())
    })?;
    bar.finish();
    Ok(wrong.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Whether a file consists of these blobs, of these lengths, and nothing else.
/// `seen` hears how much has been read.
fn is_of(mut file: impl io::Read, blobs: &[(DataId, u64)], seen: &dyn Fn(u64)) -> io::Result<bool> {
    let mut buffer = vec![0; 128 << 10];
    for (blob, length) in blobs {
        let (mut hash, mut part) = (Sha256::new(), file.by_ref().take(*length));
        while let read @ 1.. = part.read(&mut buffer)? {
            hash.update(&buffer[..read]);
            seen(read as u64);
        }
        if part.limit() > 0 || Id::new(hash.finalize().into()) != **blob {
            return Ok(false);
        }
    }
    Ok(file.read(&mut buffer)? == 0)
}

/// Does `work` with each of the items, some at once, until one fails.
fn each<T: Send>(
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    work: impl Fn(T) -> Result<(), Failed> + Sync,
) -> Result<(), Failed> {
    let items = Mutex::new(items.into_iter());
    let failed = AtomicBool::new(false);
    let until_one_fails = || -> Result<(), Failed> {
        while !failed.load(Ordering::Acquire) {
            let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(item) = next else { break };
            work(item).inspect_err(|_| failed.store(true, Ordering::Release))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(until_one_fails)).collect();
        // All of them are waited for.
        let mut ended = Ok(());
        for worker in workers {
            let one =
                worker.join().unwrap_or_else(|_| Err(Failed::new(FailureKind::Other, "a worker panicked")));
            ended = ended.and(one);
        }
        ended
    })
}

/// Whether a file is the first of those that are one file; as rustic decides.
fn is_first(seen: &mut HashSet<(u64, u64)>, node: &Node) -> bool {
    link(node).is_none_or(|link| seen.insert(link))
}

/// What files that are one file have in common.
pub(crate) fn link(node: &Node) -> Option<(u64, u64)> {
    let meta = &node.meta;
    let is_linked = meta.links > 1 && meta.device_id != 0 && meta.inode != 0;
    is_linked.then_some((meta.device_id, meta.inode))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).custom_flags(no_follow()).open(path)
}

fn reading(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(no_follow()).open(path)
}

fn no_follow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

fn time(at: jiff::Timestamp) -> Option<SystemTime> {
    let nanos = at.as_nanosecond();
    let (secs, below) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
    let (secs, below) = (i64::try_from(secs).ok()?, Duration::from_nanos(u64::try_from(below).ok()?));
    let whole = Duration::from_secs(secs.unsigned_abs());
    let second = if secs < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    second?.checked_add(below)
}

fn unwritten(path: &Path, error: &io::Error) -> Failed {
    let words = format!("cannot write {}: {error}", path.display());
    Failed::new(crate::failure::local(&words).unwrap_or(FailureKind::Other), words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_in_a_pack_is_read_at_once_and_never_too_much() {
        let id = |byte: u8| -> Id { format!("{byte:02x}").repeat(32).parse().unwrap() };
        let blob: DataId = "00".repeat(32).parse().unwrap();
        let mib = 1 << 20;
        let places = [
            (1, 0, mib),
            (1, mib, mib),
            // Too far away.
            (1, 3 * mib, mib),
            // Another pack.
            (2, 0, 6 * mib),
            (2, 6 * mib, 4 * mib),
        ];
        let pieces =
            places.map(|(pack, offset, length)| ((id(pack), offset), Piece { blob, length, to: Vec::new() }));
        let windows = Plan::windows(pieces.into_iter().collect());
        let seen: Vec<_> = windows.iter().map(|w| (w.pack, w.offset, w.length, w.pieces.len())).collect();
        assert_eq!(
            seen,
            [
                (id(1), 0, 2 * mib, 2),
                (id(1), 3 * mib, mib, 1),
                (id(2), 0, 6 * mib, 1),
                (id(2), 6 * mib, 4 * mib, 1)
            ]
        );
    }

    #[test]
    fn a_file_is_of_its_blobs_only_if_every_byte_is() {
        let blob = |data: &[u8]| -> (DataId, u64) {
            let id = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            (id.parse().unwrap(), data.len() as u64)
        };
        let long = vec![7; 300 << 10];
        let blobs = [blob(b"first"), blob(&long), blob(b"last")];
        let good = [b"first", &*long, b"last"].concat();
        let seen = std::cell::Cell::new(0);
        assert!(is_of(&*good, &blobs, &|n| seen.set(seen.get() + n)).unwrap());
        assert_eq!(seen.get(), good.len() as u64);
        let is_of = |data: &[u8]| is_of(data, &blobs, &|_| ()).unwrap();
        for at in [0, 5, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(!is_of(&bad), "byte {at}");
        }
        assert!(!is_of(&good[..good.len() - 1]), "short");
        assert!(!is_of(&[&*good, b"x"].concat()), "long");
        assert!(!is_of(b""));
    }

    #[test]
    fn times_before_the_epoch_are_times_too() {
        for nanos in [-1_500_000_001_i128, 0, 1_234_567_890_123_456_789] {
            let at = time(jiff::Timestamp::from_nanosecond(nanos).unwrap()).unwrap();
            let back = match at.duration_since(SystemTime::UNIX_EPOCH) {
                Ok(after) => after.as_nanos().cast_signed(),
                Err(before) => -before.duration().as_nanos().cast_signed(),
            };
            assert_eq!(back, nanos);
        }
    }
}
