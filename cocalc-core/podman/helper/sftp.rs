//! The sftp server for images that bring none: version 3, and the extensions
//! of OpenSSH's that clients use. It runs inside the project as its user, so
//! that the kernel, and not this file, keeps it in. That is also why it is
//! written here: the helper runs in any image, and has the standard library
//! alone.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, DirBuilder, File, FileTimes, Metadata, OpenOptions, Permissions},
    io::{self, BufReader, BufWriter, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{
            DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown,
            symlink,
        },
    },
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::sys;

/// The largest request: OpenSSH's limit.
const PACKET_BYTES_MAX: usize = 256 * 1024;
/// The most that one read returns.
const READ_BYTES_MAX: usize = PACKET_BYTES_MAX - 1024;
/// Open files and directories.
const HANDLES_MAX: usize = 512;
/// Names in one answer.
const NAMES_MAX: usize = 128;

const STATUS_OK: u32 = 0;
const STATUS_EOF: u32 = 1;
const STATUS_NO_SUCH_FILE: u32 = 2;
const STATUS_DENIED: u32 = 3;
const STATUS_FAILURE: u32 = 4;
const STATUS_BAD_MESSAGE: u32 = 5;
const STATUS_UNSUPPORTED: u32 = 8;

const ATTR_SIZE: u32 = 1;
const ATTR_OWNER: u32 = 2;
const ATTR_MODE: u32 = 4;
const ATTR_TIMES: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;

const OPEN_READ: u32 = 1;
const OPEN_WRITE: u32 = 2;
const OPEN_APPEND: u32 = 4;
const OPEN_CREATE: u32 = 8;
const OPEN_TRUNCATE: u32 = 16;
const OPEN_EXCLUSIVE: u32 = 32;

const EXTENSIONS: [(&str, &str); 7] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
];

/// Serves standard input and output until the client ends it.
pub(crate) fn serve() -> i32 {
    let mut input = BufReader::with_capacity(PACKET_BYTES_MAX, File::from(sys::inherited(0)));
    let mut output = BufWriter::with_capacity(PACKET_BYTES_MAX, File::from(sys::inherited(1)));
    let mut server = Server::default();
    loop {
        // Answers go out when no request is waiting.
        if input.buffer().is_empty() && output.flush().is_err() {
            return 1;
        }
        let Ok(packet) = sys::read_frame(&mut input, PACKET_BYTES_MAX) else {
            let _ = output.flush();
            return 0;
        };
        let Some(answer) = server.answer(&packet) else { return 1 };
        let length = u32::try_from(answer.len()).unwrap_or(u32::MAX).to_be_bytes();
        if output.write_all(&length).and_then(|()| output.write_all(&answer)).is_err() {
            return 1;
        }
    }
}

enum Handle {
    File { file: File, append: bool },
    Directory { path: PathBuf, entries: fs::ReadDir, begun: bool },
}

#[derive(Default)]
struct Server {
    handles: BTreeMap<u32, Handle>,
    last: u32,
}

/// Why a request failed.
enum Failed {
    Code(u32, &'static str),
    Io(io::Error),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

const BAD: Failed = Failed::Code(STATUS_BAD_MESSAGE, "the request is malformed");
const NO_HANDLE: Failed = Failed::Code(STATUS_FAILURE, "no such handle");

type Answer = Result<Vec<u8>, Failed>;

impl Server {
    /// The answer to a packet; `None` for what is no request at all.
    fn answer(&mut self, packet: &[u8]) -> Option<Vec<u8>> {
        let (kind, rest) = packet.split_first()?;
        let mut fields = Fields(rest);
        if *kind == 1 {
            let mut out = vec![2];
            out.extend(3_u32.to_be_bytes());
            for (name, version) in EXTENSIONS {
                put(&mut out, name.as_bytes());
                put(&mut out, version.as_bytes());
            }
            return Some(out);
        }
        let id = fields.u32().ok()?;
        let body = self.request(*kind, &mut fields).unwrap_or_else(|failed| match failed {
            Failed::Code(code, message) => status(code, message),
            Failed::Io(error) => {
                let code = match error.kind() {
                    io::ErrorKind::NotFound => STATUS_NO_SUCH_FILE,
                    io::ErrorKind::PermissionDenied => STATUS_DENIED,
                    _ => STATUS_FAILURE,
                };
                status(code, &error.to_string())
            }
        });
        // The number goes behind the kind.
        let mut out = Vec::with_capacity(body.len() + 4);
        let (kind, body) = body.split_first()?;
        out.push(*kind);
        out.extend(id.to_be_bytes());
        out.extend_from_slice(body);
        Some(out)
    }

    fn request(&mut self, kind: u8, fields: &mut Fields<'_>) -> Answer {
        match kind {
            3 => self.open(fields),
            4 => {
                self.handles.remove(&fields.handle()?).ok_or(NO_HANDLE)?;
                done()
            }
            5 => {
                let (handle, offset, length) = (fields.handle()?, fields.u64()?, fields.u32()?);
                let (file, _) = self.file(handle)?;
                let mut out = vec![103, 0, 0, 0, 0];
                out.resize(5 + (length as usize).min(READ_BYTES_MAX), 0);
                let count = file.read_at(&mut out[5..], offset)?;
                if count == 0 {
                    return Err(Failed::Code(STATUS_EOF, "end of file"));
                }
                out.truncate(5 + count);
                out[1..5].copy_from_slice(&u32::try_from(count).unwrap_or(0).to_be_bytes());
                Ok(out)
            }
            6 => {
                let (handle, offset, data) = (fields.handle()?, fields.u64()?, fields.bytes()?);
                let (file, append) = self.file(handle)?;
                if append {
                    (&*file).write_all(data)?
                } else {
                    file.write_all_at(data, offset)?
                }
                done()
            }
            7 => Ok(attributes(&fs::symlink_metadata(fields.path()?)?)),
            17 => Ok(attributes(&fs::metadata(fields.path()?)?)),
            8 => match self.handles.get(&fields.handle()?).ok_or(NO_HANDLE)? {
                Handle::File { file, .. } => Ok(attributes(&file.metadata()?)),
                Handle::Directory { path, .. } => Ok(attributes(&fs::metadata(path)?)),
            },
            9 => {
                let path = fields.path()?;
                fields.attributes()?.set(path, true)?;
                done()
            }
            10 => {
                let handle = fields.handle()?;
                let wanted = fields.attributes()?;
                match self.handles.get(&handle).ok_or(NO_HANDLE)? {
                    Handle::File { file, .. } => wanted.set_open(file)?,
                    Handle::Directory { path, .. } => wanted.set(path, true)?,
                }
                done()
            }
            11 => {
                let path = fields.path()?.to_owned();
                let entries = fs::read_dir(&path)?;
                self.keep(Handle::Directory { path, entries, begun: false })
            }
            12 => self.names(fields.handle()?),
            13 => {
                fs::remove_file(fields.path()?)?;
                done()
            }
            14 => {
                let path = fields.path()?;
                let mode = fields.attributes()?.mode.unwrap_or(0o777);
                DirBuilder::new().mode(mode & 0o7777).create(path)?;
                done()
            }
            15 => {
                fs::remove_dir(fields.path()?)?;
                done()
            }
            16 => Ok(name(real(fields.path()?)?.as_os_str())),
            18 => {
                rename(fields.path()?, fields.path()?)?;
                done()
            }
            19 => Ok(name(fs::read_link(fields.path()?)?.as_os_str())),
            20 => {
                // In OpenSSH's order, which all clients know.
                let (target, link) = (fields.path()?, fields.path()?);
                symlink(target, link)?;
                done()
            }
            200 => self.extended(fields),
            _ => Err(Failed::Code(STATUS_UNSUPPORTED, "not supported")),
        }
    }

    fn extended(&mut self, fields: &mut Fields<'_>) -> Answer {
        match fields.bytes()? {
            b"posix-rename@openssh.com" => fs::rename(fields.path()?, fields.path()?)?,
            b"hardlink@openssh.com" => fs::hard_link(fields.path()?, fields.path()?)?,
            b"fsync@openssh.com" => self.file(fields.handle()?)?.0.sync_all()?,
            b"lsetstat@openssh.com" => {
                let path = fields.path()?;
                fields.attributes()?.set(path, false)?;
            }
            b"statvfs@openssh.com" => return space(&File::open(fields.path()?)?),
            b"fstatvfs@openssh.com" => return space(self.file(fields.handle()?)?.0),
            b"limits@openssh.com" => {
                let mut out = vec![201];
                let limits = [PACKET_BYTES_MAX, READ_BYTES_MAX, READ_BYTES_MAX, HANDLES_MAX];
                out.extend(limits.iter().flat_map(|limit| (*limit as u64).to_be_bytes()));
                return Ok(out);
            }
            _ => return Err(Failed::Code(STATUS_UNSUPPORTED, "not supported")),
        }
        done()
    }

    fn open(&mut self, fields: &mut Fields<'_>) -> Answer {
        let path = fields.path()?;
        let flags = fields.u32()?;
        let mode = fields.attributes()?.mode.unwrap_or(0o666) & 0o7777;
        let has = |flag| flags & flag != 0;
        let mut options = OpenOptions::new();
        // A FIFO must not hold the server.
        options.read(has(OPEN_READ)).write(has(OPEN_WRITE) || has(OPEN_APPEND)).mode(mode);
        options.custom_flags(sys::O_NONBLOCK | sys::O_NOCTTY);
        options.append(has(OPEN_APPEND));
        if has(OPEN_CREATE) && has(OPEN_EXCLUSIVE) {
            options.create_new(true);
        } else {
            options.create(has(OPEN_CREATE));
        }
        if has(OPEN_TRUNCATE) && !has(OPEN_APPEND) {
            options.truncate(true);
        }
        let file = options.open(path)?;
        if file.metadata()?.is_dir() {
            return Err(Failed::Code(STATUS_FAILURE, "it is a directory"));
        }
        self.keep(Handle::File { file, append: has(OPEN_APPEND) })
    }

    fn keep(&mut self, handle: Handle) -> Answer {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Failed::Code(STATUS_FAILURE, "too many open files"));
        }
        self.last = self.last.wrapping_add(1);
        self.handles.insert(self.last, handle);
        let mut out = vec![102];
        put(&mut out, &self.last.to_be_bytes());
        Ok(out)
    }

    fn file(&self, handle: u32) -> Result<(&File, bool), Failed> {
        match self.handles.get(&handle) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(NO_HANDLE),
        }
    }

    fn names(&mut self, handle: u32) -> Answer {
        let Some(Handle::Directory { path, entries, begun }) = self.handles.get_mut(&handle) else {
            return Err(NO_HANDLE);
        };
        let (mut out, mut count) = (vec![104, 0, 0, 0, 0], 0_u32);
        if !std::mem::replace(begun, true) {
            for (name, path) in [(".", path.clone()), ("..", path.join(".."))] {
                if let Ok(metadata) = fs::metadata(path) {
                    entry(&mut out, OsStr::new(name), &metadata);
                    count += 1;
                }
            }
        }
        for found in entries.by_ref().take(NAMES_MAX) {
            let found = found?;
            // What has gone meanwhile is left out.
            if let Ok(metadata) = found.metadata() {
                entry(&mut out, &found.file_name(), &metadata);
                count += 1;
            }
        }
        if count == 0 {
            return Err(Failed::Code(STATUS_EOF, "end of directory"));
        }
        out[1..5].copy_from_slice(&count.to_be_bytes());
        Ok(out)
    }
}

fn done() -> Answer {
    Ok(status(STATUS_OK, ""))
}

fn status(code: u32, message: &str) -> Vec<u8> {
    let mut out = vec![101];
    out.extend(code.to_be_bytes());
    put(&mut out, message.as_bytes());
    put(&mut out, b"");
    out
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// One name, without attributes.
fn name(name: &OsStr) -> Vec<u8> {
    let mut out = vec![104, 0, 0, 0, 1];
    put(&mut out, name.as_bytes());
    put(&mut out, name.as_bytes());
    out.extend(0_u32.to_be_bytes());
    out
}

fn entry(out: &mut Vec<u8>, name: &OsStr, metadata: &Metadata) {
    put(out, name.as_bytes());
    let mut line = listing(metadata).into_bytes();
    line.extend_from_slice(name.as_bytes());
    put(out, &line);
    put_attributes(out, metadata);
}

fn attributes(metadata: &Metadata) -> Vec<u8> {
    let mut out = vec![105];
    put_attributes(&mut out, metadata);
    out
}

fn put_attributes(out: &mut Vec<u8>, metadata: &Metadata) {
    out.extend((ATTR_SIZE | ATTR_OWNER | ATTR_MODE | ATTR_TIMES).to_be_bytes());
    out.extend(metadata.size().to_be_bytes());
    let time = |seconds: i64| u32::try_from(seconds.max(0)).unwrap_or(u32::MAX);
    let rest =
        [metadata.uid(), metadata.gid(), metadata.mode(), time(metadata.atime()), time(metadata.mtime())];
    out.extend(rest.iter().flat_map(|value| value.to_be_bytes()));
}

/// What `ls -l` shows before the name; some clients read it.
fn listing(metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let letter = match () {
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_char_device() => 'c',
        () if kind.is_block_device() => 'b',
        () => '-',
    };
    let mode = metadata.mode();
    let mut rights: Vec<u8> =
        (0..9).map(|bit| if mode >> (8 - bit) & 1 == 1 { b"rwx"[bit % 3] } else { b'-' }).collect();
    for (bit, at, letter) in [(0o4000, 2, b's'), (0o2000, 5, b's'), (0o1000, 8, b't')] {
        if mode & bit != 0 {
            rights[at] = if rights[at] == b'x' { letter } else { letter.to_ascii_uppercase() };
        }
    }
    let rights = String::from_utf8(rights).unwrap_or_default();
    let (links, uid, gid, size) = (metadata.nlink(), metadata.uid(), metadata.gid(), metadata.size());
    format!("{letter}{rights} {links:>4} {uid:<8} {gid:<8} {size:>8} {} ", date(metadata.mtime()))
}

/// `Jan  2  2026`, in UTC.
fn date(seconds: i64) -> String {
    // Days are counted from March, so that a leap day ends the year.
    let days = seconds.div_euclid(86_400) + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = (shifted + 2) % 12;
    let year = year_of_era + era * 400 + i64::from(month < 2);
    let names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let name = usize::try_from(month).ok().and_then(|month| names.get(month)).unwrap_or(&"Jan");
    format!("{name} {day:>2}  {year}")
}

/// The path that a name means. The last part need not exist.
fn real(path: &Path) -> io::Result<PathBuf> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else { return Err(error) };
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(fs::canonicalize(parent)?.join(name))
        }
        other => other,
    }
}

/// Renames, and replaces nothing: version 3 promises that.
fn rename(from: &Path, to: &Path) -> Result<(), Failed> {
    if !fs::symlink_metadata(from)?.is_file() {
        if fs::symlink_metadata(to).is_ok() {
            return Err(Failed::Code(STATUS_FAILURE, "there is something of that name"));
        }
        return Ok(fs::rename(from, to)?);
    }
    match fs::hard_link(from, to) {
        Ok(()) => Ok(fs::remove_file(from)?),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Failed::Code(STATUS_FAILURE, "there is something of that name"))
        }
        // File systems without hard links.
        Err(_) if fs::symlink_metadata(to).is_err() => Ok(fs::rename(from, to)?),
        Err(error) => Err(error.into()),
    }
}

fn space(file: &File) -> Answer {
    let mut out = vec![201];
    out.extend(sys::space(file)?.iter().flat_map(|value| value.to_be_bytes()));
    Ok(out)
}

/// The attributes that a client sends.
#[derive(Default)]
struct Wanted {
    size: Option<u64>,
    owner: Option<(u32, u32)>,
    mode: Option<u32>,
    times: Option<(u32, u32)>,
}

impl Wanted {
    fn set(&self, path: &Path, follow: bool) -> io::Result<()> {
        if let Some(size) = self.size {
            OpenOptions::new().write(true).custom_flags(sys::O_NONBLOCK).open(path)?.set_len(size)?;
        }
        if let Some(mode) = self.mode {
            if !follow && fs::symlink_metadata(path)?.is_symlink() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))?;
        }
        if let Some((accessed, modified)) = self.times {
            sys::set_times(path, accessed, modified, follow)?;
        }
        if let Some((uid, gid)) = self.owner {
            if follow {
                chown(path, Some(uid), Some(gid))?
            } else {
                std::os::unix::fs::lchown(path, Some(uid), Some(gid))?
            }
        }
        Ok(())
    }

    fn set_open(&self, file: &File) -> io::Result<()> {
        if let Some(size) = self.size {
            file.set_len(size)?;
        }
        if let Some(mode) = self.mode {
            file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        }
        if let Some((accessed, modified)) = self.times {
            let at = |seconds: u32| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.into());
            file.set_times(FileTimes::new().set_accessed(at(accessed)).set_modified(at(modified)))?;
        }
        if let Some((uid, gid)) = self.owner {
            fchown(file, Some(uid), Some(gid))?;
        }
        Ok(())
    }
}

/// Reads the fields of a request.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Failed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(BAD)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, Failed> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Failed> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Failed> {
        let length = self.u32()? as usize;
        let (head, rest) = self.0.split_at_checked(length).ok_or(BAD)?;
        self.0 = rest;
        Ok(head)
    }

    fn path(&mut self) -> Result<&'a Path, Failed> {
        self.bytes().map(|bytes| Path::new(OsStr::from_bytes(bytes)))
    }

    fn handle(&mut self) -> Result<u32, Failed> {
        self.bytes()?.try_into().map(u32::from_be_bytes).map_err(|_| NO_HANDLE)
    }

    fn attributes(&mut self) -> Result<Wanted, Failed> {
        let flags = self.u32()?;
        let mut wanted = Wanted::default();
        if flags & ATTR_SIZE != 0 {
            wanted.size = Some(self.u64()?);
        }
        if flags & ATTR_OWNER != 0 {
            wanted.owner = Some((self.u32()?, self.u32()?));
        }
        if flags & ATTR_MODE != 0 {
            wanted.mode = Some(self.u32()?);
        }
        if flags & ATTR_TIMES != 0 {
            wanted.times = Some((self.u32()?, self.u32()?));
        }
        if flags & ATTR_EXTENDED != 0 {
            for _ in 0..self.u32()? {
                self.bytes()?;
                self.bytes()?;
            }
        }
        Ok(wanted)
    }
}
