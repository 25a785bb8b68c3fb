//! A tree as a stream: records with everything about each name, the data of
//! files without their holes, and a digest of all of it at the end.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::AsFd, fd::OwnedFd, unix::fs::FileExt as _},
};

use cocalc_core::ids::VolumeUuid;
use sha2::{Digest as _, Sha256};

use crate::tree::{self, Builder, Entry, Kind};

/// The format and its version.
const MAGIC: &[u8; 16] = b"cocalc-tree\0\0\0\0\x01";
const CHUNK: usize = 64 << 10;
/// The kernel's limits, which bound what a stream can make us allocate.
const PATH_MAX: usize = 4096;
const VALUE_MAX: usize = 64 << 10;
const ATTRIBUTES_MAX: u32 = 4096;

/// What a record is.
mod tag {
    pub(super) const DIRECTORY: u8 = 1;
    pub(super) const FILE: u8 = 2;
    pub(super) const SYMLINK: u8 = 3;
    pub(super) const LINK: u8 = 4;
    pub(super) const SPECIAL: u8 = 5;
    pub(super) const DATA: u8 = 6;
    pub(super) const FILE_END: u8 = 7;
    pub(super) const END: u8 = 8;
}

/// Writes the tree below `root`, which is snapshot `origin`.
pub(super) fn write(root: impl AsFd, origin: VolumeUuid, sink: impl Write) -> io::Result<()> {
    let mut out = Hashing { inner: sink, hash: Sha256::new() };
    out.write_all(MAGIC)?;
    out.write_all(origin.as_bytes())?;
    tree::visit(root, None, |entry, file| {
        write_entry(&mut out, &entry)?;
        if let (Kind::File(length), Some(file)) = (&entry.kind, file) {
            let mut buffer = vec![0; CHUNK];
            for (offset, length) in tree::extents(file, *length)? {
                let (mut at, end) = (offset, offset + length);
                while at < end {
                    let most = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                    let read = file.read_at(&mut buffer[..most], at)?;
                    if read == 0 {
                        break;
                    }
                    out.write_all(&[tag::DATA])?;
                    out.write_all(&at.to_be_bytes())?;
                    write_bytes(&mut out, &buffer[..read])?;
                    at += read as u64;
                }
            }
            out.write_all(&[tag::FILE_END])?;
        }
        Ok(())
    })?;
    out.write_all(&[tag::END])?;
    let digest = out.hash.finalize();
    out.inner.write_all(&digest)
}

fn write_entry(out: &mut impl Write, entry: &Entry) -> io::Result<()> {
    let tag = match entry.kind {
        Kind::Directory => tag::DIRECTORY,
        Kind::File(_) => tag::FILE,
        Kind::Symlink(_) => tag::SYMLINK,
        Kind::Link(_) => tag::LINK,
        Kind::Special { .. } => tag::SPECIAL,
    };
    out.write_all(&[tag])?;
    write_bytes(out, &entry.path)?;
    out.write_all(&entry.mode.to_be_bytes())?;
    out.write_all(&entry.owner.0.to_be_bytes())?;
    out.write_all(&entry.owner.1.to_be_bytes())?;
    out.write_all(&entry.modified.0.to_be_bytes())?;
    out.write_all(&entry.modified.1.to_be_bytes())?;
    out.write_all(&u32::try_from(entry.attributes.len()).unwrap_or(u32::MAX).to_be_bytes())?;
    for (name, value) in &entry.attributes {
        write_bytes(out, name)?;
        write_bytes(out, value)?;
    }
    match &entry.kind {
        Kind::Directory => Ok(()),
        Kind::File(number) | Kind::Special { rdev: number } => out.write_all(&number.to_be_bytes()),
        Kind::Symlink(target) | Kind::Link(target) => write_bytes(out, target),
    }
}

fn write_bytes(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes())?;
    out.write_all(bytes)
}

/// Builds the tree of snapshot `origin` below the empty directory `root`.
pub(super) fn read(source: impl Read, origin: VolumeUuid, root: OwnedFd) -> io::Result<()> {
    let mut input = Hashing { inner: io::BufReader::with_capacity(CHUNK, source), hash: Sha256::new() };
    if input.array::<16>()? != *MAGIC {
        return Err(wrong("it is not a stream of directory storage"));
    }
    if input.array::<16>()? != *origin.as_bytes() {
        return Err(wrong("it holds another snapshot than announced"));
    }
    let mut builder = Builder::new(root);
    let mut open: Option<(File, Entry)> = None;
    let mut begun = false;
    loop {
        let [tag] = input.array()?;
        match (tag, open.take()) {
            (tag::DATA, Some((file, entry))) => {
                let at = u64::from_be_bytes(input.array()?);
                let data = input.bytes(CHUNK)?;
                let end = at.checked_add(data.len() as u64);
                let Kind::File(length) = entry.kind else { return Err(wrong("it has data of no file")) };
                if end.is_none_or(|end| end > length) {
                    return Err(wrong("it has data after a file's end"));
                }
                file.write_all_at(&data, at)?;
                open = Some((file, entry));
            }
            (tag::FILE_END, Some((file, entry))) => builder.finish_file(&file, &entry)?,
            (tag::END, None) if begun => break,
            (tag, None) => {
                let entry = input.entry(tag)?;
                // The root comes first, once.
                if entry.path.is_empty() == begun {
                    return Err(wrong("its root is not its first name"));
                }
                begun = true;
                open = builder.add(entry)?;
            }
            _ => return Err(wrong("its records are out of order")),
        }
    }
    let computed = input.hash.clone().finalize();
    if input.array::<32>()? != computed.as_slice() {
        return Err(wrong("its digest is wrong"));
    }
    if input.inner.read(&mut [0])? != 0 {
        return Err(wrong("something follows its end"));
    }
    builder.finish()
}

fn wrong(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Passes bytes on, and hashes them.
struct Hashing<T> {
    inner: T,
    hash: Sha256,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Hashing<T> {
    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.hash.update(bytes);
        Ok(bytes)
    }

    fn bytes(&mut self, most: usize) -> io::Result<Vec<u8>> {
        let length = u32::from_be_bytes(self.array()?) as usize;
        if length > most {
            return Err(wrong("it has something too long"));
        }
        let mut bytes = vec![0; length];
        self.inner.read_exact(&mut bytes)?;
        self.hash.update(&bytes);
        Ok(bytes)
    }

    fn entry(&mut self, tag: u8) -> io::Result<Entry> {
        let path = self.bytes(PATH_MAX)?;
        let mode = u32::from_be_bytes(self.array()?);
        let owner = (u32::from_be_bytes(self.array()?), u32::from_be_bytes(self.array()?));
        let modified = (i64::from_be_bytes(self.array()?), u32::from_be_bytes(self.array()?));
        let count = u32::from_be_bytes(self.array()?);
        if count > ATTRIBUTES_MAX {
            return Err(wrong("it has too many attributes"));
        }
        let mut attributes = Vec::new();
        for _ in 0..count {
            attributes.push((self.bytes(PATH_MAX)?, self.bytes(VALUE_MAX)?));
        }
        let kind = match tag {
            tag::DIRECTORY => Kind::Directory,
            tag::FILE => Kind::File(u64::from_be_bytes(self.array()?)),
            tag::SYMLINK => Kind::Symlink(self.bytes(PATH_MAX)?),
            tag::LINK => Kind::Link(self.bytes(PATH_MAX)?),
            tag::SPECIAL => Kind::Special { rdev: u64::from_be_bytes(self.array()?) },
            _ => return Err(wrong("it has an unknown record")),
        };
        Ok(Entry { path, kind, mode, owner, modified, attributes })
    }
}
