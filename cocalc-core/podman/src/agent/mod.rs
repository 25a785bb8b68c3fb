//! Talks to the helper inside a project, over a Unix socket that nothing inside
//! the project can reach.
//!
//! The helper belongs to the tenant as soon as it runs: whoever is root in a
//! project can bend its first process. So nothing it says is believed beyond
//! the project's own fate, every wait is bounded, no descriptor is accepted
//! from it, and each of ours that it gets is one end of a pipe.

pub(crate) mod process;
pub(crate) mod services;
mod socket;

use std::{io, time::Duration};

use cocalc_core::runner::{Command, ExecRequest, Process, Pty};

pub(crate) use socket::{AgentSocket, next_frame};

use self::process::AgentProcess;

/// The helper: a static executable that runs in any image. A project's first
/// process; with the arguments of a [`Tool`](cocalc_core::runner::Tool), that
/// tool.
pub const HELPER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/helper"));

/// How long the helper may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The longest answer.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 10;
/// The longest request.
const REQUEST_BYTES_MAX: usize = 2 << 20;

/// Why the helper did not start a process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("{0}")]
    Refused(String),
    #[error("the project's first process does not answer")]
    Silent,
    #[error("the connection to the project's first process failed")]
    Io(#[from] io::Error),
}

/// Starts a process. `env` is the project's, below the request's own; `home` is
/// the directory for runners whose projects have no users of their own.
pub(crate) async fn exec<'a>(
    socket: &AgentSocket,
    request: &'a ExecRequest,
    env: impl IntoIterator<Item = (&'a String, &'a String)>,
    home: &str,
) -> Result<Process, AgentError> {
    let body = encode(request, env, home)?;
    let attempt = async {
        let stream = socket.connect().await?;
        AgentProcess::start(stream, &body, request.pty.is_some()).await
    };
    tokio::time::timeout(ANSWER_LIMIT, attempt).await.unwrap_or(Err(AgentError::Silent))
}

/// Makes a supervisor end every process below it, and itself.
pub(crate) async fn terminate(socket: &AgentSocket, grace: Duration) -> Result<(), AgentError> {
    let attempt = async {
        let mut stream = socket.connect().await?;
        socket::send_request(&stream, b'T', &[], &millis(grace).to_be_bytes()).await?;
        let mut buffer = Vec::new();
        socket::next_frame(&mut stream, &mut buffer).await
    };
    match tokio::time::timeout(ANSWER_LIMIT + grace, attempt).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(AgentError::Silent),
    }
}

fn millis(grace: Duration) -> u32 {
    u32::try_from(grace.as_millis()).unwrap_or(u32::MAX)
}

/// Whether a request can be carried at all: an environment has no NUL, and no
/// `=` in a name.
fn encode<'a>(
    request: &'a ExecRequest,
    env: impl IntoIterator<Item = (&'a String, &'a String)>,
    home: &str,
) -> Result<Vec<u8>, AgentError> {
    let refuse = |what: &str| Err(AgentError::Refused(format!("{what} contains a forbidden character")));
    let size = request.pty.as_ref().map(|pty| pty.size);
    let mut body = vec![u8::from(size.is_some())];
    body.extend(size.map_or(0, |size| size.cols).to_be_bytes());
    body.extend(size.map_or(0, |size| size.rows).to_be_bytes());
    let user = request.user.as_deref().unwrap_or("");
    if user.contains(['\0', ':', '\n']) {
        return refuse("the user's name");
    }
    text(&mut body, user);
    text(&mut body, home);
    let tool;
    let (kind, args): (u8, Vec<&str>) = match &request.command {
        Command::Shell => (0, vec![]),
        Command::Line(line) => (1, vec![line]),
        Command::Argv(args) => (2, args.iter().map(String::as_str).collect()),
        Command::Sftp => (3, vec![]),
        Command::Tool(wanted) => {
            tool = wanted.args();
            (4, tool.iter().map(String::as_str).collect())
        }
        _ => return Err(AgentError::Refused("this runner does not know such commands".into())),
    };
    if args.iter().any(|arg| arg.contains('\0')) {
        return refuse("the command");
    }
    if kind == 2 && args.first().is_none_or(|program| program.is_empty()) {
        return Err(AgentError::Refused("there is no program to run".into()));
    }
    body.push(kind);
    texts(&mut body, &args);
    let mut pairs = Vec::new();
    for (name, value) in env.into_iter().chain(&request.env) {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return refuse("the environment");
        }
        pairs.push(format!("{name}={value}"));
    }
    if let Some(pty) = &request.pty {
        if pty.term.contains('\0') {
            return refuse("the terminal's type");
        }
        pairs.push(format!("TERM={}", pty.term));
    }
    texts(&mut body, &pairs.iter().map(String::as_str).collect::<Vec<_>>());
    // Last, where the helper of a project that an older host has started looks no
    // more.
    let modes = request.pty.as_ref().map_or(&[][..], |pty| &pty.modes);
    let modes = &modes[..modes.len().min(Pty::MODES_MAX)];
    body.extend(u32::try_from(modes.len()).unwrap_or(0).to_be_bytes());
    for (code, value) in modes {
        body.push(*code);
        body.extend(value.to_be_bytes());
    }
    if body.len() > REQUEST_BYTES_MAX {
        return Err(AgentError::Refused("the command and its environment are too long".into()));
    }
    Ok(body)
}

fn text(body: &mut Vec<u8>, text: &str) {
    // A request that is too long is refused before its lengths matter.
    body.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    body.extend(text.as_bytes());
}

fn texts(body: &mut Vec<u8>, texts: &[&str]) {
    body.extend(u32::try_from(texts.len()).unwrap_or(u32::MAX).to_be_bytes());
    for one in texts {
        text(body, one);
    }
}
