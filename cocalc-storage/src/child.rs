//! Child processes: confined, killed when dropped, and heard when they fail.

use std::{ffi::OsStr, fs::File, io, os::unix::fs::FileExt as _, process::Stdio};

use rustix::fs::MemfdFlags;
use tokio::process::{Child, Command};

/// How much of what a child says is kept for people.
const WORDS_MAX: usize = 1000;

/// A running child and what it says.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    words: File,
}

impl Running {
    /// Starts `program` without network or a share in our mounts. It is killed
    /// when this is dropped.
    pub(crate) fn confined(
        program: &'static str,
        arguments: &[&OsStr],
        stdin: Stdio,
        stdout: Stdio,
    ) -> io::Result<Self> {
        // util-linux runs the program in its own place: the process is the
        // same, so that a kill reaches it.
        let mut command = Command::new("unshare");
        command.args(["--net", "--ipc", "--mount", "--", program]).args(arguments);
        Self::start(command, stdin, stdout)
    }

    fn start(mut command: Command, stdin: Stdio, stdout: Stdio) -> io::Result<Self> {
        // A file takes what is said without a reader that could be too slow.
        let words = File::from(rustix::fs::memfd_create("stderr", MemfdFlags::CLOEXEC)?);
        let child = command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(words.try_clone()?)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { child, words })
    }

    /// The end of what it said.
    pub(crate) fn words(&self) -> String {
        let mut text = [0; WORDS_MAX];
        let read = self.words.metadata().and_then(|metadata| {
            self.words.read_at(&mut text, metadata.len().saturating_sub(WORDS_MAX as u64))
        });
        match read {
            Ok(length) => String::from_utf8_lossy(&text[..length]).trim().to_owned(),
            Err(error) => error.to_string(),
        }
    }
}
