//! How much of a file is shared, by the kernel's `FIEMAP` of
//! `linux/fiemap.h`.

#![allow(
    unsafe_code,
    reason = "one ioctl on an open descriptor with the structure its number names, and room after it"
)]

use std::{io, os::fd::AsFd};

use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
};

/// How many extents one call gives: of 56 bytes each.
const ROOM: usize = 256;
/// `FIEMAP_EXTENT_LAST`.
const LAST: u32 = 1 << 0;
/// `FIEMAP_EXTENT_DATA_INLINE`: within metadata.
const DATA_INLINE: u32 = 1 << 9;
/// `FIEMAP_EXTENT_SHARED`.
const SHARED: u32 = 1 << 13;

/// `struct fiemap`, without its extents.
#[repr(C)]
struct Head {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    head: Head,
    extents: [Extent; ROOM],
}

const _: () = {
    assert!(size_of::<Head>() == 32);
    assert!(size_of::<Extent>() == 56);
    assert!(size_of::<Request>() == 32 + 56 * ROOM);
};

/// `FS_IOC_FIEMAP`.
const FIEMAP: Opcode = opcode::read_write::<Head>(b'f', 11);

/// What is known of a file's extents.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Extents {
    /// Bytes that another file, or the same in a snapshot, has too.
    pub(crate) shared_bytes: u64,
    /// Whether its data is within metadata, of which nothing is said.
    pub(crate) inline: bool,
}

/// The extents of a regular file, of which what is still only in memory is
/// left out. `None` if the file system cannot tell.
pub(crate) fn extents(file: impl AsFd) -> io::Result<Option<Extents>> {
    let mut found = Extents::default();
    let mut request = Box::new(Request {
        head: Head { start: 0, length: 0, flags: 0, mapped_extents: 0, extent_count: 0, reserved: 0 },
        extents: [Extent::default(); ROOM],
    });
    let mut start = 0;
    loop {
        request.head = Head {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: ROOM as u32,
            reserved: 0,
        };
        // SAFETY: the number names Head, after which the kernel writes at most
        // as many extents as `extent_count` says; there is room for them.
        match unsafe { ioctl(file.as_fd(), Updater::<FIEMAP, _>::new(&mut *request)) } {
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(None),
            other => other?,
        }
        let mapped = request.head.mapped_extents as usize;
        for extent in request.extents.iter().take(mapped) {
            if extent.flags & SHARED != 0 {
                found.shared_bytes = found.shared_bytes.saturating_add(extent.length);
            }
            found.inline |= extent.flags & DATA_INLINE != 0;
            if extent.flags & LAST != 0 {
                return Ok(Some(found));
            }
            // A file that is written meanwhile must not hold us here.
            start = start.max(extent.logical.saturating_add(extent.length));
        }
        if mapped < ROOM {
            return Ok(Some(found));
        }
    }
}
