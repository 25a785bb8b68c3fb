//! The kernel calls that the probe tries, declared by hand: it is built from
//! the standard library alone.

#![allow(unsafe_code, reason = "kernel calls, each with its own reason below")]

use std::{
    ffi::{CString, c_long, c_ulong},
    io,
    os::fd::RawFd,
};

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
}

pub(crate) const EPERM: i32 = 1;
pub(crate) const ENOSYS: i32 = 38;
pub(crate) const EAFNOSUPPORT: i32 = 97;

/// A system call by its number on x86-64 and on arm64.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call(pub(crate) c_long, pub(crate) c_long);

/// Makes a call: what it returned, or its error. Pointers given here are null
/// or invalid on purpose: what reaches the kernel's own code fails there.
pub(crate) fn call(number: Call, args: [u64; 6]) -> Result<i64, i32> {
    let number = if cfg!(target_arch = "x86_64") { number.0 } else { number.1 };
    let [a, b, c, d, e, f] = args.map(|arg| arg as c_ulong);
    // SAFETY: every call of this program passes numbers, null, addresses that
    // are mapped nowhere, or live memory that outlives the call.
    let result = unsafe { syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(result) }
}

/// Closes what a call that should have failed has opened.
pub(crate) fn close(fd: i64) {
    let _ = call(Call(3, 57), [fd as u64, 0, 0, 0, 0, 0]);
}

/// Makes a device node.
pub(crate) fn mknod(path: &str, mode: u32, major: u64, minor: u64) -> Result<(), i32> {
    let path = CString::new(path).map_err(|_| 0)?;
    let device = (major << 8) | minor;
    // mknodat, in the working directory.
    call(Call(259, 33), [-100_i64 as u64, path.as_ptr() as u64, mode.into(), device, 0, 0]).map(drop)
}

/// Connects to a socket of the abstract namespace.
pub(crate) fn connect_abstract(name: &str) -> io::Result<()> {
    use std::os::{linux::net::SocketAddrExt, unix::net};
    let address = net::SocketAddr::from_abstract_name(name)?;
    net::UnixStream::connect_addr(&address).map(drop)
}

/// Opens a file system by its name, as a mount of it begins.
pub(crate) fn fsopen(name: &str) -> Result<RawFd, i32> {
    let name = CString::new(name).map_err(|_| 0)?;
    call(Call(430, 430), [name.as_ptr() as u64, 0, 0, 0, 0, 0]).map(|fd| fd as RawFd)
}
