//! Many sessions at once, each of a client and a connection of its own.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    LIMIT,
    places::{Place, Places},
};
use crate::{Result, tool::finish};

/// So many clients log in at a time; a server may refuse more.
const AT_ONCE: u32 = 16;

/// Sessions that are open.
pub(super) struct Many {
    sessions: Vec<Session>,
    /// Until the last of them had begun.
    pub(super) took: Duration,
}

struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Many {
    pub(super) fn open(places: &Places, place: Place, count: u32) -> Result<Self> {
        let next = AtomicU32::new(0);
        let (opened, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(count) {
                scope.spawn(|| {
                    while next.fetch_add(1, Ordering::Relaxed) < count {
                        match Session::open(places, place) {
                            Ok(session) => {
                                opened.lock().unwrap_or_else(PoisonError::into_inner).push(session);
                            }
                            Err(error) => {
                                *failed.lock().unwrap_or_else(PoisonError::into_inner) =
                                    Some(error.to_string());
                                return;
                            }
                        }
                    }
                });
            }
        });
        let took = begun.elapsed();
        // Also if one failed: those that are open end with the value.
        let many = Self { sessions: opened.into_inner().unwrap_or_else(PoisonError::into_inner), took };
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(many),
            Some(error) => Err(format!("after {} sessions: {error}", many.sessions.len()).into()),
        }
    }

    /// A line to all, until it has come back from all.
    pub(super) fn echo(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        for session in &mut self.sessions {
            session.input.write_all(b"there and back\n")?;
        }
        for session in &mut self.sessions {
            session.expect("there and back\n")?;
        }
        Ok(begun.elapsed())
    }

    /// Ends them, as their users do.
    pub(super) fn close(mut self) -> Result<()> {
        let ending: Vec<Child> = self.sessions.drain(..).map(|session| session.child).collect();
        ending.into_iter().try_for_each(|child| finish("ssh", child, LIMIT).map(drop))
    }
}

impl Drop for Many {
    fn drop(&mut self) {
        for session in &mut self.sessions {
            let _ = session.child.kill();
            let _ = session.child.wait();
        }
    }
}

impl Session {
    fn open(places: &Places, place: Place) -> Result<Self> {
        let mut ssh = places.line(place, "echo ready; exec cat");
        let mut child = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a client without pipes".into());
        };
        let mut session = Self { child, input, output: BufReader::new(output) };
        if let Err(error) = session.expect("ready\n") {
            let _ = session.child.kill();
            return Err(match finish("ssh", session.child, LIMIT) {
                Err(said) => format!("{error}; {said}").into(),
                Ok(_) => error,
            });
        }
        Ok(session)
    }

    /// The client ends by itself when its server is silent for too long.
    fn expect(&mut self, line: &str) -> Result<()> {
        let mut seen = String::new();
        self.output.read_line(&mut seen)?;
        if seen == line { Ok(()) } else { Err(format!("{seen:?} came instead of {line:?}").into()) }
    }
}
