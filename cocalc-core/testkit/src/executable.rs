//! Programs that a test writes and then runs.
//!
//! A file that any process has open for writing cannot be executed
//! (`ETXTBSY`, execve(2)). In a test process other threads fork all the time,
//! and what they fork holds every descriptor until its own `exec`; so a program
//! that was just written by this process is, now and then, busy. These are
//! written by a process of their own, which has ended when they return.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// Copies a program to `to`, executable by everybody.
pub fn copy(from: &Path, to: &Path) {
    let status = Command::new("install").args(["-m", "755"]).arg(from).arg(to).status().unwrap();
    assert!(status.success(), "install {} {}: {status}", from.display(), to.display());
}

/// Writes a program or a script to `to`, executable by everybody.
pub fn write(to: &Path, bytes: impl AsRef<[u8]>) {
    let mut child = Command::new("/bin/sh")
        .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
        .arg(to)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let written = child.stdin.take().unwrap().write_all(bytes.as_ref());
    let status = child.wait().unwrap();
    assert!(written.is_ok() && status.success(), "{}: {written:?}, {status}", to.display());
}
