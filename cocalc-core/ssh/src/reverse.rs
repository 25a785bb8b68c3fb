//! Channels that the server opens: for connections to what listens inside the
//! project on the user's behalf. Ports and sockets (`-R`), the agent, X.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cocalc_core::{
    runner::{Command, ExecRequest, ListenAt, Process, ProcessHandle, Tool},
    stream::{BoxRead, BoxWrite},
};
use russh::{
    Channel, ChannelId,
    server::{Handle, Msg},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    Access, Login,
    channel::{self, Ends, OPEN_MAX, Outward},
    input::InputReceiver,
    witness::Meter,
};

/// How long a listener may take to say that it listens, and a user's client to
/// open a channel.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long a listener may take to clean up behind itself.
const END_MAX: Duration = Duration::from_secs(2);
/// How long a connection's last bytes may take inside the project.
const FLUSH_MAX: Duration = Duration::from_secs(10);
/// The longest line of a listener.
const LINE_BYTES_MAX: usize = 4096;
/// How many connections of one listener are carried at a time.
const CARRIED_MAX: usize = 64;

/// Channels that the client has confirmed, on their way to the tasks that
/// opened them; and those that have ended.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    slots: Mutex<HashMap<u32, Slot>>,
    ended: Mutex<Vec<ChannelId>>,
}

/// What comes from the user on such a channel.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) input: InputReceiver,
    pub(crate) ends: Ends,
}

/// Whichever comes first, the channel or its task, leaves the other's end here.
#[derive(Debug)]
enum Slot {
    Arrived(oneshot::Receiver<Arrival>),
    Expected(oneshot::Sender<Arrival>),
}

impl Arrivals {
    pub(crate) fn put(&self, id: ChannelId, arrival: Arrival) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        match slots.remove(&id.number()) {
            // A task that has gone has dropped the channel too.
            Some(Slot::Expected(sender)) => drop(sender.send(arrival)),
            _ => {
                let (sender, receiver) = oneshot::channel();
                let _ = sender.send(arrival);
                slots.insert(id.number(), Slot::Arrived(receiver));
            }
        }
    }

    async fn take(&self, id: ChannelId) -> Option<Arrival> {
        let receiver = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            match slots.remove(&id.number()) {
                Some(Slot::Arrived(receiver)) => receiver,
                _ => {
                    let (sender, receiver) = oneshot::channel();
                    slots.insert(id.number(), Slot::Expected(sender));
                    receiver
                }
            }
        };
        timeout(ANSWER_MAX, receiver).await.ok()?.ok()
    }

    /// Forgets `id`, which has closed.
    pub(crate) fn forget(&self, id: ChannelId) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&id.number());
    }

    /// The channels whose tasks have ended since the last call.
    pub(crate) fn ended(&self) -> Vec<ChannelId> {
        std::mem::take(&mut *self.ended.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a connection that arrives becomes for the client.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// The address and port as the client named them.
    Tcp {
        address: String,
        port: u32,
    },
    /// The path as the client named it.
    Unix(String),
    Agent,
    /// What `xauth` is told.
    X11 {
        protocol: String,
        cookie: String,
        screen: u32,
    },
}

/// What a listener needs of its connection.
#[derive(Clone)]
pub(crate) struct Reverse {
    pub(crate) login: Arc<Login>,
    pub(crate) handle: Handle,
    pub(crate) arrivals: Arc<Arrivals>,
    pub(crate) over: CancellationToken,
    pub(crate) meter: Option<Arc<Meter>>,
}

/// Something that listens inside the project. Dropping it ends that, but not
/// the connections that were accepted.
#[derive(Debug)]
pub(crate) struct Listener {
    /// The port, path or display.
    pub(crate) place: String,
    _stop: DropGuard,
}

impl Reverse {
    /// Starts to listen, in the project, which is started if need be.
    pub(crate) async fn listen(&self, kind: Kind) -> Result<Listener, String> {
        let Login::Open(access) = &*self.login else { return Err("the project has moved".into()) };
        let place = match &kind {
            Kind::Tcp { port, .. } => {
                ListenAt::Tcp(u16::try_from(*port).map_err(|_| format!("there is no port {port}"))?)
            }
            Kind::Unix(path) => ListenAt::Unix(path.clone()),
            Kind::Agent => ListenAt::Agent,
            Kind::X11 { .. } => ListenAt::X11,
        };
        let ticket = ticket()?;
        let tool = Tool::Listen { place, ticket: ticket.clone() };
        channel::wake(access, Instant::now() + channel::WAKE_MAX, None).await?;
        let Process { mut stdin, stdout, stderr: _, mut handle } = start(access, tool).await?;
        let mut lines = Lines::new(stdout);
        if let Kind::X11 { protocol, cookie, screen } = &kind {
            let line = format!("{protocol} {cookie} {screen}\n");
            stdin.write_all(line.as_bytes()).await.map_err(|error| error.to_string())?;
            stdin.flush().await.map_err(|error| error.to_string())?;
        }
        let first = timeout(ANSWER_MAX, lines.next()).await.map_err(|_| "the project does not answer")?;
        let place = match first.as_deref().and_then(|line| line.split_at_checked(2)) {
            Some(("L ", place)) => place.to_owned(),
            Some(("E ", reason)) => return Err(reason.to_owned()),
            _ => return Err("the project's listener did not start".into()),
        };
        let kind = match kind {
            Kind::Tcp { address, .. } => {
                Kind::Tcp { address, port: place.parse().map_err(|_| "the project's listener is strange")? }
            }
            other => other,
        };
        let stop = CancellationToken::new();
        let (reverse, stopped) = (self.clone(), stop.clone());
        let serving = async move {
            let mut carried = JoinSet::new();
            let accepting = async {
                while let Some(line) = lines.next().await {
                    while carried.try_join_next().is_some() {}
                    let Some((number, peer)) = accepted(&line) else { break };
                    // What is not taken over is closed after a while.
                    if carried.len() < CARRIED_MAX {
                        let (reverse, kind, ticket) = (reverse.clone(), kind.clone(), ticket.clone());
                        let over = reverse.over.clone();
                        let carrying = async move { reverse.carry(&kind, &ticket, number, peer).await };
                        carried.spawn(over.run_until_cancelled_owned(carrying));
                    }
                }
            };
            tokio::select! {
                () = accepting => {}
                () = stopped.cancelled() => {}
                () = reverse.over.cancelled() => {}
            }
            // The listener removes what it has made, when its input ends.
            let _ = stdin.shutdown().await;
            drop(stdin);
            let _ = timeout(END_MAX, handle.wait()).await;
            drop(handle);
            let rest = async { while carried.join_next().await.is_some() {} };
            let _ = reverse.over.run_until_cancelled(rest).await;
        };
        // It ends by itself soon after its listener or its connection.
        tokio::spawn(serving);
        Ok(Listener { place, _stop: stop.drop_guard() })
    }

    /// Carries one connection from the project to the user.
    async fn carry(&self, kind: &Kind, ticket: &str, number: u32, peer: (String, u32)) {
        let Login::Open(access) = &*self.login else { return };
        let opened = match timeout(ANSWER_MAX, self.open(kind, peer)).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                tracing::debug!(project = %access.project, %error, "the client did not take a connection");
                return;
            }
            Err(_) => return,
        };
        let id = opened.id();
        let _ended = Ended { arrivals: &self.arrivals, id };
        let (_, write) = opened.split();
        let outward = Outward { write, handle: self.handle.clone(), meter: self.meter.clone() };
        if let Some(Arrival { input, ends }) = self.arrivals.take(id).await {
            let tool = Tool::Take { ticket: ticket.to_owned(), number };
            if let Ok(connected) = connect(access, tool).await {
                connected.carry(&outward, input, &ends).await;
            }
        }
        let _ = outward.write.close().await;
    }

    async fn open(&self, kind: &Kind, peer: (String, u32)) -> Result<Channel<Msg>, russh::Error> {
        let handle = &self.handle;
        match kind {
            Kind::Tcp { address, port } => {
                handle.channel_open_forwarded_tcpip(address.as_str(), *port, peer.0, peer.1).await
            }
            Kind::Unix(path) => handle.channel_open_forwarded_streamlocal(path.as_str()).await,
            Kind::Agent => handle.channel_open_agent().await,
            Kind::X11 { .. } => handle.channel_open_x11(peer.0, peer.1).await,
        }
    }
}

struct Ended<'a> {
    arrivals: &'a Arrivals,
    id: ChannelId,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.arrivals.ended.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
    }
}

/// A connection made by a process inside the project. Dropping it ends both.
pub(crate) struct Connected {
    from: BoxRead,
    to: BoxWrite,
    process: Box<dyn ProcessHandle>,
}

impl Connected {
    /// Carries bytes until both directions have ended, and everything has
    /// arrived.
    pub(crate) async fn carry(self, outward: &Outward, input: InputReceiver, ends: &Ends) {
        let Self { from, to, mut process } = self;
        channel::pump(outward, input, from, to, ends).await;
        if !ends.overflow.is_cancelled() {
            // It may still hold a pipe's worth of bytes.
            let _ = timeout(FLUSH_MAX, process.wait()).await;
        }
    }
}

/// Has a tool connect to something, and waits until it has.
pub(crate) async fn connect(access: &Access, tool: Tool) -> Result<Connected, String> {
    let Process { stdin, mut stdout, stderr: _, handle } = start(access, tool).await?;
    let mut answer = [0];
    match timeout(OPEN_MAX, stdout.read_exact(&mut answer)).await {
        Ok(Ok(_)) if answer == *b"+" => Ok(Connected { from: stdout, to: stdin, process: handle }),
        Ok(Ok(_)) => {
            let mut reason = Lines::new(stdout);
            let reason = timeout(ANSWER_MAX, reason.next()).await.ok().flatten();
            Err(reason.unwrap_or_else(|| "it failed".into()))
        }
        Ok(Err(_)) => Err("the project refused".into()),
        Err(_) => Err("the project does not answer".into()),
    }
}

async fn start(access: &Access, tool: Tool) -> Result<Process, String> {
    let request = ExecRequest { command: Command::Tool(tool), ..ExecRequest::default() };
    match timeout(OPEN_MAX, access.sessions.exec(access.project, request)).await {
        Ok(Ok(process)) => Ok(process),
        Ok(Err(error)) => Err(cocalc_core::chain(&error)),
        Err(_) => Err("the project does not answer".into()),
    }
}

/// The number and the peer of `A <number> <address> <port>`.
pub(crate) fn accepted(line: &str) -> Option<(u32, (String, u32))> {
    let mut words = line.split(' ');
    let ("A", number, address, port) = (words.next()?, words.next()?, words.next()?, words.next()?) else {
        return None;
    };
    // It goes into a message to the client, who shows it.
    let sane = address.len() <= 64 && address.bytes().all(|b| b.is_ascii_graphic());
    (sane && words.next().is_none()).then_some(())?;
    Some((number.parse().ok()?, (address.to_owned(), port.parse().ok()?)))
}

pub(crate) struct Lines {
    from: BoxRead,
    buffer: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(from: BoxRead) -> Self {
        Self { from, buffer: Vec::new() }
    }

    /// The next line; `None` after the last, or after one that is none. Cancel
    /// safe.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return String::from_utf8(line).ok().map(|line| line.trim_end_matches('\n').to_owned());
            }
            let read = (&mut self.from).take(LINE_BYTES_MAX as u64).read_buf(&mut self.buffer).await;
            if self.buffer.len() > LINE_BYTES_MAX * 2 || !matches!(read, Ok(1..)) {
                return None;
            }
        }
    }
}

fn ticket() -> Result<String, String> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_listener_says_is_not_believed() {
        assert_eq!(accepted("A 7 127.0.0.1 99"), Some((7, ("127.0.0.1".into(), 99))));
        assert_eq!(accepted("A 7 - 0"), Some((7, ("-".into(), 0))));
        let long = format!("A 1 {} 1", "x".repeat(65));
        for bad in ["", "A", "A 1 x", "A x y 1", "A 1 y x", "A 1 y 1 z", "B 1 y 1", "A 1 \u{1b}[2J 1", &long]
        {
            assert_eq!(accepted(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn lines_are_bounded() {
        let endless = vec![b'x'; 100_000];
        let mut lines = Lines::new(Box::pin(std::io::Cursor::new(endless)));
        assert_eq!(lines.next().await, None);
        let mut lines = Lines::new(Box::pin(&b"a\nb\n\xff\n"[..]));
        assert_eq!(lines.next().await.as_deref(), Some("a"));
        assert_eq!(lines.next().await.as_deref(), Some("b"));
        assert_eq!(lines.next().await, None);
    }
}
