//! Trees with everything in them that a file system allows, and what must be
//! equal in a copy.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use sha2::{Digest as _, Sha256};

/// A size at which holes show.
const HOLEY_BYTES: u64 = 20 << 20;

/// Everything about one name that a copy must have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Facts {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    modified: (i64, i64),
    size: u64,
    content: Vec<u8>,
    device: u64,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same file.
    first_name: Option<Vec<u8>>,
    /// Whether less than half of it is on the disk.
    holey: bool,
}

impl Facts {
    /// The same, whether or not it has holes.
    #[must_use]
    pub fn solid(self) -> Self {
        Self { holey: false, ..self }
    }

    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == "directory"
    }

    /// The size of a regular file.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Bytes that do not compress, from a seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(length)
        .collect()
}

fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let to = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: to, last_modification: to };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("cannot set {name} on {}: {error}", path.display()));
}

/// Makes `root` a tree of hard cases, different for each seed in its contents.
pub fn plant(root: &Path, seed: u64) {
    fs::create_dir_all(root.join("home/deep")).unwrap();
    fs::create_dir_all(root.join("system/empty")).unwrap();
    let home = root.join("home");
    fs::write(home.join("notes.txt"), format!("notes {seed}\n")).unwrap();
    fs::write(home.join("nothing"), "").unwrap();
    fs::write(home.join(".hidden"), "hidden").unwrap();
    fs::write(home.join("large.bin"), noise(seed, 3 << 20)).unwrap();
    fs::create_dir(home.join("many")).unwrap();
    for number in 0..100 {
        fs::write(home.join(format!("many/{number}")), noise(seed + number, 700)).unwrap();
    }

    let mut holey = File::create(home.join("holey")).unwrap();
    holey.set_len(HOLEY_BYTES).unwrap();
    holey.seek(SeekFrom::Start(HOLEY_BYTES - 100)).unwrap();
    holey.write_all(b"the end").unwrap();
    drop(holey);

    fs::hard_link(home.join("notes.txt"), root.join("system/linked")).unwrap();
    fs::hard_link(home.join("notes.txt"), home.join("deep/linked")).unwrap();
    symlink("notes.txt", home.join("link")).unwrap();
    symlink("/nowhere/at/all", home.join("dangling")).unwrap();
    symlink("x".repeat(2000), home.join("long link")).unwrap();
    symlink(OsStr::from_bytes(b"to \xff\xfe"), home.join("raw link")).unwrap();
    for name in [&b"not utf-8 \xff\xc3"[..], b"two\nlines", b"back\\slash %41 \"quoted\" \x01", &[b'n'; 255]]
    {
        fs::write(home.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let mut below = home.join("deep");
    for level in 0..40 {
        below.push(format!("level-{level}"));
    }
    fs::create_dir_all(&below).unwrap();
    fs::write(below.join("bottom"), "bottom").unwrap();

    let special = |name: &str, kind, mode, device| {
        rustix::fs::mknodat(CWD, home.join(name), kind, Mode::from_raw_mode(mode), device)
            .unwrap_or_else(|error| panic!("cannot make {name}: {error}; this needs root"));
    };
    special("fifo", FileType::Fifo, 0o640, 0);
    special("null", FileType::CharacterDevice, 0o666, rustix::fs::makedev(1, 3));
    special("block", FileType::BlockDevice, 0o600, rustix::fs::makedev(7, 200));

    let owned = home.join("owned");
    fs::write(&owned, "owned").unwrap();
    lchown(&owned, Some(1234), Some(56_789)).unwrap();
    fs::set_permissions(&owned, fs::Permissions::from_mode(0o6755)).unwrap();
    lchown(home.join("link"), Some(1234), Some(1234)).unwrap();
    fs::set_permissions(home.join("nothing"), fs::Permissions::from_mode(0o0)).unwrap();
    fs::set_permissions(root.join("system/empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    set_attribute(&owned, "user.binary", b"\x00\xff\x00");
    set_attribute(&home.join("large.bin"), "trusted.overlay.opaque", b"y");
    set_attribute(&home.join("deep"), "user.on-a-directory", b"yes");
    // cap_net_raw+ep
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set_attribute(&home.join("many/1"), "security.capability", &capability);

    set_time(&home.join("many/2"), -86_400, 5);
    set_time(&home.join("many/3"), 4_102_444_800, 999_999_999);
    set_time(&home.join("link"), 1_000_000_000, 1);
    set_time(&root.join("system/empty"), 1_100_000_000, 123_456_789);
    lchown(root, Some(1000), Some(1001)).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o2750)).unwrap();
    set_attribute(root, "user.root", b"of the tree");
    set_time(root, 1_200_000_000, 42);
}

/// Changes a planted tree: edits, removals, renames that swap, changed kinds.
pub fn edit(root: &Path, seed: u64) {
    let home = root.join("home");
    fs::write(home.join("notes.txt"), format!("changed {seed}\n")).unwrap();
    fs::write(home.join("new"), noise(seed, 100_000)).unwrap();
    fs::remove_file(home.join("many/5")).unwrap();
    fs::rename(home.join("many/6"), home.join("swap")).unwrap();
    fs::rename(home.join("many/7"), home.join("many/6")).unwrap();
    fs::rename(home.join("swap"), home.join("many/7")).unwrap();
    fs::remove_file(home.join("many/8")).unwrap();
    fs::create_dir(home.join("many/8")).unwrap();
    fs::write(home.join("many/8/inside"), "inside").unwrap();
    fs::rename(home.join("deep"), root.join("system/moved")).unwrap();
    fs::set_permissions(home.join("many/9"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut large = File::options().write(true).open(home.join("large.bin")).unwrap();
    large.seek(SeekFrom::Start(1 << 20)).unwrap();
    large.write_all(&noise(seed + 1, 5000)).unwrap();
}

/// What is at and below `root`, by the path below it.
pub fn facts(root: &Path) -> BTreeMap<Vec<u8>, Facts> {
    let mut found = BTreeMap::new();
    let mut first_names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut open = vec![root.to_owned()];
    let mut paths: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let is_file = kind.is_file();
        let first_name = (is_file && metadata.nlink() > 1).then(|| {
            first_names.entry((metadata.dev(), metadata.ino())).or_insert_with(|| name.clone()).clone()
        });
        let (kind, content) = if is_file {
            ("file", digest(&path))
        } else if kind.is_dir() {
            ("directory", Vec::new())
        } else if kind.is_symlink() {
            ("link", fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
        } else if kind.is_fifo() {
            ("fifo", Vec::new())
        } else if kind.is_char_device() {
            ("character device", Vec::new())
        } else if kind.is_block_device() {
            ("block device", Vec::new())
        } else {
            ("socket", Vec::new())
        };
        let is_device = kind.ends_with("device");
        found.insert(
            name,
            Facts {
                kind,
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                size: if is_file { metadata.len() } else { 0 },
                content,
                device: if is_device { metadata.rdev() } else { 0 },
                attributes: attributes(&path),
                first_name,
                holey: is_file
                    && metadata.len() >= HOLEY_BYTES
                    && metadata.blocks() * 512 * 2 < metadata.len(),
            },
        );
    }
    found
}

fn digest(path: &Path) -> Vec<u8> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hash.finalize().to_vec(),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn attributes(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}

/// In what `b` is not as `a`, in words.
pub fn differences(a: &BTreeMap<Vec<u8>, Facts>, b: &BTreeMap<Vec<u8>, Facts>) -> Vec<String> {
    let shown = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    let mut differences: Vec<_> = b
        .keys()
        .filter(|name| !a.contains_key(*name))
        .map(|name| format!("{} is extra", shown(name)))
        .collect();
    for (name, facts) in a {
        match b.get(name) {
            None => differences.push(format!("{} is missing", shown(name))),
            Some(other) if other != facts => {
                differences.push(format!("{}: {facts:?} became {other:?}", shown(name)));
            }
            Some(_) => {}
        }
    }
    differences
}
