//! Other credentials, when those at hand are refused in the middle of a job.

use std::sync::{
    Mutex, PoisonError,
    mpsc::{self, Receiver, SyncSender},
};

use cocalc_backup::{
    Location,
    protocol::{Event, RENEW_MAX, Renewed},
};

use crate::said;

/// Which of the two places of a job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Which {
    Repository,
    Mirror,
}

/// Asks the caller, one question at a time.
#[derive(Debug)]
pub(crate) struct Renewal {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// How often the caller has answered.
    answers: u64,
    last: Option<Renewed>,
    heard: Receiver<Renewed>,
}

impl Renewal {
    /// What is sent to the first is the answer to the second's questions.
    pub(crate) fn new() -> (SyncSender<Renewed>, Self) {
        let (sender, heard) = mpsc::sync_channel(1);
        (sender, Self { state: Mutex::new(State { answers: 0, last: None, heard }) })
    }

    /// What to show after what was shown with the answer number `seen` is
    /// refused, and the number of that answer. Several threads may be refused at
    /// once: one asks, the others take what it got.
    pub(crate) fn after(&self, seen: u64, which: Which) -> Option<(u64, Location)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.answers <= seen {
            said::tell(&Event::Renew);
            state.last = state.heard.recv_timeout(RENEW_MAX).ok();
            state.answers += 1;
        }
        let answers = state.answers;
        let renewed = state.last.as_ref()?;
        let location = match which {
            Which::Repository => renewed.location.clone(),
            Which::Mirror => renewed.mirror.clone(),
        };
        Some((answers, location?))
    }
}
