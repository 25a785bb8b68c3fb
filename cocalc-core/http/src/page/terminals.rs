//! Terminals that outlive their connections: a shell in a project, what it has
//! shown lately, and who looks at it now.
//!
//! Memory is bounded: what a terminal has shown is kept in a ring, what is
//! typed waits in a small buffer, and the shell is not read from while all who
//! look are far behind, so that a flood of output waits in the process that
//! makes it, and `^C` reaches that soon. While nobody looks, the shell goes on,
//! and the ring keeps the end of what it shows.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_core::{
    ids::{AccountId, ProjectId},
    runner::{self, Command, ExecRequest, Exit, Process, Pty, Runner, WindowSize},
    stream::{BoxRead, BoxWrite},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{OnceCell, watch},
    time::{Instant, timeout},
};

use super::ring::Ring;

/// How far the fastest of those who look may be behind before the shell waits.
pub(crate) const WINDOW_BYTES: u64 = 128 * 1024;
/// How much typed text of one of them may wait for the shell.
pub(crate) const INPUT_BYTES_MAX: usize = 256 * 1024;
/// How long a shell may take to begin.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// How long the last output is waited for once the shell has ended.
const LAST: Duration = Duration::from_secs(1);
/// How long a steering call may take.
const STEER_LIMIT: Duration = Duration::from_secs(5);

/// Bounds of the terminals that the project page opens.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TerminalLimits {
    /// Terminals of one project. Default: 16.
    pub per_project: usize,
    /// Terminals of all projects. Default: 1,024.
    pub total: usize,
    /// Connections to one terminal. Default: 16.
    pub clients: usize,
    /// How much of what a terminal has shown is kept, in bytes; at least 4,096.
    /// Default: 256 KiB.
    pub scrollback_bytes: usize,
    /// How long a terminal goes on that nobody looks at and that shows nothing.
    /// Default: 24 h.
    pub detached: Duration,
}

impl Default for TerminalLimits {
    fn default() -> Self {
        Self {
            per_project: 16,
            total: 1_024,
            clients: 16,
            scrollback_bytes: 256 * 1024,
            detached: Duration::from_secs(24 * 3600),
        }
    }
}

impl TerminalLimits {
    /// Terminals of one project.
    pub fn per_project(mut self, terminals: usize) -> Self {
        self.per_project = terminals;
        self
    }

    /// Terminals of all projects.
    pub fn total(mut self, terminals: usize) -> Self {
        self.total = terminals;
        self
    }

    /// How much of what a terminal has shown is kept, in bytes.
    pub fn scrollback_bytes(mut self, bytes: usize) -> Self {
        self.scrollback_bytes = bytes;
        self
    }

    /// How long a terminal goes on that nobody looks at and that shows nothing.
    pub fn detached(mut self, limit: Duration) -> Self {
        self.detached = limit;
        self
    }
}

/// Whether `name` names a terminal: 1 to 32 of `a-z`, `0-9` and `-`.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Why no terminal could be had.
#[derive(Debug)]
pub(crate) enum OpenError {
    /// There are as many as there may be.
    Full,
    Runner(runner::Error),
}

/// All terminals of an ingress. Clones share them.
#[derive(Clone)]
pub(crate) struct Terminals(Arc<Inner>);

struct Inner {
    runner: Arc<dyn Runner>,
    limits: TerminalLimits,
    slots: Mutex<BTreeMap<(ProjectId, String), Arc<Slot>>>,
}

/// A name, and its terminal once that is open.
type Slot = OnceCell<Arc<Terminal>>;

impl fmt::Debug for Terminals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terminals").field("open", &self.slots().len()).finish_non_exhaustive()
    }
}

impl Terminals {
    pub(crate) fn new(runner: Arc<dyn Runner>, limits: TerminalLimits) -> Self {
        Self(Arc::new(Inner { runner, limits, slots: Mutex::default() }))
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<(ProjectId, String), Arc<Slot>>> {
        self.0.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The terminal of this name, which is opened if there is none. A future
    /// that is dropped leaves none half open.
    pub(crate) async fn open(
        &self,
        project: ProjectId,
        name: &str,
        size: WindowSize,
    ) -> Result<Arc<Terminal>, OpenError> {
        let key = (project, name.to_owned());
        let slot = {
            let mut slots = self.slots();
            match slots.get(&key) {
                Some(slot) => Arc::clone(slot),
                None => {
                    let here = slots.keys().filter(|(other, _)| *other == project).count();
                    if here >= self.0.limits.per_project || slots.len() >= self.0.limits.total {
                        return Err(OpenError::Full);
                    }
                    let slot = Arc::new(Slot::new());
                    slots.insert(key.clone(), Arc::clone(&slot));
                    slot
                }
            }
        };
        // Also if this future is dropped: a name without a shell takes no room.
        let _unused = Unused { terminals: self, key: &key, slot: &slot };
        let opened = slot.get_or_try_init(|| self.start(key.clone(), size)).await;
        opened.cloned().map_err(OpenError::Runner)
    }

    async fn start(
        &self,
        key: (ProjectId, String),
        size: WindowSize,
    ) -> Result<Arc<Terminal>, runner::Error> {
        let project = key.0;
        let request = ExecRequest {
            command: Command::Shell,
            pty: Some(Pty::new("xterm-256color", size)),
            ..ExecRequest::default()
        };
        let begun = timeout(OPEN_LIMIT, self.0.runner.exec(project, request)).await;
        let process = begun.map_err(|_| runner::Error::TimedOut {
            project,
            operation: "exec",
            limit: OPEN_LIMIT,
        })??;
        let limits = &self.0.limits;
        let terminal = Arc::new(Terminal::new(limits, size));
        let (driven, terminals, detached) = (Arc::clone(&terminal), self.clone(), limits.detached);
        tokio::spawn(async move {
            let exit = driven.drive(process, detached).await;
            terminals.slots().remove(&key);
            // The end of the shell because its project ends is another matter.
            let status = timeout(STEER_LIMIT, terminals.0.runner.status(project)).await;
            let runs = matches!(status, Ok(Ok(status)) if status.state == runner::State::Running);
            driven.end(match exit {
                Some(exit @ Exit::Code(_)) if runs => Ended::Exited(exit),
                None if runs => Ended::Closed,
                Some(exit) if runs => Ended::Exited(exit),
                _ => Ended::ProjectStopped,
            });
        });
        Ok(terminal)
    }

    /// The names of a project's terminals, and how many look at each.
    pub(crate) fn list(&self, project: ProjectId) -> Vec<(String, usize)> {
        let slots = self.slots();
        let own = slots.iter().filter(|((other, _), _)| *other == project);
        own.filter_map(|((_, name), slot)| Some((name.clone(), slot.get()?.lock().clients.len()))).collect()
    }

    /// Ends a terminal; whether there was one.
    pub(crate) fn close(&self, project: ProjectId, name: &str) -> bool {
        let slot = self.slots().get(&(project, name.to_owned())).cloned();
        let Some(terminal) = slot.as_ref().and_then(|slot| slot.get()) else { return false };
        terminal.lock().closing = true;
        terminal.changed.send_replace(());
        true
    }
}

struct Unused<'a> {
    terminals: &'a Terminals,
    key: &'a (ProjectId, String),
    slot: &'a Arc<Slot>,
}

impl Drop for Unused<'_> {
    fn drop(&mut self) {
        if self.slot.initialized() {
            return;
        }
        let mut slots = self.terminals.slots();
        // The map's and this one: nobody else is about to open it.
        if Arc::strong_count(self.slot) == 2
            && slots.get(self.key).is_some_and(|slot| Arc::ptr_eq(slot, self.slot))
        {
            slots.remove(self.key);
        }
    }
}

/// How a terminal ended.
#[derive(Clone, Debug)]
pub(crate) enum Ended {
    /// Its shell did.
    Exited(Exit),
    /// It was closed, or nobody had looked at it for long.
    Closed,
    /// Its project is being stopped, perhaps for a move.
    ProjectStopped,
}

/// A shell, and what it has shown.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// Tells it from others of the same name.
    id: String,
    clients_max: usize,
    state: Mutex<State>,
    /// Something of the state has changed.
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    size: WindowSize,
    closing: bool,
    ended: Option<Ended>,
    /// When somebody looked, or something was shown, last.
    active: Instant,
}

/// One who looks.
#[derive(Debug, Default)]
struct Client {
    /// Up to where they have seen everything.
    seen: u64,
    /// What they have typed and nobody has read yet.
    input: Vec<u8>,
    /// How much of what they have typed was read.
    taken: u64,
}

impl Terminal {
    fn new(limits: &TerminalLimits, size: WindowSize) -> Self {
        let state = State {
            ring: Ring::new(limits.scrollback_bytes.max(4096)),
            clients: BTreeMap::new(),
            next_client: 0,
            size,
            closing: false,
            ended: None,
            active: Instant::now(),
        };
        Self {
            id: AccountId::random().to_string(),
            clients_max: limits.clients,
            state: Mutex::new(state),
            changed: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Begins to look: from `at`, if that is known, or else from the first
    /// character that is kept. `None` if too many look already.
    pub(crate) fn attach(self: &Arc<Self>, at: Option<u64>) -> Option<Attached> {
        let mut state = self.lock();
        if state.clients.len() >= self.clients_max {
            return None;
        }
        let known = at.filter(|at| (state.ring.start()..=state.ring.end()).contains(at));
        let at = known.unwrap_or_else(|| state.ring.first_character());
        let number = state.next_client;
        state.next_client += 1;
        state.clients.insert(number, Client { seen: at, ..Client::default() });
        drop(state);
        self.changed.send_replace(());
        Some(Attached {
            changes: self.changed.subscribe(),
            terminal: Arc::clone(self),
            number,
            at,
            resumed: known.is_some(),
            taken: 0,
        })
    }

    fn end(&self, ended: Ended) {
        self.lock().ended = Some(ended);
        self.changed.send_replace(());
    }

    /// Carries bytes until the shell has ended, which is returned, or the
    /// terminal was closed, or nobody has looked for `detached`.
    async fn drive(&self, process: Process, detached: Duration) -> Option<Exit> {
        let Process { stdin, stdout, handle, .. } = process;
        let mut reading = std::pin::pin!(self.read(stdout));
        let mut writing = std::pin::pin!(self.write(stdin));
        let mut steering = std::pin::pin!(self.steer(handle, detached));
        let (mut read, mut written) = (false, false);
        let exit = loop {
            tokio::select! {
                exit = &mut steering => break exit,
                () = &mut reading, if !read => read = true,
                () = &mut writing, if !written => written = true,
            }
        };
        if !read {
            // What it said last, if that is there by now.
            let _ = timeout(LAST, reading).await;
        }
        exit
    }

    /// Waits for the shell's end, and passes on sizes.
    async fn steer(&self, mut handle: Box<dyn runner::ProcessHandle>, detached: Duration) -> Option<Exit> {
        let mut changes = self.changed.subscribe();
        let mut size = self.lock().size;
        loop {
            let (wanted, leave) = {
                let mut state = self.lock();
                if !state.clients.is_empty() {
                    state.active = Instant::now();
                }
                (state.size, (state.active + detached).saturating_duration_since(Instant::now()))
            };
            if self.lock().closing || leave.is_zero() {
                // As when a terminal's window is closed. Dropping it kills it.
                let _ = timeout(STEER_LIMIT, handle.signal("HUP")).await;
                return timeout(LAST, handle.wait()).await.ok().and_then(Result::ok);
            }
            if wanted != size {
                size = wanted;
                if let Ok(Err(error)) = timeout(STEER_LIMIT, handle.resize(size)).await {
                    tracing::debug!(%error, "a terminal's size could not be changed");
                }
            }
            tokio::select! {
                exit = handle.wait() => return exit.ok(),
                _ = changes.changed() => {}
                () = tokio::time::sleep(leave) => {}
            }
        }
    }

    async fn read(&self, mut stdout: BoxRead) {
        let mut changes = self.changed.subscribe();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            while self.lock().is_behind() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
            match stdout.read(&mut buffer).await {
                Ok(read @ 1..) => {
                    let mut state = self.lock();
                    state.ring.push(&buffer[..read]);
                    state.active = Instant::now();
                }
                // A terminal's end is an error to who reads it.
                Ok(_) | Err(_) => return,
            }
            self.changed.send_replace(());
        }
    }

    async fn write(&self, mut stdin: BoxWrite) {
        let mut changes = self.changed.subscribe();
        loop {
            changes.borrow_and_update();
            let typed: Vec<(u64, Vec<u8>)> = {
                let mut state = self.lock();
                let waiting = state.clients.iter_mut().filter(|(_, client)| !client.input.is_empty());
                waiting.map(|(number, client)| (*number, std::mem::take(&mut client.input))).collect()
            };
            if typed.is_empty() && changes.changed().await.is_err() {
                return;
            }
            for (number, bytes) in typed {
                if stdin.write_all(&bytes).await.is_err() || stdin.flush().await.is_err() {
                    return;
                }
                if let Some(client) = self.lock().clients.get_mut(&number) {
                    client.taken += bytes.len() as u64;
                }
                self.changed.send_replace(());
            }
        }
    }
}

impl State {
    /// Whether everybody who looks is far behind.
    fn is_behind(&self) -> bool {
        let newest = self.clients.values().map(|client| client.seen).max();
        newest.is_some_and(|seen| self.ring.end().saturating_sub(seen) >= WINDOW_BYTES)
    }
}

/// Something to tell one who looks.
#[derive(Debug)]
pub(crate) enum News {
    /// What the terminal shows next.
    Shown(Vec<u8>),
    /// Something was shown that is no longer there: so many bytes.
    Skipped(u64),
    /// So many of the bytes that they have typed were read, in all.
    Taken(u64),
    Ended(Ended),
}

/// One who looks at a terminal, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached {
    terminal: Arc<Terminal>,
    number: u64,
    changes: watch::Receiver<()>,
    at: u64,
    resumed: bool,
    taken: u64,
}

impl Attached {
    /// The terminal's id, the place of the first byte that is shown, and
    /// whether that is the one that was asked for.
    pub(crate) fn hello(&self) -> (&str, u64, bool) {
        (self.terminal.id(), self.at, self.resumed)
    }

    /// What there is to tell, as soon as there is something. Cancel safe.
    pub(crate) async fn news(&mut self, bytes_max: usize) -> News {
        loop {
            self.changes.borrow_and_update();
            {
                let state = self.terminal.lock();
                if let Some(client) = state.clients.get(&self.number) {
                    if client.taken > self.taken {
                        self.taken = client.taken;
                        return News::Taken(client.taken);
                    }
                    if self.at < state.ring.start() {
                        let skipped = state.ring.start() - self.at;
                        self.at = state.ring.start();
                        return News::Skipped(skipped);
                    }
                    if self.at < state.ring.end() && self.at.saturating_sub(client.seen) < WINDOW_BYTES {
                        let (_, bytes) = state.ring.read(self.at, bytes_max);
                        self.at += bytes.len() as u64;
                        return News::Shown(bytes);
                    }
                }
                if let (Some(ended), true) = (&state.ended, self.at >= state.ring.end()) {
                    return News::Ended(ended.clone());
                }
            }
            if self.changes.changed().await.is_err() {
                return News::Ended(Ended::Closed);
            }
        }
    }

    /// They have typed something; whether there is room for it.
    pub(crate) fn typed(&self, bytes: &[u8]) -> bool {
        let mut state = self.terminal.lock();
        let Some(client) = state.clients.get_mut(&self.number) else { return false };
        if client.input.len() + bytes.len() > INPUT_BYTES_MAX {
            return false;
        }
        client.input.extend_from_slice(bytes);
        drop(state);
        self.terminal.changed.send_replace(());
        true
    }

    /// They have seen everything before `place`.
    pub(crate) fn seen(&self, place: u64) {
        let mut state = self.terminal.lock();
        let at = self.at;
        if let Some(client) = state.clients.get_mut(&self.number) {
            client.seen = client.seen.max(place.min(at));
        }
        drop(state);
        self.terminal.changed.send_replace(());
    }

    /// Their window has this size now; who says so last is obeyed.
    pub(crate) fn resize(&self, size: WindowSize) {
        self.terminal.lock().size = size;
        self.terminal.changed.send_replace(());
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut state = self.terminal.lock();
        state.clients.remove(&self.number);
        state.active = Instant::now();
        drop(state);
        self.terminal.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terminal() -> Arc<Terminal> {
        let limits = TerminalLimits { clients: 2, scrollback_bytes: 300_000, ..TerminalLimits::default() };
        Arc::new(Terminal::new(&limits, WindowSize { cols: 80, rows: 24 }))
    }

    #[test]
    fn the_shell_waits_for_the_fastest_who_looks_and_for_nobody_else() {
        let terminal = terminal();
        let window = usize::try_from(WINDOW_BYTES).unwrap();
        terminal.lock().ring.push(&vec![b'x'; window]);
        assert!(!terminal.lock().is_behind(), "nobody looks");
        let slow = terminal.attach(None).unwrap();
        let mut fast = terminal.attach(None).unwrap();
        assert!(terminal.attach(None).is_none(), "too many look");
        assert!(terminal.lock().is_behind());
        fast.seen(u64::MAX);
        assert!(terminal.lock().is_behind(), "nothing can be seen that was not sent");
        fast.at = 10;
        fast.seen(10);
        assert!(!terminal.lock().is_behind());
        drop(fast);
        assert!(terminal.lock().is_behind());
        drop(slow);
        assert!(!terminal.lock().is_behind());
    }

    #[tokio::test]
    async fn what_is_sent_and_not_seen_is_bounded() {
        let terminal = terminal();
        let mut looks = terminal.attach(None).unwrap();
        terminal.lock().ring.push(&vec![b'x'; 200_000]);
        let mut sent = 0;
        while let Ok(News::Shown(bytes)) = timeout(Duration::from_millis(50), looks.news(16_384)).await {
            sent += bytes.len() as u64;
        }
        assert_eq!(sent, WINDOW_BYTES);
        looks.seen(sent);
        assert!(matches!(looks.news(16_384).await, News::Shown(_)));
    }

    #[test]
    fn typed_text_that_nobody_reads_is_bounded() {
        let looks = terminal().attach(None).unwrap();
        assert!(looks.typed(&vec![b'x'; INPUT_BYTES_MAX]));
        assert!(!looks.typed(b"x"));
    }

    #[test]
    fn names_are_short_and_plain() {
        assert!(is_name("1") && is_name("build-2") && is_name(&"x".repeat(32)));
        for bad in ["", "A", "a/b", "..", "a b", "é", &"x".repeat(33)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
