//! What of the host is in the project's file system.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use crate::{Report, Told, sys};

/// Files whose writing reaches the kernel. They are opened, never written.
const NOT_WRITABLE: [&str; 14] = [
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/panic",
    "/proc/sys/kernel/hostname",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/irq/default_smp_affinity",
    "/proc/mtrr",
    "/sys/kernel/uevent_helper",
    "/sys/power/state",
    "/sys/module/kernel/parameters/panic",
];
/// Files that tell secrets of the kernel or of other projects.
const NOT_READABLE: [&str; 12] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/kmsg",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/dev/mem",
    "/dev/kmsg",
    "/sys/kernel/vmcoreinfo",
];
/// Directories that must be empty or absent: devices, firmware, other projects'
/// quotas and cables, control groups.
const NOTHING_IN: [&str; 12] = [
    "/sys/firmware",
    "/sys/fs/cgroup",
    "/sys/fs/btrfs",
    "/sys/class/net",
    "/sys/class/block",
    "/sys/block",
    "/sys/devices/virtual/net",
    "/sys/kernel/debug",
    "/sys/kernel/security",
    "/sys/kernel/tracing",
    "/proc/acpi",
    "/proc/scsi",
];
/// Sockets and directories of the host's services.
const HOST_PATHS: [&str; 12] = [
    "/var/run/docker.sock",
    "/run/docker.sock",
    "/run/podman/podman.sock",
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
    "/run/cocalc",
    "/run/libpod",
    "/var/lib/containers",
    "/var/lib/cocalc",
    "/boot/vmlinuz",
];
/// Device nodes that every container has: major and minor number.
const DEVICES: [(u64, u64); 8] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];
/// Terminals have numbers from here.
const TERMINALS: std::ops::RangeInclusive<u64> = 136..=143;

pub(crate) fn check(told: &Told, report: &mut Report) {
    for path in NOT_WRITABLE {
        let opened = fs::OpenOptions::new().append(true).open(path);
        report.note(&format!("write {path}"), opened.is_err(), shown(&opened));
    }
    for path in NOT_READABLE {
        let read = read_some(path);
        let ok = !matches!(read, Ok(1..));
        report.note(&format!("read {path}"), ok, format!("{read:?}"));
    }
    for path in NOTHING_IN {
        let names = names(Path::new(path));
        report.note(&format!("nothing in {path}"), names.is_empty(), names.join(" "));
    }
    for path in HOST_PATHS.iter().copied().chain(told.absent.iter().map(String::as_str)) {
        report.note(&format!("absent {path}"), !Path::new(path).exists(), "");
    }
    release_agents(report);
    devices(report);
    make_devices(report);
    sockets(told, report);
    mounts(told, report);
}

fn shown<T>(result: &std::io::Result<T>) -> String {
    result.as_ref().err().map_or_else(|| "it was opened".into(), ToString::to_string)
}

fn read_some(path: &str) -> std::io::Result<usize> {
    use std::io::Read;
    fs::OpenOptions::new().read(true).open(path)?.take(16).read(&mut [0; 16])
}

fn names(path: &Path) -> Vec<String> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Control groups of version 1 run a program of the host's when they empty.
fn release_agents(report: &mut Report) {
    let mut found = Vec::new();
    let mut next = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((directory, depth)) = next.pop() {
        for name in names(&directory) {
            let path = directory.join(&name);
            if name == "release_agent" || name == "cgroup.procs" {
                found.push(path.display().to_string());
            } else if depth < 1 && path.is_dir() {
                next.push((path, depth + 1));
            }
        }
    }
    report.note("release agents", found.is_empty(), found.join(" "));
}

fn devices(report: &mut Report) {
    let mut strange = Vec::new();
    let mut next = vec![PathBuf::from("/dev")];
    while let Some(directory) = next.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(about) = fs::symlink_metadata(entry.path()) else { continue };
            let kind = about.file_type();
            // As the kernel packs the numbers of small ones.
            let (major, minor) = ((about.rdev() >> 8) & 0xfff, about.rdev() & 0xff);
            if kind.is_dir() {
                next.push(entry.path());
            } else if kind.is_block_device()
                || (kind.is_char_device()
                    && !DEVICES.contains(&(major, minor))
                    && !TERMINALS.contains(&major))
            {
                strange.push(format!("{} {major}:{minor}", entry.path().display()));
            }
        }
    }
    report.note("devices", strange.is_empty(), strange.join(" "));
}

/// Makes device nodes wherever this user may write.
fn make_devices(report: &mut Report) {
    const S_IFBLK: u32 = 0o060_600;
    const S_IFCHR: u32 = 0o020_600;
    for (directory, mode, major, minor) in [
        ("/tmp", S_IFBLK, 7, 0),
        ("/tmp", S_IFCHR, 1, 1),
        ("/home/user", S_IFBLK, 7, 0),
        ("/dev/shm", S_IFBLK, 7, 0),
    ] {
        let path = format!("{directory}/.escape-probe-{}", std::process::id());
        let made = sys::mknod(&path, mode, major, minor);
        let opened = made.is_ok() && fs::File::open(&path).is_ok();
        let _ = fs::remove_file(&path);
        report.note(
            &format!("make device {major}:{minor} in {directory}"),
            made.is_err(),
            format!("{made:?}, opened: {opened}"),
        );
    }
}

fn sockets(told: &Told, report: &mut Report) {
    for name in &told.abstracts {
        let connected = sys::connect_abstract(name);
        report.note(&format!("abstract socket {name}"), connected.is_err(), shown(&connected));
    }
    let mut found = Vec::new();
    let mut next: Vec<(PathBuf, u32)> =
        ["/run", "/tmp", "/dev", "/var/tmp"].map(|dir| (dir.into(), 0)).into();
    while let Some((directory, depth)) = next.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(about) = fs::symlink_metadata(entry.path()) else { continue };
            if about.is_dir() && depth < 4 {
                next.push((entry.path(), depth + 1));
            } else if about.file_type().is_socket() {
                found.push(entry.path().display().to_string());
            }
        }
    }
    report.note("sockets in files", found.is_empty(), found.join(" "));
}

/// What the table of mounts tells about the host.
fn mounts(told: &Told, report: &mut Report) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (mut reachable, mut propagating, mut named) = (Vec::new(), Vec::new(), Vec::new());
    let (mut home, mut writable) = (String::new(), Vec::new());
    for line in table.lines() {
        let (before, after) = line.split_once(" - ").unwrap_or((line, ""));
        let fields: Vec<&str> = before.split(' ').collect();
        let (Some(root), Some(point), Some(flags)) = (fields.get(3), fields.get(4), fields.get(5)) else {
            continue;
        };
        if fields.iter().skip(6).any(|field| field.starts_with("shared:")) {
            propagating.push((*point).to_owned());
        }
        named.extend(told.foreign.iter().filter(|other| line.contains(*other)).cloned());
        // Paths of the host in the options of a file system: none of them may
        // mean anything here.
        for word in after.split([' ', ',', '=', ':']).filter(|word| word.len() > 1 && word.starts_with('/')) {
            if Path::new(word).exists() && !word.starts_with("/dev/") {
                reachable.push(word.to_owned());
            }
            if word.starts_with("/dev/") && Path::new(word).exists() {
                reachable.push(word.to_owned());
            }
        }
        if *root == ".." || root.starts_with("/..") {
            // A mount whose root lies above this namespace's.
            reachable.push(format!("{root} at {point}"));
        }
        if *point == "/home/user" {
            home = (*flags).to_owned();
        }
        // What is masked is the null device.
        let kernels = (point.starts_with("/sys") || point.starts_with("/proc/")) && *root != "/null";
        if kernels && flags.split(',').any(|flag| flag == "rw") {
            writable.push((*point).to_owned());
        }
    }
    report.note("mounts lead to no path of the host", reachable.is_empty(), reachable.join(" "));
    report.note(
        "mounts do not propagate",
        propagating.is_empty() && !table.is_empty(),
        propagating.join(" "),
    );
    report.note("mounts name no other project", named.is_empty(), named.join(" "));
    let has = |flag: &str| home.split(',').any(|other| other == flag);
    report.note("the home is nosuid,nodev", has("nosuid") && has("nodev"), home.as_str());
    report.note("the kernel's files are read-only", writable.is_empty(), writable.join(" "));
}
