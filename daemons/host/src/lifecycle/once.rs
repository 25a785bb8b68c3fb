//! What was done, so that it is not done again.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use cocalc_core::{control::HostReply, ids::OperationId};

/// How many answers are kept. A command is sent again within minutes.
const ANSWERS_MAX: usize = 1024;

/// The answers to the last commands that must not be done twice. A new process
/// gets none of the commands that were sent to the one before.
#[derive(Debug, Default)]
pub(super) struct Once(Mutex<VecDeque<(OperationId, HostReply)>>);

impl Once {
    pub(super) fn get(&self, operation: OperationId) -> Option<HostReply> {
        self.lock().iter().find(|(done, _)| *done == operation).map(|(_, answer)| answer.clone())
    }

    pub(super) fn put(&self, operation: OperationId, answer: HostReply) {
        let mut answers = self.lock();
        if answers.len() == ANSWERS_MAX {
            answers.pop_front();
        }
        answers.push_back((operation, answer));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(OperationId, HostReply)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
