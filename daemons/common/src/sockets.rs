//! Listening sockets that a supervisor holds open, as systemd does: while a
//! daemon is started again, connections wait in the kernel instead of being
//! refused.
//!
//! The protocol is systemd's (`sd_listen_fds(3)`): `LISTEN_FDS` counts the
//! descriptors from 3 on, `LISTEN_PID` says for whom they are, and
//! `LISTEN_FDNAMES` how they are called. A socket is for the configuration key
//! whose name it has (`FileDescriptorName=ssh_listen`), or else for the one whose
//! address it has.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Mutex, MutexGuard, PoisonError},
};

use listenfd::ListenFd;

/// What was handed over and nobody has taken yet. The environment is the
/// process's, and so is this.
static HANDED: Mutex<Vec<Socket>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Socket {
    name: String,
    address: SocketAddr,
    listener: TcpListener,
}

fn handed() -> MutexGuard<'static, Vec<Socket>> {
    HANDED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes what the environment names, and takes it out of the environment, so
/// that no program that is started later goes by it. To be called before there
/// are other threads.
///
/// # Errors
///
/// One of the descriptors is not of a listening TCP socket; the text says which.
pub(crate) fn adopt() -> Result<(), String> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    // Without it the variables may be a parent's; the library looks at its value.
    let addressed = std::env::var("LISTEN_PID").is_ok();
    let mut given = ListenFd::from_env();
    if !addressed || given.len() == 0 {
        return Ok(());
    }
    let mut names = names.split(':');
    let mut sockets = Vec::new();
    for index in 0..given.len() {
        let name = names.next().unwrap_or_default().to_owned();
        let wrong = |error: io::Error| format!("socket {index} ({name:?}) of LISTEN_FDS: {error}");
        let listener = given.take_tcp_listener(index).map_err(wrong)?;
        let listener = listener.ok_or_else(|| wrong(io::ErrorKind::NotFound.into()))?;
        if !rustix::net::sockopt::socket_acceptconn(&listener).map_err(|error| wrong(error.into()))? {
            return Err(wrong(io::Error::other("nobody listens on it")));
        }
        let address = listener.local_addr().map_err(wrong)?;
        sockets.push(Socket { name: name.clone(), address, listener });
    }
    *handed() = sockets;
    Ok(())
}

/// The socket for a configuration key and its address, if there is one.
pub(crate) fn take(key: &str, address: SocketAddr) -> Option<TcpListener> {
    let mut all = handed();
    let named = all.iter().position(|socket| socket.name == key);
    let at = named.or_else(|| all.iter().position(|socket| socket.address == address))?;
    Some(all.swap_remove(at).listener)
}

/// What is still there, as text: nobody would ever accept on it.
pub(crate) fn left() -> Option<String> {
    let all = handed();
    let first = all.first()?;
    Some(format!(
        "a socket on {} (FileDescriptorName {:?}) was handed over, and no key of the configuration has that name or address",
        first.address, first.name
    ))
}
