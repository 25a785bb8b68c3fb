//! The few kernel calls that the standard library does not have, declared by
//! hand: the helper is built from the standard library alone.

#![allow(unsafe_code, reason = "kernel calls, each with its own reason below")]

use std::{
    ffi::{CString, c_char, c_int, c_uint, c_ulong, c_void},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::Command,
};

pub(crate) const SIGHUP: c_int = 1;
pub(crate) const SIGKILL: c_int = 9;
pub(crate) const SIGTERM: c_int = 15;
const SIGCHLD: c_int = 17;
const SIG_SETMASK: c_int = 2;
const WNOHANG: c_int = 1;
const PR_SET_CHILD_SUBREAPER: c_int = 36;
const PR_SET_PDEATHSIG: c_int = 1;
const TCGETS: c_ulong = 0x5401;
const TCSETS: c_ulong = 0x5402;
const TIOCSCTTY: c_ulong = 0x540e;
const TIOCSWINSZ: c_ulong = 0x5414;
const TIOCSPTLCK: c_ulong = 0x4004_5431;
const TIOCGPTPEER: c_ulong = 0x5441;
const O_RDWR: c_int = 2;
pub(crate) const O_NOCTTY: c_int = 0o400;
pub(crate) const O_NONBLOCK: c_int = 0o4000;
const AT_FDCWD: c_int = -100;
const AT_SYMLINK_NOFOLLOW: c_int = 0x100;
const O_CLOEXEC: c_int = 0o2_000_000;
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const SO_PEERCRED: c_int = 17;
const SHUT_WR: c_int = 1;
const SIGNALS: c_int = 64;
const POLLIN: i16 = 1;
const F_SETFD: c_int = 2;
const FD_CLOEXEC: c_int = 1;

/// The most descriptors one message carries.
const FDS_MAX: usize = 3;

#[repr(C)]
struct IoVec {
    base: *mut c_void,
    len: usize,
}

#[repr(C)]
struct MsgHdr {
    name: *mut c_void,
    name_len: c_uint,
    iov: *mut IoVec,
    iov_len: usize,
    control: *mut c_void,
    control_len: usize,
    flags: c_int,
}

/// A control message with room for [`FDS_MAX`] descriptors, as the kernel lays
/// it out on 64-bit Linux.
#[repr(C)]
struct Control {
    len: usize,
    level: c_int,
    kind: c_int,
    fds: [c_int; FDS_MAX],
    _padding: c_int,
}

#[repr(C)]
struct SigSet([c_ulong; 16]);

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: i16,
    revents: i16,
}

#[repr(C)]
struct WinSize {
    rows: u16,
    cols: u16,
    x: u16,
    y: u16,
}

#[repr(C)]
struct PeerCred {
    pid: c_int,
    uid: c_uint,
    gid: c_uint,
}

#[repr(C)]
struct TimeSpec {
    seconds: i64,
    nanos: i64,
}

/// What a file system has, as the C library lays it out on 64-bit Linux.
#[repr(C)]
#[derive(Default)]
struct StatVfs {
    block: c_ulong,
    fragment: c_ulong,
    counts: [u64; 6],
    id: c_ulong,
    flags: c_ulong,
    name_max: c_ulong,
    _spare: [c_int; 6],
}

unsafe extern "C" {
    fn fstatvfs(fd: c_int, found: *mut StatVfs) -> c_int;
    fn utimensat(dir: c_int, path: *const c_char, times: *const TimeSpec, flags: c_int) -> c_int;
    fn sendmsg(fd: c_int, msg: *const MsgHdr, flags: c_int) -> isize;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn dup2(old: c_int, new: c_int) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut c_void, len: *mut c_uint) -> c_int;
    fn geteuid() -> c_uint;
    fn recvmsg(fd: c_int, msg: *mut MsgHdr, flags: c_int) -> isize;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn prctl(option: c_int, ...) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn setsid() -> c_int;
    fn setgroups(count: usize, groups: *const c_uint) -> c_int;
    fn setgid(gid: c_uint) -> c_int;
    fn setuid(uid: c_uint) -> c_int;
    fn umask(mask: c_uint) -> c_uint;
    fn chdir(path: *const c_char) -> c_int;
    fn poll(fds: *mut PollFd, count: c_ulong, millis: c_int) -> c_int;
    fn sigemptyset(set: *mut SigSet) -> c_int;
    fn sigaddset(set: *mut SigSet, signal: c_int) -> c_int;
    fn pthread_sigmask(how: c_int, set: *const SigSet, old: *mut SigSet) -> c_int;
    fn sigwait(set: *const SigSet, signal: *mut c_int) -> c_int;
    fn getpid() -> c_int;
    fn signal(number: c_int, handler: usize) -> usize;
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
}

/// Whether this process is the first of its PID namespace.
pub(crate) fn is_init() -> bool {
    // SAFETY: takes no argument and cannot fail.
    unsafe { getpid() == 1 }
}

/// Makes orphans below this process its children.
pub(crate) fn become_subreaper() {
    // SAFETY: a flag of this process, no memory involved.
    unsafe { prctl(PR_SET_CHILD_SUBREAPER, 1 as c_ulong, 0 as c_ulong, 0 as c_ulong, 0 as c_ulong) };
}

/// Starts a session of its own, so that a signal to the starter's terminal
/// does not reach it.
pub(crate) fn new_session() {
    // SAFETY: takes no argument; fails harmlessly for a session leader.
    unsafe { setsid() };
}

/// The signals that the main thread waits for.
pub(crate) struct Signals(SigSet);

impl Signals {
    /// Blocks them, in this thread and those it will start.
    pub(crate) fn block() -> Self {
        let mut set = SigSet([0; 16]);
        // SAFETY: the set is ours, initialized, and of the C library's size.
        unsafe {
            sigemptyset(&mut set);
            sigaddset(&mut set, SIGCHLD);
            sigaddset(&mut set, SIGTERM);
            pthread_sigmask(SIG_SETMASK, &set, std::ptr::null_mut());
        }
        Self(set)
    }

    /// Waits for one; true if it asks to end.
    pub(crate) fn wait(&self) -> bool {
        let mut signal = 0;
        // SAFETY: both point to initialized memory of ours.
        unsafe { sigwait(&self.0, &mut signal) };
        signal == SIGTERM
    }
}

/// Reaps one ended child: its pid and status.
pub(crate) fn reap() -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is ours.
    match unsafe { waitpid(-1, &mut status, WNOHANG) } {
        pid if pid > 0 => Some((pid, status)),
        _ => None,
    }
}

/// Sends a signal; whether somebody got it.
pub(crate) fn send_signal(pid: i32, signal: i32) -> bool {
    // SAFETY: no memory involved.
    unsafe { kill(pid, signal) == 0 }
}

/// Whether there is something to read, or the end, within `millis`.
pub(crate) fn readable(file: &impl AsRawFd, millis: i32) -> bool {
    let mut fds = PollFd { fd: file.as_raw_fd(), events: POLLIN, revents: 0 };
    // SAFETY: one valid entry, and the count says so.
    unsafe { poll(&mut fds, 1, millis) > 0 }
}

/// Opens a new terminal: the two ends.
pub(crate) fn open_pty() -> io::Result<(File, File)> {
    let master = File::options().read(true).write(true).open("/dev/ptmx")?;
    let unlocked: c_int = 0;
    // SAFETY: the request takes a pointer to an int.
    if unsafe { ioctl(master.as_raw_fd(), TIOCSPTLCK, &unlocked) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes open flags by value, and gives a descriptor.
    let peer = unsafe { ioctl(master.as_raw_fd(), TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC) };
    if peer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok((master, unsafe { File::from_raw_fd(peer) }))
}

/// Sets the size of a terminal.
pub(crate) fn set_size(terminal: &File, cols: u16, rows: u16) {
    let size = WinSize { rows, cols, x: 0, y: 0 };
    // SAFETY: the request takes a pointer to this struct.
    unsafe { ioctl(terminal.as_raw_fd(), TIOCSWINSZ, &size) };
}

/// The modes of a terminal, as the kernel lays them out on x86-64 and on 64-bit
/// Arm (`struct termios` of asm-generic/termbits.h).
#[repr(C)]
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Termios {
    pub(crate) input: u32,
    pub(crate) output: u32,
    pub(crate) control: u32,
    pub(crate) local: u32,
    line: u8,
    pub(crate) characters: [u8; 19],
}

/// The modes that a terminal has.
pub(crate) fn modes(terminal: &File) -> Option<Termios> {
    let mut found = Termios::default();
    // SAFETY: the request fills this struct, which is ours.
    (unsafe { ioctl(terminal.as_raw_fd(), TCGETS, &mut found) } == 0).then_some(found)
}

/// Gives a terminal these modes.
pub(crate) fn set_modes(terminal: &File, modes: &Termios) {
    // SAFETY: the request takes a pointer to this struct.
    unsafe { ioctl(terminal.as_raw_fd(), TCSETS, modes) };
}

/// Who a process is to be.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Makes the child of `command` the leader of a session (with its standard
/// input as terminal), the given user, and puts it into the first directory
/// of `directories` that it may enter.
pub(crate) fn on_spawn(
    command: &mut Command,
    identity: Option<Identity>,
    tty: bool,
    directories: Vec<CString>,
) {
    let become_it = move || {
        let empty = SigSet([0; 16]);
        // SAFETY: only calls that are safe between fork and exec, on memory
        // that was allocated before.
        unsafe {
            // What whoever started the host had ignored is no wish of the project.
            for number in 1..=SIGNALS {
                signal(number, 0);
            }
            pthread_sigmask(SIG_SETMASK, &empty, std::ptr::null_mut());
            if setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            if tty && ioctl(0, TIOCSCTTY, 0 as c_ulong) != 0 {
                return Err(io::Error::last_os_error());
            }
            if let Some(identity) = &identity
                && (setgroups(identity.groups.len(), identity.groups.as_ptr()) != 0
                    || setgid(identity.gid) != 0
                    || setuid(identity.uid) != 0)
            {
                return Err(io::Error::last_os_error());
            }
            umask(0o022);
            let _ = directories.iter().any(|directory| chdir(directory.as_ptr()) == 0);
            // A parent that dies must not take its children along: PID 1 and
            // the supervisor decide that themselves.
            prctl(PR_SET_PDEATHSIG, 0 as c_ulong);
        }
        Ok(())
    };
    // SAFETY: the closure is as `pre_exec` demands, see above.
    unsafe { command.pre_exec(become_it) };
}

/// Takes over a descriptor that was inherited by number. It is not inherited
/// any further: who has the socket is asked to start the project's processes.
pub(crate) fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: whoever started this process passed it, and it is taken once.
    unsafe {
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        OwnedFd::from_raw_fd(fd)
    }
}

/// Receives one byte and the descriptors that came with it.
pub(crate) fn receive_fds(stream: &UnixStream) -> io::Result<(u8, Vec<OwnedFd>)> {
    let mut byte = 0_u8;
    let mut iov = IoVec { base: (&raw mut byte).cast(), len: 1 };
    let mut control = Control { len: 0, level: 0, kind: 0, fds: [-1; FDS_MAX], _padding: 0 };
    let mut message = MsgHdr {
        name: std::ptr::null_mut(),
        name_len: 0,
        iov: &mut iov,
        iov_len: 1,
        control: (&raw mut control).cast(),
        control_len: size_of::<Control>(),
        flags: 0,
    };
    // SAFETY: every pointer is to live memory of the length beside it.
    let count = unsafe { recvmsg(stream.as_raw_fd(), &mut message, MSG_CMSG_CLOEXEC) };
    match count {
        1 => {}
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => return Err(io::Error::last_os_error()),
    }
    let header = std::mem::offset_of!(Control, fds);
    if message.control_len < header || control.level != SOL_SOCKET || control.kind != SCM_RIGHTS {
        return Ok((byte, Vec::new()));
    }
    let count = (control.len.saturating_sub(header) / size_of::<c_int>()).min(FDS_MAX);
    // SAFETY: the kernel made these descriptors for us, and says how many.
    Ok((byte, control.fds[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect()))
}

/// Reads one frame: its length as a big-endian u32, then so many bytes.
pub(crate) fn read_frame(stream: &mut impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame)?;
    Ok(frame)
}

/// Sends one byte and a descriptor with it.
pub(crate) fn send_fd(stream: &UnixStream, fd: &impl AsRawFd) -> io::Result<()> {
    let mut byte = 0_u8;
    let mut iov = IoVec { base: (&raw mut byte).cast(), len: 1 };
    let header = std::mem::offset_of!(Control, fds);
    let mut control = Control {
        len: header + size_of::<c_int>(),
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        fds: [-1; FDS_MAX],
        _padding: 0,
    };
    control.fds[0] = fd.as_raw_fd();
    let message = MsgHdr {
        name: std::ptr::null_mut(),
        name_len: 0,
        iov: &mut iov,
        iov_len: 1,
        control: (&raw mut control).cast(),
        // Padded to a word, as the kernel counts it.
        control_len: (header + size_of::<c_int>()).next_multiple_of(size_of::<usize>()),
        flags: 0,
    };
    // SAFETY: every pointer is to live memory of the length beside it.
    match unsafe { sendmsg(stream.as_raw_fd(), &message, 0) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends the sending half of a connection.
pub(crate) fn end_sending(socket: &impl AsRawFd) {
    // SAFETY: no memory involved.
    unsafe { shutdown(socket.as_raw_fd(), SHUT_WR) };
}

/// Whether the other end is a process of the same user, or of root.
pub(crate) fn is_own(stream: &UnixStream) -> bool {
    let mut cred = PeerCred { pid: 0, uid: u32::MAX, gid: 0 };
    let mut length = size_of::<PeerCred>() as c_uint;
    // SAFETY: `cred` is live and `length` is its size.
    let told = unsafe {
        getsockopt(stream.as_raw_fd(), SOL_SOCKET, SO_PEERCRED, (&raw mut cred).cast(), &mut length)
    };
    // SAFETY: takes no argument and cannot fail.
    told == 0 && (cred.uid == 0 || cred.uid == unsafe { geteuid() })
}

/// Sets the mask of new files' modes, and returns the former one.
pub(crate) fn set_umask(mask: u32) -> u32 {
    // SAFETY: no memory involved.
    unsafe { umask(mask) }
}

/// Sets the times of last access and modification, in seconds.
pub(crate) fn set_times(path: &Path, accessed: u32, modified: u32, follow: bool) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let times = [accessed, modified].map(|seconds| TimeSpec { seconds: seconds.into(), nanos: 0 });
    let flags = if follow { 0 } else { AT_SYMLINK_NOFOLLOW };
    // SAFETY: a string that ends, and two times, as the call demands.
    match unsafe { utimensat(AT_FDCWD, path.as_ptr(), times.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The eleven numbers of `statvfs`, in their order.
pub(crate) fn space(file: &File) -> io::Result<[u64; 11]> {
    let mut found = StatVfs::default();
    // SAFETY: the struct is ours and of the C library's layout.
    if unsafe { fstatvfs(file.as_raw_fd(), &mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [a, b, c, d, e, f] = found.counts;
    Ok([found.block, found.fragment, a, b, c, d, e, f, found.id, found.flags, found.name_max])
}

/// Lets go of standard error, so that whoever reads it sees its end.
pub(crate) fn end_errors() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        // SAFETY: no memory involved.
        unsafe { dup2(null.as_raw_fd(), 2) };
    }
}
