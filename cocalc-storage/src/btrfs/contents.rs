//! What a stream of a snapshot will be like: how long, and what it will lack.

use std::{collections::BTreeMap, fs::File};

use super::sys::stream::{Item, each_item, path_of_inode};
use crate::failure::{Doing as _, Failure};

/// How many files a remark names.
const NAMED_MAX: usize = 3;
/// How much of a name a remark shows.
const NAME_BYTES_MAX: usize = 80;
/// What the commands for one inode take beside its name and data, about.
const INODE_BYTES: u64 = 220;
/// What the command around one piece of data takes, about.
const WRITE_BYTES: u64 = 80;

/// Item types of `linux/btrfs_tree.h`.
const INODE_ITEM: u32 = 1;
const XATTR_ITEM: u32 = 24;
const EXTENT_DATA: u32 = 108;

/// What a stream leaves out of an inode, by its flags in
/// `struct btrfs_inode_item`.
const FLAGS: [(u64, &str); 7] = [
    (1 << 6, "that must not change (chattr +i)"),
    (1 << 7, "that may only grow (chattr +a)"),
    (1 << 1, "without copy-on-write (chattr +C)"),
    (1 << 11, "marked for compression (chattr +c)"),
    (1 << 5 | 1 << 10, "written synchronously (chattr +S, +D)"),
    (1 << 9, "whose access times are not kept (chattr +A)"),
    (1 << 32, "sealed by fs-verity"),
];

/// What is known of a snapshot from the items of its tree.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// About how long its stream is, in bytes.
    pub(super) stream_bytes: u64,
    /// What the stream lacks, in words for people.
    pub(super) left_out: Vec<String>,
}

#[derive(Debug, Default)]
struct Tally {
    count: u64,
    first: Vec<u64>,
}

impl Tally {
    /// Counts an inode once, items of which come one after the other.
    fn add(&mut self, inode: u64, last: &mut u64) {
        if *last == inode {
            return;
        }
        *last = inode;
        self.count += 1;
        if self.first.len() < NAMED_MAX {
            self.first.push(inode);
        }
    }
}

/// Looks at the items of a snapshot, of all of it or of what was written after
/// transaction `base`. Reads the tree and no file, so it takes a small part of
/// the time that sending takes.
pub(super) fn survey(snapshot: &File, base: Option<u64>) -> Result<Contents, Failure> {
    let since = base.map_or(0, |transaction| transaction + 1);
    let mut bytes = 0u64;
    let mut reserved = (Tally::default(), 0);
    let mut flagged: BTreeMap<usize, Tally> = BTreeMap::new();
    let look = |item: Item<'_>| match item.kind {
        // Its transaction says when the inode was changed last.
        INODE_ITEM if item.number(8) >= since => {
            bytes += INODE_BYTES;
            let flags = item.number(64);
            for (index, (mask, _)) in FLAGS.iter().enumerate() {
                if flags & mask != 0 {
                    flagged.entry(index).or_default().add(item.inode, &mut 0);
                }
            }
        }
        XATTR_ITEM => bytes += item.body.len() as u64,
        // When the extent was written; its type is after the compression.
        EXTENT_DATA if item.number(0) >= since => match item.body.get(20) {
            Some(0) => bytes += WRITE_BYTES + item.number(8),
            // One at address 0 is a hole.
            Some(1) if item.number(21) != 0 => bytes += WRITE_BYTES + item.number(45),
            Some(2) => reserved.0.add(item.inode, &mut reserved.1),
            _ => {}
        },
        _ => {}
    };
    each_item(snapshot, since, look).doing("look at what a snapshot holds")?;
    let mut left_out = Vec::new();
    let mut remark = |tally: &Tally, what: &str| {
        let names: Vec<String> = tally.first.iter().filter_map(|inode| name(snapshot, *inode)).collect();
        let more = if tally.count > names.len() as u64 { ", …" } else { "" };
        let noun = if tally.count == 1 { "one file or directory" } else { "files or directories" };
        let count = if tally.count == 1 { String::new() } else { format!("{} ", tally.count) };
        left_out.push(format!("{count}{noun} {what}: {}{more}", names.join(", ")));
    };
    if reserved.0.count > 0 {
        remark(&reserved.0, "with space reserved beyond their data (fallocate), which is not reserved there");
    }
    for (index, tally) in &flagged {
        if let Some((_, what)) = FLAGS.get(*index) {
            remark(tally, &format!("{what}, which are ordinary there"));
        }
    }
    Ok(Contents { stream_bytes: bytes, left_out })
}

/// A path for people: short, and without control characters.
fn name(snapshot: &File, inode: u64) -> Option<String> {
    let path = path_of_inode(snapshot, inode).ok()?;
    let shown: String = String::from_utf8_lossy(&path).chars().take(NAME_BYTES_MAX).collect();
    Some(format!("{shown:?}"))
}
