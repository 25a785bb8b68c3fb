//! Child processes: confined, killed when dropped, and heard when they fail.

use std::{ffi::OsStr, io, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    task::JoinHandle,
};

/// How much of what a child says is kept for people.
const WORDS_MAX: usize = 1000;
/// How long the end of it may take to come, after the child has ended: one that
/// it left behind may hold the other end.
const WORDS_LIMIT: Duration = Duration::from_secs(1);

/// A running child and what it says.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    words: JoinHandle<Vec<u8>>,
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
        let mut child = command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let words = tokio::spawn(end_of(child.stderr.take()));
        Ok(Self { child, words })
    }

    /// The end of what it said, once it has ended.
    pub(crate) async fn words(&mut self) -> String {
        match tokio::time::timeout(WORDS_LIMIT, &mut self.words).await {
            Ok(Ok(text)) => String::from_utf8_lossy(&text).trim().to_owned(),
            Ok(Err(_)) | Err(_) => "it said nothing that could be read".to_owned(),
        }
    }
}

/// The last bytes of a stream, which a hostile archive can make as long as it
/// likes.
async fn end_of(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let Some(mut stream) = stream else { return Vec::new() };
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    while let Ok(length @ 1..) = stream.read(&mut chunk).await {
        text.extend_from_slice(&chunk[..length]);
        let spare = text.len().saturating_sub(WORDS_MAX);
        text.drain(..spare);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_end_of_what_is_said_is_kept() {
        let said = [vec![b'x'; 5_000_000], b"the end".to_vec()].concat();
        let kept = end_of(Some(&said[..])).await;
        assert!(kept.len() == WORDS_MAX && kept.ends_with(b"the end"));
    }
}
