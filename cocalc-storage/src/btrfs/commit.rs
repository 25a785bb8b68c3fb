//! Writing the volume out, once for all who wait for it.

use std::{
    os::fd::AsFd,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::sys;
use crate::{
    fail,
    failure::{Doing as _, Failure},
};

/// Commits of one file system. Who asks is served by a commit that began after
/// it asked, so that many who ask at once cost one or two.
#[derive(Debug, Default)]
pub(super) struct Commits {
    state: Mutex<State>,
    ended: Condvar,
    /// Says that it has, and has not: for tests that must find that out.
    lost: bool,
}

/// Commits are numbered from 1, in the order in which they begin.
#[derive(Debug, Default)]
struct State {
    begun: u64,
    /// The last that ended well.
    done: u64,
    running: bool,
}

impl Commits {
    /// Those of a store that, in builds with fail points, makes none of them.
    pub(super) fn losing(lost: bool) -> Self {
        Self { lost: lost && fail::HAS_POINTS, ..Self::default() }
    }

    /// Makes what was done before this call survive a loss of power.
    pub(super) fn commit(&self, root: impl AsFd) -> Result<(), Failure> {
        if self.lost {
            return Ok(());
        }
        let mut state = self.lock();
        // One that runs already may have passed what the caller did.
        let wanted = state.begun + 1;
        while state.done < wanted {
            if state.running {
                state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.begun += 1;
            state.running = true;
            let this = state.begun;
            drop(state);
            let committed = sys::commit(root.as_fd());
            state = self.lock();
            state.running = false;
            if committed.is_ok() {
                state.done = this;
            }
            self.ended.notify_all();
            // The others try for themselves: each is told its own reason.
            committed.doing("write the volume out")?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
