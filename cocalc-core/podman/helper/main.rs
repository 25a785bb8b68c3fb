//! The first process of a project. It inherits a listening Unix socket, starts
//! the processes that its host asks for, and reaps whatever ends.
//!
//! A process that it starts has the same namespaces, cgroup, seccomp filter
//! and bounding set as itself, because it is its child. Nothing inside the
//! project has a path to the socket. Started with arguments it is a tool of its
//! host's inside the project (see `tool`). It is built from the standard library
//! alone, linked statically, and runs in any image; without a PID namespace of
//! its own it serves the process runner as supervisor.

mod services;
mod session;
mod sftp;
mod sys;
mod terminal;
mod tool;
mod users;

use std::{
    collections::BTreeMap,
    os::unix::net::UnixListener,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

/// The descriptor of the listening socket, as in socket activation.
const LISTENER: i32 = 3;

/// What runs, and who waits for its end. Whoever starts or reaps holds the
/// lock, so that a child is known before it is reaped, and a reaped pid is
/// never signalled.
#[derive(Default)]
pub(crate) struct Registry {
    waiting: Mutex<BTreeMap<i32, SyncSender<i32>>>,
    ending: AtomicBool,
    pub(crate) services: Arc<services::Services>,
}

impl Registry {
    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<i32, SyncSender<i32>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    fn reap(&self) {
        let mut waiting = self.lock();
        while let Some((pid, status)) = sys::reap() {
            if let Some(sender) = waiting.remove(&pid) {
                let _ = sender.try_send(status);
            }
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args_os().skip(1).filter_map(|arg| arg.into_string().ok()).collect();
    if let Some(("tool", rest)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        std::process::exit(tool::run(rest));
    }
    let signals = sys::Signals::block();
    let supervisor = !sys::is_init();
    if supervisor {
        sys::become_subreaper();
        sys::new_session();
    } else {
        name_myself();
        give_secrets();
    }
    let listener = UnixListener::from(sys::inherited(LISTENER));
    let registry = Arc::new(Registry::default());
    let shared = registry.clone();
    let accepting = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let registry = shared.clone();
                    // No thread to be had, with the process limit reached, is
                    // told to the host by closing the connection.
                    let _ = std::thread::Builder::new()
                        .stack_size(128 << 10)
                        .spawn(move || session::serve(stream, &registry, supervisor));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    });
    if accepting.is_err() {
        std::process::exit(1);
    }
    loop {
        let end = signals.wait();
        registry.reap();
        if end && !registry.ending.swap(true, Ordering::Relaxed) {
            let registry = registry.clone();
            // Processes are asked to end, and this one ends when none is left;
            // who waits too long kills it, and the kernel then all others.
            let asking = std::thread::Builder::new().spawn(move || {
                session::end_all(&registry, supervisor, None);
                std::process::exit(0);
            });
            if asking.is_err() {
                std::process::exit(0);
            }
        }
    }
}

/// Gives the memory for secrets to the ordinary user, and to nobody else.
fn give_secrets() {
    // Made by root, because podman cannot say whose it is to be.
    let _ = std::os::unix::fs::chown("/run/secrets", Some(users::ORDINARY), Some(users::ORDINARY));
}

/// Makes the project's host name resolve, for sudo and others that ask.
fn name_myself() {
    let Ok(name) = std::fs::read_to_string("/proc/sys/kernel/hostname") else { return };
    let name = name.trim();
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    if hosts.len() < 1 << 20 && !hosts.split_whitespace().any(|word| word == name) {
        let loopback = if hosts.contains("localhost") { "" } else { "127.0.0.1 localhost\n::1 localhost\n" };
        let _ = std::fs::write("/etc/hosts", format!("{loopback}127.0.1.1 {name}\n{hosts}"));
    }
}
