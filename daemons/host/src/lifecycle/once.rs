//! What was done, so that it is not done again.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use cocalc_core::{
    control::{CommandError, ErrorCode, HostReply},
    ids::OperationId,
};
use serde::{Deserialize, Serialize};

/// How many answers are kept. A command is sent again within minutes.
const ANSWERS_MAX: usize = 1024;

/// How far a command is that must not be done twice.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    /// It was begun. In the next process that is all that is known of it.
    Begun,
    /// It was done; the answer.
    Done(Box<HostReply>),
}

/// The answers to the last commands that must not be done twice, and which were
/// begun. In a directory, a file for each, so that the next process knows them:
/// a master sends a command again when this host comes back. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Once {
    directory: Option<PathBuf>,
    known: Arc<Mutex<VecDeque<(OperationId, Step)>>>,
}

impl Once {
    /// What was kept in `directory`, which is made if it is not there.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut kept = Vec::new();
        for file in fs::read_dir(directory)? {
            let file = file?;
            let modified = file.metadata()?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            kept.push((modified, file.path()));
        }
        kept.sort();
        let spare = kept.len().saturating_sub(ANSWERS_MAX);
        for (_, path) in kept.drain(..spare) {
            fs::remove_file(path)?;
        }
        // One that cannot be read was begun, by its name.
        let known = kept.into_iter().filter_map(|(_, path)| {
            let operation = path.file_stem()?.to_str()?.parse().ok()?;
            let step = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
            Some((operation, step.unwrap_or(Step::Begun)))
        });
        let known = Arc::new(Mutex::new(known.collect()));
        Ok(Self { directory: Some(directory.to_owned()), known })
    }

    /// Notes, before it is done, that a command is about to be done; its answer,
    /// if it has been.
    pub(super) async fn begin(&self, operation: OperationId) -> Result<Option<HostReply>, CommandError> {
        let known = self.lock().iter().find(|(id, _)| *id == operation).map(|(_, step)| step.clone());
        match known {
            Some(Step::Done(answer)) => return Ok(Some(*answer)),
            Some(Step::Begun) => {
                let message = "this host ended while it was doing that, so either all of it was done or nothing; \
                               look at the files, and ask again if it was not";
                return Err(CommandError { code: ErrorCode::Failed, message: message.into() });
            }
            None => {}
        }
        let spare = {
            let mut known = self.lock();
            let spare = (known.len() >= ANSWERS_MAX).then(|| known.pop_front()).flatten();
            known.push_back((operation, Step::Begun));
            spare
        };
        if let Err(error) = self.write(operation, Step::Begun, spare.map(|(id, _)| id)).await {
            self.lock().retain(|(id, _)| *id != operation);
            let message = format!("this host cannot note that it begins: {error}");
            return Err(CommandError { code: ErrorCode::Failed, message });
        }
        Ok(None)
    }

    /// It was done.
    pub(super) async fn done(&self, operation: OperationId, answer: HostReply) {
        let step = Step::Done(Box::new(answer));
        if let Some((_, known)) = self.lock().iter_mut().find(|(id, _)| *id == operation) {
            *known = step.clone();
        }
        if let Err(error) = self.write(operation, step, None).await {
            // The next process says that it does not know: that is safe.
            tracing::warn!(%operation, %error, "cannot note that a command was done");
        }
    }

    /// Nothing was done: it may be done when it is asked for again.
    pub(super) async fn not_done(&self, operation: OperationId) {
        self.lock().retain(|(id, _)| *id != operation);
        let Some(path) = self.path(operation) else { return };
        let removed = tokio::task::spawn_blocking(move || fs::remove_file(path)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%operation, %error, "cannot take back that a command was begun");
        }
    }

    async fn write(&self, operation: OperationId, step: Step, spare: Option<OperationId>) -> io::Result<()> {
        let Some(path) = self.path(operation) else { return Ok(()) };
        let spare = spare.and_then(|id| self.path(id));
        let text = serde_json::to_vec(&step)?;
        let write = move || {
            if let Some(spare) = spare {
                // Otherwise the next process deletes it.
                let _ = fs::remove_file(spare);
            }
            cocalc_daemon::files::write_atomic(&path, &text)
        };
        tokio::task::spawn_blocking(write).await.map_err(io::Error::other)?
    }

    fn path(&self, operation: OperationId) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(format!("{operation}.json")))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(OperationId, Step)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use cocalc_core::ids::{Epoch, ProjectId};

    use super::*;

    fn answer() -> HostReply {
        HostReply::Deleted { project: ProjectId::random(), epoch: Epoch::FIRST }
    }

    #[tokio::test]
    async fn the_next_process_knows_what_was_done_and_what_was_only_begun() {
        let directory = tempfile::tempdir().unwrap();
        let [done, begun, failed] = [(); 3].map(|()| OperationId::random());
        let reply = answer();
        let once = Once::open(directory.path()).unwrap();
        for operation in [done, begun, failed] {
            assert!(once.begin(operation).await.unwrap().is_none());
        }
        once.done(done, reply.clone()).await;
        once.not_done(failed).await;
        assert_eq!(once.begin(done).await.unwrap(), Some(reply.clone()));
        // As after kill -9.
        let once = Once::open(directory.path()).unwrap();
        assert_eq!(once.begin(done).await.unwrap(), Some(reply));
        assert_eq!(once.begin(begun).await.unwrap_err().code, ErrorCode::Failed, "nobody knows");
        assert!(once.begin(failed).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let once = Once::open(directory.path()).unwrap();
        for _ in 0..ANSWERS_MAX + 5 {
            once.begin(OperationId::random()).await.unwrap();
        }
        assert_eq!(once.lock().len(), ANSWERS_MAX);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), ANSWERS_MAX);
        fs::write(directory.path().join(format!("{}.json", OperationId::random())), b"{\"do").unwrap();
        let once = Once::open(directory.path()).unwrap();
        assert_eq!(once.lock().len(), ANSWERS_MAX, "a damaged file is one that was begun");
    }
}
