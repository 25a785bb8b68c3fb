//! Walks a send stream before anything of it is applied.

use cocalc_core::ids::{SnapshotName, VolumeUuid};

use super::format::{COMMAND_HEADER, COMMAND_MAX, MAGIC, PATH_MAX, attribute, command, each_attribute};

/// The longest that encoded data is when it is decoded; who applies it takes
/// so much memory.
const UNENCODED_MAX: u64 = 128 << 10;
/// How many ways to compress there are (`linux/btrfs.h`).
const COMPRESSIONS: u64 = 8;

/// Walks a Btrfs send stream and lets through only what is safe to apply: one
/// subvolume, the announced one, with its data, whole commands with right
/// checksums, paths that stay inside, encoded data of a bounded length, and
/// clones from nothing but itself, its base and the announced sources.
///
/// What it lets through can still say anything *within* the subvolume, device
/// nodes and setuid files included; volumes are mounted `nosuid,nodev`.
///
/// ```
/// # use cocalc_core::ids::VolumeUuid;
/// use cocalc_storage::StreamGuard;
///
/// # let Ok(name) = "first".parse() else { unreachable!() };
/// let mut guard = StreamGuard::new(&name, VolumeUuid::random(), None);
/// let mut safe = Vec::new();
/// assert!(guard.push(b"anything else", &mut safe).is_err());
/// assert!(safe.is_empty());
/// ```
#[derive(Debug)]
pub struct StreamGuard {
    name: String,
    origin: VolumeUuid,
    base: Option<VolumeUuid>,
    sources: Vec<VolumeUuid>,
    /// What is not a whole command yet; less than the longest one.
    pending: Vec<u8>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Header,
    /// The first command, with the index of the version.
    Subvolume(usize),
    Commands(usize),
    Ended,
}

/// Why a stream was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

pub(super) fn refuse<T>(reason: impl Into<String>) -> Result<T, Refused> {
    Err(Refused(reason.into()))
}

impl StreamGuard {
    /// Expects snapshot `name` with this origin, as a delta to the snapshot
    /// whose origin is `base`, or whole.
    pub fn new(name: &SnapshotName, origin: VolumeUuid, base: Option<VolumeUuid>) -> Self {
        let (name, sources, pending) = (name.to_string(), Vec::new(), Vec::new());
        Self { name, origin, base, sources, pending, stage: Stage::Header }
    }

    /// Lets it clone from snapshots with these origins too.
    pub fn sources(mut self, sources: Vec<VolumeUuid>) -> Self {
        self.sources = sources;
        self
    }

    /// Takes the next bytes of the stream, and appends to `safe` what may be
    /// applied.
    ///
    /// # Errors
    ///
    /// The first thing that is not safe. The guard must not be used after it.
    pub fn push(&mut self, bytes: &[u8], safe: &mut Vec<u8>) -> Result<(), Refused> {
        let mut rest = bytes;
        // First what was not whole before; most of it is checked where it
        // lies.
        while !self.pending.is_empty() && !rest.is_empty() {
            let missing = self.missing().min(rest.len());
            let (more, after) = rest.split_at(missing);
            self.pending.extend_from_slice(more);
            rest = after;
            let mut pending = std::mem::take(&mut self.pending);
            if self.step(&pending)?.is_some() {
                safe.append(&mut pending);
            }
            self.pending = pending;
        }
        let mut done = 0;
        while let Some(length) = self.step(&rest[done..])? {
            done += length;
        }
        safe.extend_from_slice(&rest[..done]);
        self.pending.extend_from_slice(&rest[done..]);
        Ok(())
    }

    /// How many bytes the unit that has begun needs at least.
    fn missing(&self) -> usize {
        let have = self.pending.len();
        let whole = match (self.stage, self.pending.first_chunk::<4>()) {
            (Stage::Header, _) => MAGIC.len() + 4,
            (_, Some(length)) if have >= COMMAND_HEADER => {
                COMMAND_HEADER + u32::from_le_bytes(*length) as usize
            }
            _ => COMMAND_HEADER,
        };
        whole.saturating_sub(have).max(1)
    }

    /// Says whether the stream, which has ended, was whole.
    ///
    /// # Errors
    ///
    /// It was cut.
    pub fn finish(&self) -> Result<(), Refused> {
        match self.stage {
            Stage::Ended if self.pending.is_empty() => Ok(()),
            Stage::Header => refuse("it ends before it begins"),
            _ => refuse("it is cut off"),
        }
    }

    /// The length of the first whole unit of `bytes`, which is safe; `None` if
    /// more has to come.
    fn step(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refused> {
        match self.stage {
            Stage::Header => self.header(bytes),
            Stage::Subvolume(version) | Stage::Commands(version) => self.command(bytes, version),
            Stage::Ended if bytes.is_empty() => Ok(None),
            Stage::Ended => refuse("something follows its end"),
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refused> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return refuse("it is not a btrfs send stream");
        }
        let Some((version, _)) = bytes.get(MAGIC.len()..).and_then(|rest| rest.split_first_chunk()) else {
            return Ok(None);
        };
        let version = match u32::from_le_bytes(*version) {
            1 => 0,
            2 => 1,
            other => return refuse(format!("its version is {other}")),
        };
        self.stage = Stage::Subvolume(version);
        Ok(Some(MAGIC.len() + 4))
    }

    fn command(&mut self, bytes: &[u8], version: usize) -> Result<Option<usize>, Refused> {
        let Some((header, rest)) = bytes.split_first_chunk::<COMMAND_HEADER>() else { return Ok(None) };
        let [l0, l1, l2, l3, c0, c1, s0, s1, s2, s3] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let command = u16::from_le_bytes([c0, c1]);
        if length > COMMAND_MAX[version] {
            return refuse("a command is too long");
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };

        // The kernel's checksum is the plain remainder, over the command with
        // zeros in the checksum's place; the crate's is inverted at both ends.
        let sum = crc32c::crc32c_append(!0, &[l0, l1, l2, l3, c0, c1, 0, 0, 0, 0]);
        if !crc32c::crc32c_append(sum, body) != u32::from_le_bytes([s0, s1, s2, s3]) {
            return refuse("a checksum is wrong");
        }
        if command == command::UPDATE_EXTENT {
            return refuse("it comes without the data of its files");
        }
        if command == 0 || command > command::LAST[version] {
            return refuse(format!("it has an unknown command {command}"));
        }
        let first = matches!(self.stage, Stage::Subvolume(_));
        match (command, first) {
            (command::SUBVOL | command::SNAPSHOT, true) => self.subvolume(command, body, version)?,
            (command::SUBVOL | command::SNAPSHOT, false) => return refuse("it holds a second subvolume"),
            (_, true) => return refuse("it does not begin with a subvolume"),
            (_, false) => self.inside(command, body, version)?,
        }
        self.stage = if command == command::END { Stage::Ended } else { Stage::Commands(version) };
        Ok(Some(COMMAND_HEADER + length))
    }

    /// Checks the command that names the subvolume.
    fn subvolume(&self, command: u16, body: &[u8], version: usize) -> Result<(), Refused> {
        let (mut name, mut uuid, mut base) = (None, None, None);
        each_attribute(body, version, |attribute, value| {
            let place = match attribute {
                attribute::PATH => &mut name,
                attribute::UUID => &mut uuid,
                attribute::CLONE_UUID => &mut base,
                attribute::PATH_TO | attribute::PATH_LINK | attribute::CLONE_PATH => {
                    return refuse("its subvolume has a second path");
                }
                _ => return Ok(()),
            };
            match place.replace(value.to_vec()) {
                Some(_) => refuse("its subvolume repeats an attribute"),
                None => Ok(()),
            }
        })?;
        if name.as_deref() != Some(self.name.as_bytes()) {
            return refuse("its subvolume has another name than announced");
        }
        if uuid.as_deref() != Some(self.origin.as_bytes().as_slice()) {
            return refuse("its subvolume is another than announced");
        }
        if base.as_deref() != self.base.as_ref().map(|base| base.as_bytes().as_slice())
            || (command == command::SNAPSHOT) != self.base.is_some()
        {
            return refuse("its base is another than announced");
        }
        Ok(())
    }

    /// Checks any other command.
    fn inside(&self, command: u16, body: &[u8], version: usize) -> Result<(), Refused> {
        each_attribute(body, version, |attribute, value| match attribute {
            // Where a symbolic link points is the project's own affair.
            attribute::PATH_LINK if command == command::SYMLINK => contained(value, true),
            attribute::PATH | attribute::PATH_TO | attribute::PATH_LINK | attribute::CLONE_PATH => {
                contained(value, false)
            }
            attribute::CLONE_UUID => {
                let mut ours = [self.origin].into_iter().chain(self.base).chain(self.sources.iter().copied());
                if ours.any(|uuid| value == uuid.as_bytes()) {
                    Ok(())
                } else {
                    refuse("it clones from a subvolume that is not its own")
                }
            }
            attribute::UNENCODED_FILE_LEN | attribute::UNENCODED_LEN | attribute::UNENCODED_OFFSET => {
                bounded(value, UNENCODED_MAX)
            }
            attribute::COMPRESSION => bounded(value, COMPRESSIONS - 1),
            attribute::ENCRYPTION => bounded(value, 0),
            _ => Ok(()),
        })
    }
}

/// Refuses a little-endian number above `max`.
fn bounded(value: &[u8], max: u64) -> Result<(), Refused> {
    let mut bytes = [0; 8];
    match bytes.get_mut(..value.len()) {
        Some(low) => low.copy_from_slice(value),
        None => return refuse("an attribute is too long"),
    }
    if u64::from_le_bytes(bytes) > max { refuse("encoded data is not as it can be") } else { Ok(()) }
}

/// Refuses a path that could lead outside, unless it is a link's target, and
/// any that C code would read otherwise than we do.
fn contained(path: &[u8], is_target: bool) -> Result<(), Refused> {
    if path.len() >= PATH_MAX || path.contains(&0) {
        return refuse("a path is too long or has a NUL in it");
    }
    if is_target {
        return Ok(());
    }
    if path.first() == Some(&b'/') || path.split(|byte| *byte == b'/').any(|part| part == b"..") {
        return refuse("a path leads outside");
    }
    Ok(())
}
