//! The kernel calls that no safe crate offers yet.

#![allow(
    unsafe_code,
    reason = "mount_setattr, setfsuid, unshare, signal and landlock_restrict_self have no safe wrapper, nor has \
              waiting for a descriptor of any kind"
)]

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
};

use rustix::{
    process::{Resource, Rlimit},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags},
};
use tokio::io::unix::AsyncFd;

/// How many ids each project has.
pub(crate) const IDS_PER_PROJECT: u32 = 65_536;

/// Makes a user namespace in which id 0 is `base` outside, and so on for
/// [`IDS_PER_PROJECT`] ids; the descriptor keeps it alive.
pub(crate) fn user_namespace(base: u32) -> io::Result<OwnedFd> {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let enter = || {
        // SAFETY: called in a child between fork and exec, with a single
        // thread; unsharing the user namespace touches no memory.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER)? };
        Ok(())
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(enter) };
    // `spawn` returns after the exec, so the namespace exists by then.
    let mut child = command.spawn()?;
    let pid = child.id();
    let made = (|| {
        let map = format!("0 {base} {IDS_PER_PROJECT}");
        std::fs::write(format!("/proc/{pid}/uid_map"), &map)?;
        std::fs::write(format!("/proc/{pid}/gid_map"), &map)?;
        Ok(OwnedFd::from(std::fs::File::open(format!("/proc/{pid}/ns/user"))?))
    })();
    drop(child.stdin.take());
    let _ = child.kill();
    child.wait()?;
    made
}

/// A descriptor whose readiness the runtime tells.
pub(crate) fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: it is owned by what is returned, so it stays open and the same one for
    // as long as it is registered.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// What [`set_mount`] sets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MountFlags {
    pub(crate) read_only: bool,
}

/// Maps the ids of a detached mount by `userns`, and makes it `nosuid,nodev`.
pub(crate) fn set_mount(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>, flags: MountFlags) -> io::Result<()> {
    let mut set = libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if flags.read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::from(userns.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path is empty and terminated, the struct is initialized, and
    // its size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes this thread act on files as `id`, with all its capabilities. For a
/// thread that ends soon after: there is no way back.
pub(crate) fn act_on_files_as(id: u32) -> io::Result<()> {
    // Without this bit the kernel would take the capabilities over files away
    // together with the root id.
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    // SAFETY: these change the credentials of the calling thread alone.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
        // They return the previous id, never an error: ask again.
        if libc::setfsuid(id).cast_unsigned() != id || libc::setfsgid(id).cast_unsigned() != id {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    Ok(())
}

/// Has the child of `command` begin in a network namespace.
pub(crate) fn spawn_in_network(command: &mut tokio::process::Command, network: OwnedFd) {
    let enter = move || {
        let kind = rustix::thread::LinkNameSpaceType::Network;
        Ok(rustix::thread::move_into_link_name_space(network.as_fd(), Some(kind))?)
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(enter) };
}

/// Has the child of `command` keep an open file, which it finds under the name
/// that is returned. Nobody else gets it.
pub(crate) fn hand_over(command: &mut tokio::process::Command, file: std::fs::File) -> String {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    let keep = move || Ok(rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?);
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(keep) };
    name
}

/// Puts this thread into a new network namespace. For a thread that ends soon.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: only this thread's view of the network changes; no descriptor
    // table or file system state is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
    Ok(())
}

/// Makes the child of `command` start with the signals as they are by default
/// (who starts a daemon with `nohup` or in the background may have it ignore
/// some), and with so many open files at most.
pub(crate) fn tame(command: &mut Command, nofile: Option<u32>) {
    let tamed = move || {
        default_signals();
        if let Some(nofile) = nofile {
            let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
            let limit = Some(u64::from(nofile).min(most));
            rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls and allocates nothing.
    unsafe { command.pre_exec(tamed) };
}

/// The same, without capabilities or a way to gain them, and within `ruleset` of
/// Landlock.
pub(crate) fn confine(command: &mut Command, ruleset: Option<OwnedFd>, nofile: Option<u32>) {
    tame(command, nofile);
    let root = rustix::process::geteuid().is_root();
    let confined = move || {
        rustix::thread::set_no_new_privs(true)?;
        if root {
            // Out of the bounding set first: root gets the others back by exec.
            for capability in CapabilitySet::all().iter() {
                match rustix::thread::remove_capability_from_bounding_set(capability) {
                    // One that this kernel or this process does not have.
                    Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            rustix::thread::set_capabilities(None, sets)?;
        }
        if let Some(ruleset) = &ruleset {
            // SAFETY: a descriptor that is open, and no memory.
            let done = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls and allocates nothing.
    unsafe { command.pre_exec(confined) };
}

/// Puts every signal back to what it does by default.
fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: takes no memory; the few that can't be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
