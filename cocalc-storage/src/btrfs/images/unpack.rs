//! Unpacking a tar archive that may be anything.
//!
//! tar runs without network and mounts of ours. It takes the `/` off absolute
//! paths, refuses `..`, and makes links that lead elsewhere only after all
//! files; this code bounds what comes, and looks through the result.

use std::{ffi::OsStr, path::Path, process::Stdio, time::Duration};

use cocalc_core::stream::BoxRead;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::{ImageError, ImageLimits, bad, floor::Floor};
use crate::{btrfs::Btrfs, child::Running};

const CHUNK: usize = 128 << 10;
/// An archive ends with two blocks of zeros.
const END_MARK: usize = 1024;
/// How long unpacking may take no input or give no end.
const STALL_LIMIT: Duration = Duration::from_secs(600);

/// What the bytes of an archive are called among an image's sources.
fn name(hash: Sha256) -> String {
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("tar:sha256:{hash}")
}

/// What an archive is called among an image's sources.
pub(super) async fn source(mut archive: impl AsyncRead + Unpin) -> Result<String, ImageError> {
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        match archive.read(&mut chunk).await.map_err(bad)? {
            0 => return Ok(name(hash)),
            length => hash.update(&chunk[..length]),
        }
    }
}

/// Says of an archive that is none what it is, if that can be told.
fn not_a_tar(start: &[u8]) -> Option<&'static str> {
    match start {
        [0x1f, 0x8b, ..] => Some("it is compressed with gzip; decompress it first (gzip -d)"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("it is compressed with zstd; decompress it first (zstd -d)"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("it is compressed with xz; decompress it first (xz -d)"),
        [b'B', b'Z', b'h', ..] => Some("it is compressed with bzip2; decompress it first (bzip2 -d)"),
        _ => None,
    }
}

/// Unpacks an archive into `place`; what it is called among an image's sources.
pub(super) async fn unpack(
    store: &Btrfs,
    place: &Path,
    mut archive: BoxRead,
    limits: &ImageLimits,
) -> Result<String, ImageError> {
    let arguments = [
        "--extract",
        "--preserve-permissions",
        "--same-owner",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "--xattrs-exclude=trusted.overlay.*",
        "--acls",
        "--file=-",
        "--directory",
    ]
    .map(OsStr::new);
    let arguments = [arguments.as_slice(), &[place.as_os_str()]].concat();
    let running = Running::confined("tar", &arguments, Stdio::piped(), Stdio::null());
    let mut running = running.map_err(bad)?;
    let mut stdin = running.child.stdin.take().ok_or_else(|| bad("tar has no input"))?;
    let (mut hash, mut chunk, mut accepts) = (Sha256::new(), vec![0; CHUNK], true);
    let (mut zeros, mut total, mut floor) = (0, 0_u64, Floor::new(store, limits));
    floor.fits(0)?;
    // Every name takes a block, and some take a few.
    let total_max = limits.bytes.saturating_add(limits.names.saturating_mul(2048));
    loop {
        let length = timeout(STALL_LIMIT, archive.read(&mut chunk)).await.map_err(bad)?.map_err(bad)?;
        if length == 0 {
            break;
        }
        if total == 0
            && let Some(reason) = not_a_tar(&chunk[..length])
        {
            return Err(bad(reason));
        }
        total += length as u64;
        if total > total_max {
            return Err(bad(format!("it is larger than an image may be, {} bytes", limits.bytes)));
        }
        floor.came(length)?;
        hash.update(&chunk[..length]);
        zeros = match chunk[..length].iter().rposition(|byte| *byte != 0) {
            Some(last) => length - 1 - last,
            None => zeros + length,
        };
        // tar stops at the end mark; what follows still counts among the bytes.
        accepts =
            accepts && timeout(STALL_LIMIT, stdin.write_all(&chunk[..length])).await.map_err(bad)?.is_ok();
    }
    drop(stdin);
    let status = timeout(STALL_LIMIT, running.child.wait()).await.map_err(bad)?.map_err(bad)?;
    floor.fits(0)?;
    if !status.success() {
        let words = running.words().await;
        // Others may have filled it, or it has no room for more names.
        if words.contains("No space left on device") {
            return Err(ImageError::NoSpace);
        }
        return Err(bad(format!("tar failed, {status}: {words}")));
    }
    // tar takes an archive that is cut between two files for a whole one.
    if zeros < END_MARK {
        return Err(bad("it is cut off"));
    }
    Ok(name(hash))
}
