//! One child process per daemon, restarted when it dies by itself.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::pidfile;
use crate::failure::{Failure, While};

/// How often children are looked at.
const TICK: Duration = Duration::from_millis(50);
/// The first pause before a restart; it doubles up to [`RESTART_MAX`].
const RESTART_MIN: Duration = Duration::from_millis(200);
const RESTART_MAX: Duration = Duration::from_secs(10);
/// A child that lived this long starts over with the shortest pause.
const STABLE: Duration = Duration::from_secs(10);
/// How long a daemon may take to drain before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// How to start a daemon.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) pidfile: PathBuf,
}

/// Keeps daemons running. Dropping it stops them.
#[derive(Debug)]
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    daemons: BTreeMap<String, Daemon>,
    ending: bool,
    restarts: u64,
}

#[derive(Debug)]
struct Daemon {
    spec: Spec,
    child: Option<Child>,
    wanted: bool,
    started: Instant,
    pause: Duration,
    due: Instant,
}

impl Supervisor {
    pub(crate) fn new() -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let seen = Arc::clone(&shared);
        let thread = std::thread::spawn(move || seen.watch());
        Self { shared, thread: Some(thread) }
    }

    /// Starts a daemon and keeps it running.
    pub(crate) fn start(&self, spec: Spec) -> Result<(), Failure> {
        let child = spawn(&spec)?;
        let now = Instant::now();
        let daemon =
            Daemon { child: Some(child), wanted: true, started: now, pause: RESTART_MIN, due: now, spec };
        self.shared.lock().daemons.insert(daemon.spec.name.clone(), daemon);
        Ok(())
    }

    /// The process id of a daemon, while it runs.
    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.shared.lock().daemons.get(name)?.child.as_ref().map(Child::id)
    }

    /// How many times any daemon was started again.
    pub(crate) fn restarts(&self) -> u64 {
        self.shared.lock().restarts
    }

    /// Stops a daemon and leaves it stopped until [`resume`](Self::resume).
    pub(crate) fn stop(&self, name: &str) {
        let pid = {
            let mut state = self.shared.lock();
            let Some(daemon) = state.daemons.get_mut(name) else { return };
            daemon.wanted = false;
            daemon.child.as_ref().map(Child::id)
        };
        let Some(pid) = pid else { return };
        signal(pid, Signal::TERM);
        if !self.gone(name, STOP_LIMIT) {
            signal(pid, Signal::KILL);
            self.gone(name, STOP_LIMIT);
        }
    }

    /// Starts a stopped daemon again.
    pub(crate) fn resume(&self, name: &str) {
        if let Some(daemon) = self.shared.lock().daemons.get_mut(name) {
            daemon.wanted = true;
            daemon.due = Instant::now();
        }
    }

    /// Waits until a daemon's process is gone.
    fn gone(&self, name: &str, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        while state.daemons.get(name).is_some_and(|daemon| daemon.child.is_some()) {
            if Instant::now() >= deadline {
                return false;
            }
            state = self.shared.wait(state);
        }
        true
    }

    /// Stops every daemon, in reverse order of their names' rank: first those
    /// that face users, last the master.
    pub(crate) fn stop_all(&self) {
        let mut names: Vec<String> = self.shared.lock().daemons.keys().cloned().collect();
        names.sort_by_key(|name| (name == "master", name.clone()));
        for name in names {
            self.stop(&name);
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop_all();
        self.shared.lock().ending = true;
        if let Some(thread) = self.thread.take() {
            // The watcher has no reason to panic; if it did, it was reported.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, TICK) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }

    /// Reaps children, and starts again those that died unasked.
    fn watch(&self) {
        loop {
            let mut state = self.lock();
            if state.ending {
                return;
            }
            let now = Instant::now();
            let mut restarts = 0;
            for daemon in state.daemons.values_mut() {
                let ended = daemon.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
                if let Some(status) = ended {
                    daemon.child = None;
                    pidfile::remove(&daemon.spec.pidfile);
                    if daemon.wanted {
                        eprintln!("{} ended ({status}); starting it again", daemon.spec.name);
                        let stable = now.duration_since(daemon.started) >= STABLE;
                        daemon.pause = if stable { RESTART_MIN } else { (daemon.pause * 2).min(RESTART_MAX) };
                        daemon.due = now + daemon.pause;
                    }
                }
                if daemon.wanted && daemon.child.is_none() && now >= daemon.due {
                    match spawn(&daemon.spec) {
                        Ok(child) => {
                            daemon.child = Some(child);
                            daemon.started = now;
                            restarts += 1;
                        }
                        Err(failure) => {
                            eprintln!("{failure}");
                            daemon.pause = (daemon.pause * 2).min(RESTART_MAX);
                            daemon.due = now + daemon.pause;
                        }
                    }
                }
            }
            state.restarts += restarts;
            self.changed.notify_all();
            drop(state);
            std::thread::sleep(TICK);
        }
    }
}

fn spawn(spec: &Spec) -> Result<Child, Failure> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&spec.log)
        .during(format!("cannot write {}", spec.log.display()))?;
    let mut child = Command::new(&spec.program)
        .arg("--config")
        .arg(&spec.config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C is for the supervisor, which ends its children in order.
        .process_group(0)
        .spawn()
        .during(format!("cannot start {}", spec.program.display()))?;
    if let Err(failure) = pidfile::write(&spec.pidfile, child.id()) {
        // A process that nobody could find later must not be left.
        let _ = child.kill();
        let _ = child.wait();
        return Err(failure);
    }
    Ok(child)
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // The child may have ended meanwhile, which is what was wanted.
        let _ = kill_process(pid, signal);
    }
}

/// The last lines of a daemon's log, for an error about it.
pub(crate) fn log_tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
