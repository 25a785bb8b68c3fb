//! What a runner remembers of one project.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{Epoch, ProjectId, Timestamp},
    runner::{Limits, State, Stats, Status},
};

use super::{
    Phase,
    cli::Container,
    end::{End, Exit, Kills},
};
use crate::{
    cgroup::Groups,
    kernel,
    net::Resolver,
    oom::{self, Notices},
    pidfd::PidFd,
};

/// For how long a helper that has failed is not asked.
const HELPER_PAUSE: Duration = Duration::from_secs(30);
/// How long the kernel may take to say that a control group was removed.
const REMOVAL_LIMIT: Duration = Duration::from_secs(10);

/// One project. `operation` is held by whoever changes it.
#[derive(Debug)]
pub(crate) struct Project {
    pub(crate) id: ProjectId,
    pub(crate) operation: tokio::sync::Mutex<()>,
    view: Mutex<View>,
}

/// What is known of it at any time, without waiting.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) phase: Phase,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) slot: Option<u32>,
    /// When it was last made ready.
    pub(crate) used: Option<Instant>,
    /// What the container was made from; `None` if there is none.
    pub(crate) made_from: Option<String>,
    /// The container's id, where that is known.
    pub(crate) container: Option<String>,
    pub(crate) env: Arc<BTreeMap<String, String>>,
    /// What it may use now.
    pub(crate) limits: Limits,
    /// Answers its questions for names while it runs.
    pub(crate) resolver: Option<Arc<Resolver>>,
    pub(crate) running: Option<Arc<Running>>,
    pub(crate) started: Option<Timestamp>,
    pub(crate) reason: Option<String>,
    /// Why it is not known what it does; `None` if it is.
    pub(crate) doubt: Option<String>,
    /// The receipt of the last start.
    pub(crate) phases: Vec<(String, u64)>,
}

impl View {
    /// Whether nothing is known of it, nor anything of it there.
    pub(crate) fn is_empty(&self) -> bool {
        let Self { phase, epoch, slot, made_from, container, running, doubt, .. } = self;
        phase.is_none()
            && epoch.is_none()
            && slot.is_none()
            && made_from.is_none()
            && container.is_none()
            && running.is_none()
            && doubt.is_none()
    }
}

impl Project {
    pub(crate) fn new(id: ProjectId) -> Self {
        Self { id, operation: tokio::sync::Mutex::default(), view: Mutex::default() }
    }

    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn env(&self) -> Arc<BTreeMap<String, String>> {
        self.view().env.clone()
    }

    /// Its first process, if that is alive now.
    pub(crate) fn running(&self) -> Option<Arc<Running>> {
        self.view().running.clone().filter(|running| running.process.is_alive())
    }

    /// Why it is not known what it does; `None` if it is.
    pub(crate) fn doubt(&self) -> Option<String> {
        self.view().doubt.clone()
    }

    /// Whether it does not run, and nobody is about to change that.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.running().is_none() && self.view().phase.is_none()
    }

    pub(crate) fn status(&self) -> Status {
        let alive = self.running().is_some();
        let view = self.view();
        let state = match view.phase {
            Some(phase) => phase,
            None if alive => State::Running,
            None if view.doubt.is_some() => State::Unknown,
            None => State::Stopped,
        };
        let reason = match state {
            State::Stopped => view.reason.clone(),
            State::Unknown => view.doubt.clone(),
            _ => None,
        };
        Status { project: self.id, epoch: view.epoch, state, started: view.started, reason }
    }
}

/// Shows a phase for as long as it is held.
#[derive(Debug)]
pub(crate) struct InPhase<'a>(&'a Project);

impl<'a> InPhase<'a> {
    pub(crate) fn new(project: &'a Project, phase: State) -> Self {
        project.view().phase = Some(phase);
        Self(project)
    }
}

impl Drop for InPhase<'_> {
    fn drop(&mut self) {
        self.0.view().phase = None;
    }
}

/// A container's first process. When the first process of a PID namespace has
/// ended, no other is left in it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) pid: i32,
    pub(crate) process: PidFd,
    pub(crate) groups: Groups,
    /// The container's id.
    pub(crate) container: String,
    /// How many of its processes are known to have been killed for want of memory.
    killed_for_memory: AtomicU64,
    /// How many of them, when it began to be held.
    killed_before: u64,
    /// Counts how often its memory is used up from then on.
    notices: Option<Arc<Notices>>,
    /// When it began to be held, by the clock of the kernel's log.
    since: Duration,
    /// When the helper last failed, so that nobody waits for it each time.
    failed: Mutex<Option<Instant>>,
}

impl Running {
    /// Whether the helper has failed a moment ago.
    pub(crate) fn helper_fails(&self) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|at| at.elapsed() < HELPER_PAUSE)
    }

    /// Measures it, and keeps in mind what cannot be measured when it has ended. Blocks.
    pub(crate) fn stats(&self) -> Stats {
        let stats = self.groups.stats();
        self.killed_for_memory.fetch_max(stats.oom_kills, Ordering::Relaxed);
        stats
    }

    /// Why it has ended, given what podman says. Blocks.
    pub(crate) fn end(&self, exit: Option<Exit>) -> End {
        let noticed = self.notices.as_ref().map_or(0, |notices| notices.count(REMOVAL_LIMIT));
        let counted = self.killed_for_memory.load(Ordering::Relaxed);
        let kills = Kills { counted, more: noticed > counted.saturating_sub(self.killed_before) };
        End { exit, victim: oom::victim(self.pid, self.since), kills }
    }

    /// Looks at the counters as soon as it has ended, while they are there.
    fn watch_end(self: &Arc<Self>) {
        let (running, notices) = (Arc::downgrade(self), self.notices.clone());
        let Ok(process) = self.process.descriptor().and_then(kernel::watch) else {
            // The notices and podman remain.
            return;
        };
        tokio::spawn(async move {
            if let Some(notices) = notices {
                // Not before: a start does not wait for it. A failure is a panic.
                let _ = tokio::task::spawn_blocking(move || notices.ask_of_removal()).await;
            }
            if process.readable().await.is_ok()
                && let Some(running) = running.upgrade()
            {
                let _ = tokio::task::spawn_blocking(move || running.count_kills()).await;
            }
        });
    }

    fn count_kills(&self) {
        self.killed_for_memory.fetch_max(self.groups.oom_kills(), Ordering::Relaxed);
    }

    /// The helper has failed now.
    pub(crate) fn helper_failed(&self) {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// The first process of a container, which podman names or else others;
    /// `None` if it is not there any more.
    pub(crate) fn find(
        container: &Container,
        others: impl IntoIterator<Item = i32>,
    ) -> io::Result<Option<Arc<Self>>> {
        for pid in [container.pid].into_iter().chain(others) {
            if let Some(found) = Self::of(pid, &container.id)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The same, of a container by its id and the number of its first process.
    pub(crate) fn of(pid: i32, container: &str) -> io::Result<Option<Arc<Self>>> {
        let since = oom::log_time();
        let Some(process) = PidFd::open(pid)? else { return Ok(None) };
        // Asked after the descriptor was opened: if the number means another
        // process by now, that one is not in the container's control group.
        let groups = Groups::of(pid).ok().and_then(|groups| groups.of_container(container));
        let Some(groups) = groups else { return Ok(None) };
        // In this order: none is missed.
        let notices = groups.notices().map(Arc::new);
        let killed_before = groups.oom_kills();
        let held = Arc::new(Self {
            pid,
            process,
            groups,
            container: container.to_owned(),
            killed_for_memory: AtomicU64::new(killed_before),
            killed_before,
            notices,
            since,
            failed: Mutex::default(),
        });
        held.watch_end();
        Ok(Some(held))
    }
}
