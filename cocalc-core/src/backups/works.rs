//! Work that takes longer than an answer may: begun once for each operation,
//! asked after often, and cancelled.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cocalc_ids::OperationId;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::Progress;
use crate::control::{BackupsOutcome, CommandError, ErrorCode};

/// How many that have ended are remembered; a command is sent again within
/// minutes.
const ENDED_MAX: usize = 1_024;
/// How many may be under way or wait at once.
const UNDER_WAY_MAX: usize = 256;

/// How far some work is.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// It waits for others.
    Waiting,
    /// It goes on.
    Working(Progress),
    /// It has ended.
    Ended(Result<BackupsOutcome, CommandError>),
}

/// The work of one operation, as who does it sees it.
#[derive(Clone, Debug)]
pub struct Work {
    tell: watch::Sender<Step>,
    cancel: CancellationToken,
    /// Whether it is ended by command, and not by what happens to the project.
    unwanted: Arc<AtomicBool>,
}

impl Work {
    /// Work that nobody asks after.
    pub fn unseen() -> Self {
        Self {
            tell: watch::Sender::new(Step::Waiting),
            cancel: CancellationToken::new(),
            unwanted: Arc::default(),
        }
    }

    /// Says how far it is.
    pub fn progress(&self, progress: Progress) {
        self.tell.send_replace(Step::Working(progress));
    }

    /// Ends it as soon as it can be.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Resolves when it is to end.
    pub async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// Whether it has ended without a result, and only because of what happened
    /// meanwhile: asked for again, it is begun again.
    fn is_to_be_repeated(&self) -> bool {
        match &*self.tell.borrow() {
            Step::Ended(Err(error)) => match error.code {
                ErrorCode::Busy | ErrorCode::StaleEpoch => true,
                ErrorCode::Cancelled => !self.unwanted.load(Ordering::SeqCst),
                _ => false,
            },
            _ => false,
        }
    }
}

/// What is under way on one host, and how the last of it ended. Clones share
/// it; with the last of them all work ends.
#[derive(Clone, Default)]
pub struct Works(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    works: BTreeMap<OperationId, Work>,
    ended: std::collections::VecDeque<OperationId>,
    tasks: JoinSet<()>,
}

impl fmt::Debug for Works {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().works.keys()).finish()
    }
}

impl Works {
    /// Begins `work` for `operation`, unless it has been begun, and waits for
    /// news of it, at most `wait`: how far it is then.
    ///
    /// # Errors
    ///
    /// [`ErrorCode::Busy`] if there is too much under way.
    pub async fn ask<F>(
        &self,
        operation: OperationId,
        wait: Duration,
        work: impl FnOnce(Work) -> F,
    ) -> Result<Step, CommandError>
    where
        F: Future<Output = Result<BackupsOutcome, CommandError>> + Send + 'static,
    {
        let mut news = self.begin(operation, work)?;
        let before = news.borrow_and_update().clone();
        if !matches!(before, Step::Ended(_)) {
            // At its end, or the first word after a while: one frame per wait.
            let ended = news.wait_for(|step| matches!(step, Step::Ended(_)));
            let _ = tokio::time::timeout(wait, ended).await;
        }
        Ok(news.borrow().clone())
    }

    fn begin<F>(
        &self,
        operation: OperationId,
        begin: impl FnOnce(Work) -> F,
    ) -> Result<watch::Receiver<Step>, CommandError>
    where
        F: Future<Output = Result<BackupsOutcome, CommandError>> + Send + 'static,
    {
        let mut known = self.lock();
        match known.works.get(&operation) {
            Some(work) if !work.is_to_be_repeated() => return Ok(work.tell.subscribe()),
            Some(_) => known.ended.retain(|ended| *ended != operation),
            None => {}
        }
        while known.tasks.try_join_next().is_some() {}
        if known.tasks.len() >= UNDER_WAY_MAX {
            let message = format!("{UNDER_WAY_MAX} backups and restores are under way or wait on this host");
            return Err(CommandError { code: ErrorCode::Busy, message });
        }
        let work = Work::unseen();
        let news = work.tell.subscribe();
        known.works.insert(operation, work.clone());
        known.ended.push_back(operation);
        if known.ended.len() > ENDED_MAX {
            let oldest = known.ended.iter().position(|id| {
                known.works.get(id).is_none_or(|work| matches!(*work.tell.borrow(), Step::Ended(_)))
            });
            if let Some(id) = oldest.and_then(|at| known.ended.remove(at)) {
                known.works.remove(&id);
            }
        }
        let doing = begin(work.clone());
        known.tasks.spawn(async move {
            // Also if it panics, it ends for who asks.
            let done = tokio::spawn(doing);
            let _stop = StopOnDrop(done.abort_handle());
            let ended = done.await.unwrap_or_else(|_| {
                Err(CommandError { code: ErrorCode::Failed, message: "the work broke off".into() })
            });
            work.tell.send_replace(Step::Ended(ended));
        });
        Ok(news)
    }

    /// Ends the work of an operation, and waits until it has, at most `wait`;
    /// whether nothing of it goes on any more.
    pub async fn cancel(&self, operation: OperationId, wait: Duration) -> bool {
        let Some(work) = self.lock().works.get(&operation).cloned() else { return true };
        work.unwanted.store(true, Ordering::SeqCst);
        work.cancel();
        let mut news = work.tell.subscribe();
        let ended = news.wait_for(|step| matches!(step, Step::Ended(_)));
        tokio::time::timeout(wait, ended).await.is_ok()
    }

    /// How many are under way or wait.
    pub fn under_way(&self) -> usize {
        let known = self.lock();
        known.works.values().filter(|work| !matches!(*work.tell.borrow(), Step::Ended(_))).count()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct StopOnDrop(tokio::task::AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The error of work that somebody ended.
pub(super) fn cancelled(what: &str) -> CommandError {
    CommandError { code: ErrorCode::Cancelled, message: format!("{what} was cancelled") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backups::Phase;

    const WAIT: Duration = Duration::from_millis(20);

    #[tokio::test(start_paused = true)]
    async fn it_is_begun_once_asked_after_and_cancelled() {
        let works = Works::default();
        let operation = OperationId::random();
        let begin = |work: Work| async move {
            work.progress(Progress { phase: Phase::Storing, bytes: 7, total_bytes: Some(9) });
            work.cancelled().await;
            Err(cancelled("it"))
        };
        let step = works.ask(operation, WAIT, begin).await.unwrap();
        assert!(matches!(step, Step::Working(Progress { bytes: 7, .. })), "{step:?}");
        let again = |_: Work| async { panic!("begun twice") };
        let step = works.ask(operation, WAIT, again).await.unwrap();
        assert!(matches!(step, Step::Working(_)), "{step:?}");
        assert_eq!(works.under_way(), 1);
        assert!(works.cancel(operation, WAIT).await);
        let step = works.ask(operation, WAIT, again).await.unwrap();
        let Step::Ended(Err(error)) = step else { panic!("{step:?}") };
        assert_eq!((error.code, works.under_way()), (ErrorCode::Cancelled, 0));
        assert!(works.cancel(OperationId::random(), WAIT).await, "nothing goes on of what nobody began");
    }

    #[tokio::test]
    async fn what_ended_because_of_the_project_is_begun_again() {
        let works = Works::default();
        let (operation, wait) = (OperationId::random(), Duration::from_secs(60));
        for code in [ErrorCode::Busy, ErrorCode::Cancelled, ErrorCode::StaleEpoch] {
            let failing = move |_: Work| async move { Err(CommandError { code, message: String::new() }) };
            let step = works.ask(operation, wait, failing).await.unwrap();
            assert!(matches!(step, Step::Ended(Err(error)) if error.code == code));
        }
        let code = ErrorCode::RepositoryUnavailable;
        let failing = move |_: Work| async move { Err(CommandError { code, message: String::new() }) };
        works.ask(operation, wait, failing).await.unwrap();
        let again = |_: Work| async { panic!("begun twice") };
        let step = works.ask(operation, wait, again).await.unwrap();
        assert!(matches!(step, Step::Ended(Err(error)) if error.code == code));
    }

    #[tokio::test]
    async fn what_panics_has_ended_and_the_line_is_bounded() {
        let works = Works::default();
        let step =
            works.ask(OperationId::random(), Duration::from_secs(60), |_| async { panic!("on purpose") });
        assert!(matches!(step.await.unwrap(), Step::Ended(Err(_))));
        for _ in 0..UNDER_WAY_MAX {
            works.ask(OperationId::random(), Duration::ZERO, |_| std::future::pending()).await.unwrap();
        }
        let refused = works.ask(OperationId::random(), Duration::ZERO, |_| std::future::pending()).await;
        assert_eq!(refused.unwrap_err().code, ErrorCode::Busy);
    }
}
