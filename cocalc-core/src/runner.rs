//! Running projects on one host.

mod isolation;
mod limits;

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use async_trait::async_trait;
use cocalc_ids::{Epoch, ImageDigest, ProjectId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::{
    BoxError,
    stream::{BoxRead, BoxStream, BoxWrite},
};

pub use isolation::{
    Destination, Destinations, Isolation, Network, NetworkPolicy, ParseDestinationError, Place,
};
pub use limits::{Applied, LimitKind, Limits};

/// The result of a runner call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Runs projects on one host, each apart from the others.
///
/// # Contract
///
/// - At most one instance of a project exists at any time.
/// - `prepare`, `start`, `stop` and `remove` may be repeated: each brings about
///   a state and returns it. Files in the project's volume are never deleted.
/// - After `stop` or `remove` returns, no process of the project is left and
///   nothing writes to its volume.
/// - A restarted daemon finds what was running (`list`), with true start times.
/// - Dropping a future of `start` or `stop` leaves a state that `status` tells
///   truly and that the next call can go on from.
#[async_trait]
pub trait Runner: fmt::Debug + Send + Sync + 'static {
    /// What this backend can do and enforce; constant.
    fn capabilities(&self) -> Capabilities;

    /// Does what can be done before a start: the image, mounts, the container.
    async fn prepare(&self, spec: &ProjectSpec) -> Result<()>;

    /// Starts the project, or finds it running under the same epoch. A project
    /// that runs under another epoch is [`Busy`](Error::Busy).
    async fn start(&self, spec: &ProjectSpec) -> Result<Status>;

    /// How long the steps of the project's last start took, in milliseconds, in
    /// their order: its receipt. Empty if this backend does not say, or it was
    /// not started since the daemon is up.
    fn start_phases(&self, _project: ProjectId) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// Asks the project's processes to end, kills them after `grace`, and
    /// returns when none is left. Unknown projects are `Stopped`.
    async fn stop(&self, project: ProjectId, grace: Duration) -> Result<Status>;

    /// Stops without grace, and removes everything but the files.
    async fn remove(&self, project: ProjectId) -> Result<()>;

    /// The state of a project; `Stopped` if this runner never had it.
    /// [`Unknown`](Error::Unknown) while that cannot be told: after a restart, what
    /// says what runs may not answer.
    async fn status(&self, project: ProjectId) -> Result<Status>;

    /// Every project this runner knows, ordered; those of which it cannot be told what
    /// they do are [`Unknown`](State::Unknown).
    async fn list(&self) -> Result<Vec<Status>>;

    /// Starts a process inside the running project.
    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process>;

    /// Connects to a TCP port inside the project, on its loopback addresses,
    /// as if from within. [`Refused`](Error::Refused) if nothing listens. Small
    /// messages should leave at once (`TCP_NODELAY`): what is sent here piece by
    /// piece otherwise waits for the far side's acknowledgement, 40 ms at a time.
    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream>;

    /// What the project uses now.
    async fn stats(&self, project: ProjectId) -> Result<Stats>;

    /// Changes what the running project may use; its processes go on. What
    /// `limits` does not say becomes the backend's default again. The same
    /// limits in the next start's [`ProjectSpec`] make them last.
    /// [`Invalid`](Error::Invalid) for limits that the backend can't keep or
    /// that are below what the project uses now; then nothing is changed.
    async fn set_limits(&self, project: ProjectId, limits: &Limits) -> Result<Applied>;

    /// The last `lines` lines that the project's first process wrote.
    async fn logs(&self, project: ProjectId, lines: usize) -> Result<String>;
}

/// What a [`Runner`] backend can do.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Capabilities {
    /// The backend's name and what it runs on, for instance `podman 4.3.1 (runc 1.1.5)`.
    pub backend: String,
    /// Whether projects are isolated from each other and from the host.
    pub isolation: bool,
    /// Whether limits are enforced.
    pub limits: bool,
    /// What is weaker than in the best backend, for people; empty if nothing.
    pub weaknesses: Vec<String>,
    /// The limits that this machine can't enforce. The runner refuses a project
    /// that asks for one of them, unless it was told to accept that.
    #[serde(default)]
    pub unenforced: Vec<LimitKind>,
}

/// Everything a runner needs to know of a project.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ProjectSpec {
    /// Which project.
    pub project: ProjectId,
    /// Under which grant it runs.
    pub epoch: Epoch,
    /// Its volume on this host ([`crate::storage::Volume::path`]). The runner
    /// keeps the user's home in `home/` and the image's upper layer in
    /// `system/<digest>/`.
    pub volume: PathBuf,
    /// The image; `None` for runners without images.
    pub image: Option<ImageDigest>,
    /// A number unique among the projects of this host, from 0, and stable. A
    /// runner that gives each project a range of user ids and addresses takes
    /// those of this number if it has them, and else others.
    pub slot: u32,
    /// What it may use.
    pub limits: Limits,
    /// Environment variables of every process in the project.
    pub env: BTreeMap<String, String>,
    /// How it is kept apart.
    #[serde(default)]
    pub isolation: Isolation,
}

/// What a project is doing.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Status {
    /// Which project.
    pub project: ProjectId,
    /// The epoch it was last started under; `None` if never here.
    pub epoch: Option<Epoch>,
    /// The state.
    pub state: State,
    /// When it was started; `None` if it never was.
    pub started: Option<Timestamp>,
    /// Why it is not running, for people: exit code, killed for memory.
    pub reason: Option<String>,
}

/// The state of a project at a runner.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum State {
    /// No process of it exists.
    Stopped,
    /// On its way up.
    Starting,
    /// Its first process runs.
    Running,
    /// On its way down.
    Stopping,
    /// What it does cannot be told now: the reason says why. It may run, so it is
    /// neither started nor moved nor deleted. In [`Runner::list`] and in reports of a
    /// host; [`Runner::status`] says [`Error::Unknown`]. Also what a newer program
    /// says that this one does not know.
    #[serde(other)]
    Unknown,
}

/// A process to start in a project.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct ExecRequest {
    /// What to run.
    pub command: Command,
    /// Extra environment variables; names and values contain no NUL.
    pub env: BTreeMap<String, String>,
    /// A terminal of this size and type, or `None` for plain pipes.
    pub pty: Option<Pty>,
    /// The user inside the project; `None` for its ordinary user.
    pub user: Option<String>,
}

/// What an [`ExecRequest`] runs.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Command {
    /// The user's login shell.
    #[default]
    Shell,
    /// A line for the user's shell (`sh -c`), as SSH's exec has it.
    Line(String),
    /// A program and its arguments, no shell.
    Argv(Vec<String>),
    /// The image's sftp server, on standard input and output; where it has
    /// none, the runner's own.
    Sftp,
    /// A tool of the runner's, as the user and inside the project.
    Tool(Tool),
}

/// What a runner's helper does inside a project for an ingress: whatever has to
/// listen or connect there. It speaks on its standard streams; who runs it
/// believes nothing it says.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Tool {
    /// Listens until its input ends. Its output is lines: `L <place>` once it
    /// listens, `E <reason>` if it cannot, and `A <number> <address> <port>`
    /// for each connection, which a [`Take`](Self::Take) carries.
    Listen {
        /// Where.
        place: ListenAt,
        /// A name that nobody else uses, of letters and digits.
        ticket: String,
    },
    /// Carries a connection that a listener has accepted: `+`, then its bytes,
    /// on both standard streams.
    Take {
        /// The listener's.
        ticket: String,
        /// Which one.
        number: u32,
    },
    /// Connects to a port as seen from inside: `+` and then bytes, or `-` and
    /// the reason why not.
    ConnectTcp {
        /// A name or an address.
        host: String,
        /// The port.
        port: u16,
    },
    /// Connects to a Unix socket, and speaks in the same way.
    ConnectUnix {
        /// Its path.
        path: String,
    },
}

/// Where something listens inside a project.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ListenAt {
    /// On this port of the loopback addresses; 0 is any, which is then said.
    Tcp(u16),
    /// At this path, which must not exist.
    Unix(String),
    /// At a new path that only the user reaches, which is then said.
    Agent,
    /// As an X display, whose name is then said. The first line of its input
    /// is the protocol, the cookie in hexadecimal digits, and the screen, for
    /// `xauth`, without which the image has no X.
    X11,
}

impl Tool {
    /// What the helper is started with.
    pub fn args(&self) -> Vec<String> {
        let words: &[&str] = match self {
            Self::Listen { place: ListenAt::Tcp(port), ticket } => &["listen-tcp", ticket, &port.to_string()],
            Self::Listen { place: ListenAt::Unix(path), ticket } => &["listen-unix", ticket, path],
            Self::Listen { place: ListenAt::Agent, ticket } => &["listen-agent", ticket],
            Self::Listen { place: ListenAt::X11, ticket } => &["listen-x11", ticket],
            Self::Take { ticket, number } => &["take", ticket, &number.to_string()],
            Self::ConnectTcp { host, port } => &["connect-tcp", host, &port.to_string()],
            Self::ConnectUnix { path } => &["connect-unix", path],
        };
        std::iter::once("tool").chain(words.iter().copied()).map(str::to_owned).collect()
    }
}

/// A terminal.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Pty {
    /// `TERM`, for instance `xterm-256color`.
    pub term: String,
    /// Its size.
    pub size: WindowSize,
    /// Its modes as SSH has them (RFC 4254, section 8): an opcode and its value,
    /// in the order in which they are set. Those that are not said, and those that
    /// a system does not know, are as in every new terminal; of more than
    /// [`MODES_MAX`](Self::MODES_MAX) the rest is not looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modes: Vec<(u8, u32)>,
}

impl Pty {
    /// More modes than this no terminal has: SSH names 60.
    pub const MODES_MAX: usize = 128;

    /// A terminal of this type and size, with the modes of every new one.
    pub fn new(term: impl Into<String>, size: WindowSize) -> Self {
        Self { term: term.into(), size, modes: Vec::new() }
    }
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WindowSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A process running in a project. Dropping it kills the process.
pub struct Process {
    /// Its standard input; with a PTY, the terminal's.
    pub stdin: BoxWrite,
    /// Its standard output; with a PTY, everything it shows.
    pub stdout: BoxRead,
    /// Its standard error; `None` with a PTY.
    pub stderr: Option<BoxRead>,
    /// The rest.
    pub handle: Box<dyn ProcessHandle>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("handle", &self.handle).finish_non_exhaustive()
    }
}

/// Steers one process. Dropping it kills the process.
#[async_trait]
pub trait ProcessHandle: fmt::Debug + Send + Sync {
    /// Changes the size of its terminal; nothing without one.
    async fn resize(&self, size: WindowSize) -> Result<()>;

    /// Sends it a signal, by POSIX name without `SIG`, for instance `TERM`.
    async fn signal(&self, signal: &str) -> Result<()>;

    /// Waits for its end. Cancel safe; once it has ended, answers at once.
    async fn wait(&mut self) -> Result<Exit>;

    /// Whether it ended only because its project did, or what had started it there:
    /// then nobody has seen its end, and the [`Exit`] is what must have been. Only
    /// of interest after [`wait`](Self::wait). Default: no.
    fn ended_with_its_project(&self) -> bool {
        false
    }
}

/// How a process ended.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// With a status from 0 to 255.
    Code(u8),
    /// By a signal, named without `SIG`.
    Signal(String),
}

/// What a project uses.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Stats {
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// CPU time since the start, in microseconds.
    pub cpu_micros: u64,
    /// Processes and threads.
    pub pids: u64,
    /// The most memory that it may have, in bytes; `None` without a limit.
    #[serde(default)]
    pub memory_limit_bytes: Option<u64>,
    /// What it read from disks since the start, in bytes.
    #[serde(default)]
    pub read_bytes: u64,
    /// What it wrote to disks, in bytes.
    #[serde(default)]
    pub written_bytes: u64,
    /// What came from elsewhere over its own network, in bytes. What its users
    /// send it through the host is not in it.
    #[serde(default)]
    pub received_bytes: u64,
    /// What it sent elsewhere, in bytes.
    #[serde(default)]
    pub sent_bytes: u64,
    /// How many of its processes were killed because its memory was used up.
    #[serde(default)]
    pub oom_kills: u64,
}

/// Why a runner call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The project is not running.
    #[error("project {project} is not running")]
    NotRunning {
        /// The project.
        project: ProjectId,
    },
    /// The image is not on this host.
    #[error("image {digest} of project {project} is not on this host")]
    NoImage {
        /// The project.
        project: ProjectId,
        /// The missing image.
        digest: ImageDigest,
    },
    /// Whether it runs cannot be told now. Nothing was done.
    #[error("whether project {project} runs is not known: {reason}")]
    Unknown {
        /// The project.
        project: ProjectId,
        /// Why, and what is waited for.
        reason: String,
    },
    /// Nothing listens on that port.
    #[error("nothing listens on port {port} in project {project}")]
    Refused {
        /// The project.
        project: ProjectId,
        /// The port.
        port: u16,
    },
    /// Another epoch of it runs, or another operation is under way.
    #[error("project {project} is busy: {reason}")]
    Busy {
        /// The project.
        project: ProjectId,
        /// With what.
        reason: String,
    },
    /// The request made no sense.
    #[error("cannot run that in project {project}: {reason}")]
    Invalid {
        /// The project.
        project: ProjectId,
        /// Why.
        reason: String,
    },
    /// It took too long.
    #[error("{operation} of project {project} took longer than {limit:?}")]
    TimedOut {
        /// The project.
        project: ProjectId,
        /// What was being done.
        operation: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The backend failed.
    #[error("{backend} could not {operation} project {project}")]
    Backend {
        /// The backend.
        backend: &'static str,
        /// What was being done.
        operation: &'static str,
        /// The project.
        project: ProjectId,
        /// Why.
        source: BoxError,
    },
}
