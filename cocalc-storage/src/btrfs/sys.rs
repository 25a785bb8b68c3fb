//! The kernel's Btrfs calls, typed. Structures and numbers are those of
//! `linux/btrfs.h`; their sizes are checked when this is compiled, because a
//! size is part of each call's number.

#![allow(
    unsafe_code,
    reason = "each block is one ioctl on an open descriptor with the structure its number names"
)]

pub(super) mod stream;

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use cocalc_core::ids::VolumeUuid;
use rustix::ioctl::{Getter, NoArg, Opcode, Setter, Updater, ioctl, opcode};

/// `BTRFS_SUPER_MAGIC` of `linux/magic.h`, as `statfs` gives it.
const SUPER_MAGIC: i64 = 0x9123_683e;
/// `BTRFS_FIRST_FREE_OBJECTID`: the inode number of every subvolume's root.
const ROOT_INODE: u64 = 256;
/// `BTRFS_IOCTL_MAGIC`.
const MAGIC: u8 = 0x94;

/// `BTRFS_SUBVOL_RDONLY`.
const SUBVOL_RDONLY: u64 = 1 << 1;
/// `BTRFS_SUBVOL_QGROUP_INHERIT`.
const SUBVOL_QGROUP_INHERIT: u64 = 1 << 2;
/// `BTRFS_SUBVOL_SPEC_BY_ID`.
const SUBVOL_SPEC_BY_ID: u64 = 1 << 4;
/// `BTRFS_QGROUP_LIMIT_MAX_RFER`.
pub(super) const LIMIT_MAX_RFER: u64 = 1 << 0;
/// `BTRFS_QUOTA_CTL_ENABLE`.
const QUOTA_ENABLE: u64 = 1;
/// `BTRFS_QUOTA_CTL_ENABLE_SIMPLE_QUOTA`, of Linux 6.7.
const QUOTA_ENABLE_SIMPLE: u64 = 4;

/// `struct btrfs_qgroup_limit`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QgroupLimit {
    flags: u64,
    max_rfer: u64,
    max_excl: u64,
    rsv_rfer: u64,
    rsv_excl: u64,
}

/// `struct btrfs_qgroup_inherit` with room for one group.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QgroupInherit {
    flags: u64,
    num_qgroups: u64,
    num_ref_copies: u64,
    num_excl_copies: u64,
    lim: QgroupLimit,
    qgroups: [u64; 1],
}

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    inherit_size: u64,
    inherit: *const QgroupInherit,
    unused: [u64; 2],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_timespec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Timespec {
    sec: u64,
    nsec: u32,
}

/// `struct btrfs_ioctl_get_subvol_info_args`.
#[repr(C)]
struct SubvolInfoArgs {
    treeid: u64,
    name: [u8; 256],
    parent_id: u64,
    dirid: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    ctransid: u64,
    otransid: u64,
    stransid: u64,
    rtransid: u64,
    ctime: Timespec,
    otime: Timespec,
    stime: Timespec,
    rtime: Timespec,
    reserved: [u64; 8],
}

/// `struct btrfs_ioctl_received_subvol_args`.
#[repr(C)]
struct ReceivedArgs {
    uuid: [u8; 16],
    stransid: u64,
    rtransid: u64,
    stime: Timespec,
    rtime: Timespec,
    flags: u64,
    reserved: [u64; 16],
}

/// `struct btrfs_ioctl_fs_info_args`.
#[repr(C)]
struct FsInfoArgs {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u8; 992],
}

/// `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct QuotaCtlArgs {
    cmd: u64,
    status: u64,
}

/// `struct btrfs_ioctl_qgroup_assign_args`.
#[repr(C)]
struct QgroupAssignArgs {
    assign: u64,
    src: u64,
    dst: u64,
}

/// `struct btrfs_ioctl_qgroup_create_args`.
#[repr(C)]
struct QgroupCreateArgs {
    create: u64,
    qgroupid: u64,
}

/// `struct btrfs_ioctl_qgroup_limit_args`.
#[repr(C)]
struct QgroupLimitArgs {
    qgroupid: u64,
    lim: QgroupLimit,
}

/// `struct btrfs_ioctl_search_args`: the key, then the found items.
#[repr(C)]
struct SearchArgs {
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
    buf: [u8; 3992],
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct InoLookupArgs {
    treeid: u64,
    objectid: u64,
    name: [u8; 4080],
}

const _: () = {
    assert!(size_of::<VolArgsV2>() == 4096);
    assert!(size_of::<SubvolInfoArgs>() == 504);
    assert!(size_of::<ReceivedArgs>() == 200);
    assert!(size_of::<FsInfoArgs>() == 1024);
    assert!(size_of::<QgroupLimitArgs>() == 48);
    assert!(size_of::<SearchArgs>() == 4096);
    assert!(size_of::<InoLookupArgs>() == 4096);
};

const TREE_SEARCH: Opcode = opcode::read_write::<SearchArgs>(MAGIC, 17);
const INO_LOOKUP: Opcode = opcode::read_write::<InoLookupArgs>(MAGIC, 18);
const SYNC: Opcode = opcode::none(MAGIC, 8);
const SNAP_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(MAGIC, 23);
const SUBVOL_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(MAGIC, 24);
const SUBVOL_SETFLAGS: Opcode = opcode::write::<u64>(MAGIC, 26);
const FS_INFO: Opcode = opcode::read::<FsInfoArgs>(MAGIC, 31);
const SET_RECEIVED: Opcode = opcode::read_write::<ReceivedArgs>(MAGIC, 37);
const QUOTA_CTL: Opcode = opcode::read_write::<QuotaCtlArgs>(MAGIC, 40);
const QGROUP_ASSIGN: Opcode = opcode::write::<QgroupAssignArgs>(MAGIC, 41);
const QGROUP_CREATE: Opcode = opcode::write::<QgroupCreateArgs>(MAGIC, 42);
const QGROUP_LIMIT: Opcode = opcode::read::<QgroupLimitArgs>(MAGIC, 43);
const GET_SUBVOL_INFO: Opcode = opcode::read::<SubvolInfoArgs>(MAGIC, 60);
const SNAP_DESTROY_V2: Opcode = opcode::write::<VolArgsV2>(MAGIC, 63);

/// A quota group: its level in the upper 16 bits, its number in the others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Qgroup(u64);

impl Qgroup {
    /// The group of level 1 with this number.
    pub(super) const fn level_1(number: u64) -> Self {
        Self(1 << 48 | (number & 0xffff_ffff_ffff))
    }

    /// The group that the kernel makes for each subvolume.
    pub(super) const fn of_subvolume(tree: u64) -> Self {
        Self(tree & 0xffff_ffff_ffff)
    }

    /// Its number within its level.
    pub(super) const fn number(self) -> u64 {
        self.0 & 0xffff_ffff_ffff
    }

    const fn level(self) -> u64 {
        self.0 >> 48
    }

    /// Its directory's name under `/sys/fs/btrfs/<fsid>/qgroups`.
    pub(super) fn sysfs_name(self) -> String {
        format!("{}_{}", self.level(), self.number())
    }
}

/// What the kernel knows of a subvolume.
#[derive(Clone, Copy, Debug)]
pub(super) struct SubvolInfo {
    pub(super) tree: u64,
    pub(super) uuid: [u8; 16],
    pub(super) parent_uuid: [u8; 16],
    pub(super) received_uuid: [u8; 16],
    pub(super) read_only: bool,
    /// When it was made: seconds and nanoseconds since the epoch.
    pub(super) created: (u64, u32),
    /// The transaction that made it; orders what was made within one tick.
    pub(super) created_transid: u64,
    /// The last committed transaction that changed it. Taking a snapshot of it
    /// counts as a change, in the transaction of the snapshot.
    pub(super) generation: u64,
    /// When the snapshot was taken that this one was received as; zero if
    /// nobody said so.
    pub(super) sent_time: (u64, u32),
}

/// Whether this descriptor is on Btrfs.
pub(super) fn is_btrfs(fd: impl AsFd) -> io::Result<bool> {
    // The type of f_type differs between architectures.
    #[allow(clippy::unnecessary_cast, reason = "needed where the kernel's word is 32 bits")]
    let magic = rustix::fs::fstatfs(fd)?.f_type as i64;
    Ok(magic == SUPER_MAGIC)
}

/// Whether this descriptor, which is on Btrfs, is the root of a subvolume.
pub(super) fn is_subvolume(fd: impl AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstat(fd)?.st_ino == ROOT_INODE)
}

/// Makes an empty subvolume `name` in `parent`, in quota group `group`.
pub(super) fn create_subvolume(parent: impl AsFd, name: &str, group: Option<Qgroup>) -> io::Result<()> {
    volume_call::<SUBVOL_CREATE_V2>(parent.as_fd(), name, -1, 0, group)
}

/// Makes a snapshot `name` in `parent` of the subvolume `source`.
pub(super) fn create_snapshot(
    source: impl AsFd,
    parent: impl AsFd,
    name: &str,
    read_only: bool,
    group: Option<Qgroup>,
) -> io::Result<()> {
    let flags = if read_only { SUBVOL_RDONLY } else { 0 };
    let source = i64::from(source.as_fd().as_raw_fd());
    volume_call::<SNAP_CREATE_V2>(parent.as_fd(), name, source, flags, group)
}

fn volume_call<const OPCODE: Opcode>(
    parent: BorrowedFd<'_>,
    name: &str,
    source: i64,
    flags: u64,
    group: Option<Qgroup>,
) -> io::Result<()> {
    let inherit =
        QgroupInherit { num_qgroups: 1, qgroups: [group.map_or(0, |group| group.0)], ..Default::default() };
    let mut args = volume_args(name)?;
    args.fd = source;
    args.flags = flags;
    if group.is_some() {
        args.flags |= SUBVOL_QGROUP_INHERIT;
        args.inherit_size = size_of::<QgroupInherit>() as u64;
        args.inherit = &raw const inherit;
    }
    // SAFETY: the number names VolArgsV2, which the kernel only reads; its
    // pointer is to `inherit`, of the size beside it, which outlives the call.
    unsafe { ioctl(parent, Setter::<OPCODE, _>::new(args)) }?;
    Ok(())
}

fn volume_args(name: &str) -> io::Result<VolArgsV2> {
    let mut args = VolArgsV2 {
        fd: -1,
        transid: 0,
        flags: 0,
        inherit_size: 0,
        inherit: std::ptr::null(),
        unused: [0; 2],
        name: [0; 4040],
    };
    // A name is one path component of the kernel's usual length.
    if name.is_empty() || name.len() > 255 || name.bytes().any(|b| b == b'/' || b == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    args.name[..name.len()].copy_from_slice(name.as_bytes());
    Ok(args)
}

/// Deletes the subvolume with this tree id, wherever it is below the mounted
/// root of which `root` is a descriptor. It must have no subvolumes in it.
pub(super) fn destroy_subvolume(root: impl AsFd, tree: u64) -> io::Result<()> {
    let mut args = volume_args("-")?;
    args.name = [0; 4040];
    args.name[..8].copy_from_slice(&tree.to_ne_bytes());
    args.flags = SUBVOL_SPEC_BY_ID;
    // SAFETY: the number names VolArgsV2, which the kernel only reads.
    unsafe { ioctl(root, Setter::<SNAP_DESTROY_V2, _>::new(args)) }?;
    Ok(())
}

/// A subvolume directly inside another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Child {
    pub(super) tree: u64,
    /// The inode of the directory that it is in.
    directory: u64,
    name: Vec<u8>,
}

/// The subvolumes directly inside subvolume `tree`.
pub(super) fn children(fd: impl AsFd, tree: u64) -> io::Result<Vec<Child>> {
    /// `BTRFS_ROOT_REF_KEY`: its offset is the child's tree id.
    const ROOT_REF: u32 = 156;
    /// `struct btrfs_root_ref`: the directory's inode, a sequence and the
    /// length of the name, little-endian and packed; the name follows.
    const REF: usize = 18;

    let found = search(fd, ROOT_TREE, tree, ROOT_REF)?.into_iter().map(|(tree, item)| {
        let mut directory = [0; 8];
        directory.copy_from_slice(item.get(..8).unwrap_or(&[0; 8]));
        let directory = u64::from_le_bytes(directory);
        Child { tree, directory, name: item.get(REF..).unwrap_or_default().to_vec() }
    });
    Ok(found.collect())
}

/// The path of `child` within subvolume `parent`, which it is in.
pub(super) fn path_of(fd: impl AsFd, parent: u64, child: &Child) -> io::Result<PathBuf> {
    let mut args = Box::new(InoLookupArgs { treeid: parent, objectid: child.directory, name: [0; 4080] });
    // SAFETY: the number names InoLookupArgs; the kernel writes within it.
    unsafe { ioctl(fd, Updater::<INO_LOOKUP, _>::new(&mut *args)) }?;
    let directory = args.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Path::new(OsStr::from_bytes(directory)).join(OsStr::from_bytes(&child.name)))
}

/// Whether no directory has the subvolume with this tree id any more. The
/// kernel may still be freeing its space.
pub(super) fn is_gone(fd: impl AsFd, tree: u64) -> io::Result<bool> {
    /// `BTRFS_ROOT_BACKREF_KEY`: its offset is the parent's tree id.
    const ROOT_BACKREF: u32 = 144;
    Ok(search(fd, ROOT_TREE, tree, ROOT_BACKREF)?.is_empty())
}

/// Whether nothing is left of the subvolume with this tree id: the kernel has
/// freed what was its alone.
pub(super) fn is_freed(fd: impl AsFd, tree: u64) -> io::Result<bool> {
    /// `BTRFS_ROOT_ITEM_KEY`.
    const ROOT_ITEM: u32 = 132;
    Ok(search(fd, ROOT_TREE, tree, ROOT_ITEM)?.is_empty())
}

/// The members of quota group `group`, of level 1, those of deleted
/// subvolumes included.
pub(super) fn members(fd: impl AsFd, group: Qgroup) -> io::Result<Vec<Qgroup>> {
    /// `BTRFS_QUOTA_TREE_OBJECTID`.
    const QUOTA_TREE: u64 = 8;
    /// `BTRFS_QGROUP_RELATION_KEY`: from each of the two to the other.
    const RELATION: u32 = 246;
    let related = search(fd, QUOTA_TREE, group.0, RELATION)?.into_iter();
    Ok(related.map(|(other, _)| Qgroup(other)).filter(|other| other.level() < group.level()).collect())
}

/// `BTRFS_ROOT_TREE_OBJECTID`.
const ROOT_TREE: u64 = 1;

/// The offsets and contents of the items of one object and type in a tree of
/// the file system's own.
fn search(fd: impl AsFd, tree: u64, object: u64, kind: u32) -> io::Result<Vec<(u64, Vec<u8>)>> {
    /// `struct btrfs_ioctl_search_header`: transid, objectid, offset, then
    /// type and length of 32 bits.
    const HEADER: usize = 32;

    let mut found = Vec::new();
    let mut min_offset = 0;
    loop {
        let mut args = Box::new(SearchArgs {
            tree_id: tree,
            min_objectid: object,
            max_objectid: object,
            min_offset,
            max_offset: u64::MAX,
            min_transid: 0,
            max_transid: u64::MAX,
            min_type: kind,
            max_type: kind,
            nr_items: 64,
            unused: 0,
            unused64: [0; 4],
            buf: [0; 3992],
        });
        // SAFETY: the number names SearchArgs; the kernel writes within it.
        unsafe { ioctl(fd.as_fd(), Updater::<TREE_SEARCH, _>::new(&mut *args)) }?;
        if args.nr_items == 0 {
            return Ok(found);
        }
        let mut rest = args.buf.as_slice();
        for _ in 0..args.nr_items {
            let Some((header, after)) = rest.split_at_checked(HEADER) else { break };
            let (mut offset, mut length) = ([0; 8], [0; 4]);
            offset.copy_from_slice(&header[16..24]);
            length.copy_from_slice(&header[28..32]);
            let offset = u64::from_ne_bytes(offset);
            let Some((item, after)) = after.split_at_checked(u32::from_ne_bytes(length) as usize) else {
                break;
            };
            found.push((offset, item.to_vec()));
            min_offset = offset.saturating_add(1);
            rest = after;
        }
    }
}

/// What the kernel knows of the subvolume that `fd` is in.
pub(super) fn subvolume_info(fd: impl AsFd) -> io::Result<SubvolInfo> {
    // SAFETY: the number names SubvolInfoArgs, all of which the kernel writes
    // and in which every bit pattern is valid.
    let args: SubvolInfoArgs = unsafe { ioctl(fd, Getter::<GET_SUBVOL_INFO, _>::new()) }?;
    Ok(SubvolInfo {
        tree: args.treeid,
        uuid: args.uuid,
        parent_uuid: args.parent_uuid,
        received_uuid: args.received_uuid,
        // The field holds the root item's flags, in which read-only is bit 0,
        // not those of SETFLAGS.
        read_only: args.flags & 1 != 0,
        created: (args.otime.sec, args.otime.nsec),
        created_transid: args.otransid,
        generation: args.generation,
        sent_time: (args.stime.sec, args.stime.nsec),
    })
}

/// Makes a subvolume read-only.
pub(super) fn set_read_only(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: the number names a u64, which the kernel only reads.
    unsafe { ioctl(fd, Setter::<SUBVOL_SETFLAGS, u64>::new(SUBVOL_RDONLY)) }?;
    Ok(())
}

/// Says of the writable subvolume `fd` that it holds what the sender knows by
/// this id and transaction, and when that was taken.
pub(super) fn set_received(
    fd: impl AsFd,
    origin: &[u8; 16],
    sent_transid: u64,
    taken: (u64, u32),
) -> io::Result<()> {
    let mut args = ReceivedArgs {
        uuid: *origin,
        stransid: sent_transid,
        rtransid: 0,
        stime: Timespec { sec: taken.0, nsec: taken.1 },
        rtime: Timespec::default(),
        flags: 0,
        reserved: [0; 16],
    };
    // SAFETY: the number names ReceivedArgs.
    unsafe { ioctl(fd, Updater::<SET_RECEIVED, _>::new(&mut args)) }?;
    Ok(())
}

/// Writes out all of this file system, and commits: what was done before is
/// there after a power cut.
pub(super) fn commit(fd: impl AsFd) -> io::Result<()> {
    rustix::fs::syncfs(fd.as_fd())?;
    // SAFETY: the number takes no argument.
    unsafe { ioctl(fd, NoArg::<SYNC>::new()) }?;
    Ok(())
}

/// Where the kernel shows this file system.
pub(super) fn shown(fd: impl AsFd) -> io::Result<PathBuf> {
    // SAFETY: the number names FsInfoArgs, all of which the kernel writes.
    let args: FsInfoArgs = unsafe { ioctl(fd, Getter::<FS_INFO, _>::new()) }?;
    Ok(Path::new("/sys/fs/btrfs").join(VolumeUuid::from_bytes(args.fsid).to_string()))
}

/// Turns quotas on: simple ones, or the classic.
pub(super) fn enable_quotas(fd: impl AsFd, simple: bool) -> io::Result<()> {
    let cmd = if simple { QUOTA_ENABLE_SIMPLE } else { QUOTA_ENABLE };
    let mut args = QuotaCtlArgs { cmd, status: 0 };
    // SAFETY: the number names QuotaCtlArgs.
    unsafe { ioctl(fd, Updater::<QUOTA_CTL, _>::new(&mut args)) }?;
    Ok(())
}

/// Makes a quota group; one that exists is kept.
pub(super) fn create_group(fd: impl AsFd, group: Qgroup) -> io::Result<()> {
    match group_call(fd, group, 1) {
        Err(rustix::io::Errno::EXIST) => Ok(()),
        other => Ok(other?),
    }
}

/// Removes a quota group, which must have no members.
pub(super) fn destroy_group(fd: impl AsFd, group: Qgroup) -> io::Result<()> {
    match group_call(fd, group, 0) {
        Err(rustix::io::Errno::NOENT) => Ok(()),
        other => Ok(other?),
    }
}

fn group_call(fd: impl AsFd, group: Qgroup, create: u64) -> rustix::io::Result<()> {
    // SAFETY: the number names QgroupCreateArgs, which the kernel only reads.
    unsafe { ioctl(fd, Setter::<QGROUP_CREATE, _>::new(QgroupCreateArgs { create, qgroupid: group.0 })) }
}

/// Takes `member` out of `group`.
pub(super) fn leave_group(fd: impl AsFd, member: Qgroup, group: Qgroup) -> io::Result<()> {
    let args = QgroupAssignArgs { assign: 0, src: member.0, dst: group.0 };
    // SAFETY: the number names QgroupAssignArgs, which the kernel only reads.
    unsafe { ioctl(fd, Setter::<QGROUP_ASSIGN, _>::new(args)) }?;
    Ok(())
}

/// Limits what `group` is charged; `None` lifts the limit.
pub(super) fn limit_group(fd: impl AsFd, group: Qgroup, bytes: Option<u64>) -> io::Result<()> {
    // The kernel takes all ones as "clear this limit".
    let lim =
        QgroupLimit { flags: LIMIT_MAX_RFER, max_rfer: bytes.unwrap_or(u64::MAX), ..Default::default() };
    let mut args = QgroupLimitArgs { qgroupid: group.0, lim };
    // SAFETY: the number names QgroupLimitArgs. It is encoded as written by
    // the kernel, so it is given a place that may be written.
    unsafe { ioctl(fd, Updater::<QGROUP_LIMIT, _>::new(&mut args)) }?;
    Ok(())
}
