//! Processes that outlive the connection which asked for them: the project's
//! apps. What they print is kept in memory, the last of it.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{self, PipeReader, Read},
    process::{Command, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver},
    },
    time::{Duration, Instant},
};

use crate::{Registry, session::signal, sys};

/// How many there are at most.
const SERVICES_MAX: usize = 64;
/// How much of their output is kept, each.
const OUTPUT_BYTES_MAX: usize = 256 << 10;
/// How much of it is told in an answer.
const ANSWER_BYTES_MAX: usize = 48 << 10;
/// How long an answer waits for news at most.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// All of them.
#[derive(Default)]
pub(crate) struct Services {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Counts changes.
    generation: u64,
    all: BTreeMap<String, Service>,
}

struct Service {
    /// Which start of it this is.
    run: u64,
    pid: i32,
    begun: Instant,
    /// How it ended, as `waitpid` says, and after how long.
    ended: Option<(i32, Duration)>,
    output: VecDeque<u8>,
    /// How many bytes of output there were before those that are kept.
    dropped: u64,
}

impl Services {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.generation += 1;
        self.changed.notify_all();
    }

    /// Starts `command` as `name`. One of that name that runs is left alone.
    pub(crate) fn start(
        self: &Arc<Self>,
        name: String,
        command: &mut Command,
        registry: &Arc<Registry>,
    ) -> io::Result<()> {
        {
            let state = self.lock();
            match state.all.get(&name) {
                Some(service) if service.ended.is_none() => return Ok(()),
                None if state.all.len() >= SERVICES_MAX => {
                    return Err(io::Error::other("there are too many apps"));
                }
                _ => {}
            }
        }
        let (output, for_output) = io::pipe()?;
        command.stdin(Stdio::null()).stdout(for_output.try_clone()?).stderr(for_output);
        let (sender, ended) = mpsc::sync_channel(1);
        let pid = {
            let mut waiting = registry.lock();
            if registry.ending() {
                return Err(io::Error::other("the project is stopping"));
            }
            let pid = command.spawn()?.id().cast_signed();
            waiting.insert(pid, sender);
            pid
        };
        // Its end of the pipe must not stay open here.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut run = 0;
        self.change(|state| {
            let before = state.all.remove(&name);
            run = before.as_ref().map_or(0, |before| before.run) + 1;
            let (output, dropped) =
                before.map_or_else(Default::default, |before| (before.output, before.dropped));
            let service = Service { run, pid, begun: Instant::now(), ended: None, output, dropped };
            state.all.insert(name.clone(), service);
        });
        let (services, name_too) = (self.clone(), name.clone());
        let keeping =
            std::thread::Builder::new().stack_size(96 << 10).spawn(move || services.keep(&name_too, output));
        let services = self.clone();
        let waiting =
            std::thread::Builder::new().stack_size(64 << 10).spawn(move || services.wait(&name, run, &ended));
        if keeping.is_err() || waiting.is_err() {
            signal(registry, pid, sys::SIGKILL);
            return Err(io::Error::other("the project has no room for another process"));
        }
        Ok(())
    }

    /// Keeps the end of what it prints.
    fn keep(&self, name: &str, mut output: PipeReader) {
        let mut buffer = [0; 8192];
        loop {
            let count = match output.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            // No change that anybody waits for.
            let mut state = self.lock();
            let Some(service) = state.all.get_mut(name) else { continue };
            service.output.extend(&buffer[..count]);
            let surplus = service.output.len().saturating_sub(OUTPUT_BYTES_MAX);
            service.output.drain(..surplus);
            service.dropped += surplus as u64;
        }
    }

    fn wait(&self, name: &str, run: u64, ended: &Receiver<i32>) {
        let Ok(status) = ended.recv() else { return };
        self.change(|state| {
            if let Some(service) = state.all.get_mut(name).filter(|service| service.run == run) {
                service.ended = Some((status, service.begun.elapsed()));
            }
        });
    }

    /// What there is, once it is no longer of `generation`, or after `limit`.
    pub(crate) fn list(&self, generation: u64, limit: Duration) -> Vec<u8> {
        let state = self.lock();
        let wait = self
            .changed
            .wait_timeout_while(state, limit.min(WAIT_MAX), |state| state.generation == generation);
        let (state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        let mut answer = vec![b'L'];
        answer.extend(state.generation.to_be_bytes());
        answer.extend(u32::try_from(state.all.len()).unwrap_or(0).to_be_bytes());
        for (name, service) in &state.all {
            answer.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
            answer.extend(name.bytes());
            let (kind, code) = match service.ended.map(|(status, _)| status) {
                None => (0, 0),
                Some(status) if status & 0x7f == 0 => (1, u8::try_from(status >> 8 & 0xff).unwrap_or(255)),
                Some(status) => (2, u8::try_from(status & 0x7f).unwrap_or(0)),
            };
            answer.extend([kind, code]);
            let ran = service.ended.map_or_else(|| service.begun.elapsed(), |(_, ran)| ran);
            answer.extend(service.run.to_be_bytes());
            answer.extend(u64::try_from(ran.as_millis()).unwrap_or(u64::MAX).to_be_bytes());
        }
        answer
    }

    /// What `name` has printed from byte `offset` on: where that begins, and it.
    pub(crate) fn output(&self, name: &str, offset: u64) -> Vec<u8> {
        let mut answer = vec![b'O'];
        let state = self.lock();
        let (from, bytes) = match state.all.get(name) {
            None => (0, Vec::new()),
            Some(service) => {
                let from = offset.clamp(service.dropped, service.dropped + service.output.len() as u64);
                let skip = usize::try_from(from - service.dropped).unwrap_or(usize::MAX);
                let rest = service.output.iter().skip(skip).take(ANSWER_BYTES_MAX);
                (from, rest.copied().collect())
            }
        };
        answer.extend(from.to_be_bytes());
        answer.extend(bytes);
        answer
    }

    /// Asks `name` to end, kills it after `grace`, and forgets it.
    pub(crate) fn stop(&self, name: &str, grace: Duration, registry: &Registry) {
        let running = |state: &State| {
            state.all.get(name).filter(|service| service.ended.is_none()).map(|service| service.pid)
        };
        let Some(pid) = running(&self.lock()) else {
            return self.change(|state| drop(state.all.remove(name)));
        };
        signal(registry, pid, sys::SIGTERM);
        for (limit, last) in [(grace, false), (Duration::from_secs(5), true)] {
            let until = Instant::now() + limit;
            let mut state = self.lock();
            while running(&state).is_some() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let waited = self.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            let ended = running(&state).is_none();
            drop(state);
            if !ended && !last {
                signal(registry, pid, sys::SIGKILL);
            }
        }
        self.change(|state| drop(state.all.remove(name)));
    }
}
