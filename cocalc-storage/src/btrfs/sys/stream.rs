//! What sending asks of the kernel: the stream itself, and a quick look at
//! every item of a subvolume's tree.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
};

use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

use super::MAGIC;

/// `BTRFS_SEND_FLAG_VERSION`: the version is given.
const SEND_VERSION: u64 = 0x8;
/// `BTRFS_SEND_FLAG_COMPRESSED`: what is compressed on the disk is sent so.
const SEND_COMPRESSED: u64 = 0x10;

/// `struct btrfs_ioctl_send_args`.
#[repr(C)]
struct SendArgs {
    send_fd: i64,
    clone_sources_count: u64,
    clone_sources: *const u64,
    parent_root: u64,
    flags: u64,
    version: u32,
    reserved: [u8; 28],
}

/// `struct btrfs_ioctl_search_args_v2`: the key, the size of the buffer, and
/// the buffer, which is beside it in [`Found`].
#[repr(C)]
struct SearchHead {
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    unused64: [u64; 4],
    buf_size: u64,
}

/// How much is read of a tree at once.
const FOUND_BYTES: usize = 256 << 10;

#[repr(C)]
struct Found {
    head: SearchHead,
    items: [u8; FOUND_BYTES],
}

const _: () = {
    assert!(size_of::<SendArgs>() == 72);
    assert!(size_of::<SearchHead>() == 112);
    assert!(size_of::<Found>() == 112 + FOUND_BYTES);
};

const SEND: Opcode = opcode::write::<SendArgs>(MAGIC, 38);
const TREE_SEARCH_V2: Opcode = opcode::read_write::<SearchHead>(MAGIC, 17);

/// Writes the stream of the read-only subvolume `snapshot` into `pipe`, and
/// returns when all of it was written, or the pipe has no reader any more.
/// `base` and `sources` are tree ids. From `version` 2 on, what is compressed
/// on the disk is sent as it is.
///
/// Call it in a thread of its own: it blocks, and leaves the thread with all
/// signals blocked. The kernel sends `SIGPIPE` to whoever writes into a pipe
/// that nobody reads, and its default ends the process. And a signal with a
/// handler, while this waits for room in the pipe, makes the kernel begin the
/// whole call again: the stream would break off and start over within itself.
pub(in super::super) fn send(
    snapshot: impl AsFd,
    pipe: &OwnedFd,
    base: Option<u64>,
    sources: &[u64],
    version: u32,
) -> io::Result<()> {
    block_signals()?;
    // A base is a source of clones too, as the `btrfs` program has it.
    let mut clones: Vec<u64> = base.into_iter().chain(sources.iter().copied()).collect();
    clones.sort_unstable();
    clones.dedup();
    let flags = if version >= 2 { SEND_VERSION | SEND_COMPRESSED } else { 0 };
    let args = SendArgs {
        send_fd: pipe.as_raw_fd().into(),
        clone_sources_count: clones.len() as u64,
        clone_sources: clones.as_ptr(),
        parent_root: base.unwrap_or(0),
        flags,
        version: if version >= 2 { 2 } else { 0 },
        reserved: [0; 28],
    };
    // SAFETY: the number names SendArgs, which the kernel only reads; its
    // pointer is to `clones`, of the count beside it, which outlives the call.
    unsafe { ioctl(snapshot, Setter::<SEND, _>::new(args)) }?;
    Ok(())
}

fn block_signals() -> io::Result<()> {
    // SAFETY: all bits zero are a valid `sigset_t`; the calls get pointers to
    // this one, and change nothing but this thread's own mask.
    let failed = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// An item of a tree.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Item<'a> {
    pub(in super::super) inode: u64,
    pub(in super::super) kind: u32,
    pub(in super::super) body: &'a [u8],
}

impl Item<'_> {
    /// The little-endian number of eight bytes at `at`; 0 beyond its end.
    pub(in super::super) fn number(&self, at: usize) -> u64 {
        let bytes = self.body.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// Shows `look` every item of the subvolume that `fd` is the root of, from its
/// first inode on, that is in a part of the tree written since transaction
/// `since`. What is older shares such a part with what is new, so it may be
/// shown too.
pub(in super::super) fn each_item(
    fd: impl AsFd,
    since: u64,
    mut look: impl FnMut(Item<'_>),
) -> io::Result<()> {
    /// `struct btrfs_ioctl_search_header`: transid, objectid, offset, then
    /// type and length of 32 bits.
    const HEADER: usize = 32;
    let mut found = Box::new(Found {
        head: SearchHead {
            tree_id: 0,
            min_objectid: super::ROOT_INODE,
            // `BTRFS_LAST_FREE_OBJECTID`.
            max_objectid: u64::MAX - 255,
            min_offset: 0,
            max_offset: u64::MAX,
            min_transid: since,
            max_transid: u64::MAX,
            min_type: 0,
            max_type: u32::MAX,
            nr_items: u32::MAX,
            unused: 0,
            unused64: [0; 4],
            buf_size: FOUND_BYTES as u64,
        },
        items: [0; FOUND_BYTES],
    });
    loop {
        found.head.nr_items = u32::MAX;
        // SAFETY: the number names the head, which says how long the buffer
        // behind it is; the kernel writes within both.
        unsafe { ioctl(fd.as_fd(), Updater::<TREE_SEARCH_V2, _>::new(&mut *found)) }?;
        if found.head.nr_items == 0 {
            return Ok(());
        }
        let mut rest = found.items.as_slice();
        let mut last = (0, 0, 0);
        for _ in 0..found.head.nr_items {
            let Some((header, after)) = rest.split_first_chunk::<HEADER>() else { break };
            let long = |at: usize| {
                let bytes = header.get(at..).and_then(<[u8]>::first_chunk);
                bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
            };
            let (inode, offset, tail) = (long(8), long(16), long(24));
            let [a, b, c, d, e, f, g, h] = tail.to_ne_bytes();
            let (kind, length) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
            let Some((body, after)) = after.split_at_checked(length as usize) else { break };
            look(Item { inode, kind, body });
            last = (inode, kind, offset);
            rest = after;
        }
        if last == (0, 0, 0) {
            // It would be asked for the same again.
            return Err(io::ErrorKind::InvalidData.into());
        }
        // The key after the last one.
        let (inode, kind, offset) = last;
        let head = &mut found.head;
        (head.min_objectid, head.min_type, head.min_offset) = match (offset.checked_add(1), kind) {
            (Some(offset), kind) => (inode, kind, offset),
            (None, kind) if kind < 255 => (inode, kind + 1, 0),
            (None, _) => (inode + 1, 0, 0),
        };
    }
}

/// The path of inode `inode` in the subvolume that `fd` is the root of, as
/// bytes; without one of its names if it has several.
pub(in super::super) fn path_of_inode(fd: impl AsFd, inode: u64) -> io::Result<Vec<u8>> {
    let mut args = Box::new(super::InoLookupArgs { treeid: 0, objectid: inode, name: [0; 4080] });
    // SAFETY: the number names InoLookupArgs; the kernel writes within it.
    unsafe { ioctl(fd, Updater::<{ super::INO_LOOKUP }, _>::new(&mut *args)) }?;
    let path = args.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(path.strip_suffix(b"/").unwrap_or(path).to_vec())
}

/// `struct btrfs_ioctl_clone_range_args`.
#[repr(C)]
struct CloneRangeArgs {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// `struct btrfs_ioctl_encoded_io_args`.
#[repr(C)]
struct EncodedArgs {
    iov: *const libc::iovec,
    iovcnt: libc::c_ulong,
    offset: i64,
    flags: u64,
    len: u64,
    unencoded_len: u64,
    unencoded_offset: u64,
    compression: u32,
    encryption: u32,
    reserved: [u8; 64],
}

const _: () = {
    assert!(size_of::<CloneRangeArgs>() == 32);
    assert!(size_of::<EncodedArgs>() == 128);
};

const CLONE_RANGE: Opcode = opcode::write::<CloneRangeArgs>(MAGIC, 13);
const ENCODED_WRITE: Opcode = opcode::write::<EncodedArgs>(MAGIC, 64);

/// Lets `length` bytes of `to` share those of `from`; 0 is all to its end.
pub(in super::super) fn clone_range(
    from: impl AsFd,
    from_offset: u64,
    length: u64,
    to: impl AsFd,
    to_offset: u64,
) -> io::Result<()> {
    let args = CloneRangeArgs {
        src_fd: from.as_fd().as_raw_fd().into(),
        src_offset: from_offset,
        src_length: length,
        dest_offset: to_offset,
    };
    // SAFETY: the number names CloneRangeArgs, which the kernel only reads; its
    // descriptor is open for the length of the call.
    unsafe { ioctl(to, Setter::<CLONE_RANGE, _>::new(args)) }?;
    Ok(())
}

/// What encoded data is the code of (`linux/btrfs.h`, `BTRFS_IOC_ENCODED_WRITE`).
#[derive(Clone, Copy, Debug, Default)]
pub(in super::super) struct Encoding {
    /// How much of what it decodes to is in the file, in bytes.
    pub(in super::super) len: u64,
    /// How much it decodes to.
    pub(in super::super) unencoded_len: u64,
    /// Where in that the file's part begins.
    pub(in super::super) unencoded_offset: u64,
    pub(in super::super) compression: u32,
}

/// Writes data that is compressed already, as it is, at `offset` of a file.
pub(in super::super) fn encoded_write(
    file: impl AsFd,
    offset: u64,
    encoding: Encoding,
    data: &[u8],
) -> io::Result<()> {
    let vector = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let args = EncodedArgs {
        iov: &raw const vector,
        iovcnt: 1,
        offset: i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?,
        flags: 0,
        len: encoding.len,
        unencoded_len: encoding.unencoded_len,
        unencoded_offset: encoding.unencoded_offset,
        compression: encoding.compression,
        encryption: 0,
        reserved: [0; 64],
    };
    // SAFETY: the number names EncodedArgs, which the kernel only reads, as it
    // does the data that its one vector names; both outlive the call.
    unsafe { ioctl(file, Setter::<ENCODED_WRITE, _>::new(args)) }?;
    Ok(())
}
