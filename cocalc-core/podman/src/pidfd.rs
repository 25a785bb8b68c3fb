//! A process held by a descriptor that can't come to mean another process.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, Signal},
};

#[derive(Debug)]
pub(crate) struct PidFd(OwnedFd);

impl PidFd {
    /// Holds process `pid`; `None` if there is none. Whoever knows the process
    /// only by its number checks afterwards that it is the one meant.
    pub(crate) fn open(pid: i32) -> io::Result<Option<Self>> {
        let Some(pid) = Pid::from_raw(pid).filter(|_| pid > 0) else { return Ok(None) };
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Some(Self(pidfd))),
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) fn is_alive(&self) -> bool {
        !ended_within(&self.0, Duration::ZERO)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // It may have ended; that is what the signal is for.
        let _ = rustix::process::pidfd_send_signal(&self.0, signal);
    }

    /// Another descriptor of the same, which is readable when it has ended.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(rustix::io::dup(&self.0)?)
    }

    /// Waits for its end; whether it came within `limit`.
    pub(crate) async fn ended(&self, limit: Duration) -> io::Result<bool> {
        let process = self.descriptor()?;
        tokio::task::spawn_blocking(move || ended_within(&process, limit)).await.map_err(io::Error::other)
    }
}

fn ended_within(process: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(_) if Instant::now() >= deadline => return false,
            // Interrupted.
            Err(_) => {}
        }
    }
}
