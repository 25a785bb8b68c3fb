//! Snapshots that somebody reads, and which therefore stay.

use std::{
    collections::BTreeMap,
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use cocalc_ids::{ProjectId, SnapshotName};

use tokio::io::{AsyncRead, ReadBuf};

use super::{Error, Result};
use crate::stream::BoxRead;

type Counts = BTreeMap<(ProjectId, SnapshotName), usize>;

/// The held snapshots of one store, for backends. Clones share them.
#[derive(Clone, Default)]
pub struct Holds(Arc<Mutex<Counts>>);

impl fmt::Debug for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

/// Keeps one snapshot while it lives.
#[derive(Debug)]
#[must_use = "the snapshot is held only while this lives"]
pub struct Hold {
    holds: Holds,
    key: (ProjectId, SnapshotName),
}

impl Holds {
    /// Holds a snapshot, which the caller knows to be there and keeps from
    /// being deleted during the call.
    pub fn take(&self, project: ProjectId, name: &SnapshotName) -> Hold {
        let key = (project, name.clone());
        *self.lock().entry(key.clone()).or_default() += 1;
        Hold { holds: self.clone(), key }
    }

    /// Whether it is held.
    pub fn held(&self, project: ProjectId, name: &SnapshotName) -> bool {
        self.lock().contains_key(&(project, name.clone()))
    }

    /// Refuses if it is held.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`].
    pub fn refuse_held(&self, project: ProjectId, name: &SnapshotName) -> Result<()> {
        if self.held(project, name) { Err(Error::InUse { project, name: name.clone() }) } else { Ok(()) }
    }

    /// Refuses if any snapshot of the project is held.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] with the first of them.
    pub fn refuse_any(&self, project: ProjectId) -> Result<()> {
        let counts = self.lock();
        match counts.keys().find(|(held, _)| *held == project) {
            Some((_, name)) => Err(Error::InUse { project, name: name.clone() }),
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that holds what it is made of until it is dropped.
struct Held {
    reader: BoxRead,
    _holds: Vec<Hold>,
}

impl AsyncRead for Held {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.reader.as_mut().poll_read(cx, buf)
    }
}

impl Hold {
    /// The same stream, which keeps `holds` until it is dropped.
    pub fn during(reader: BoxRead, holds: Vec<Self>) -> BoxRead {
        Box::pin(Held { reader, _holds: holds })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut counts = self.holds.lock();
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_free_when_its_last_hold_is_dropped() {
        let (holds, project) = (Holds::default(), ProjectId::random());
        let name: SnapshotName = "s".parse().unwrap();
        let (one, two) = (holds.take(project, &name), holds.take(project, &name));
        drop(one);
        assert!(matches!(holds.refuse_held(project, &name), Err(Error::InUse { .. })));
        assert!(holds.refuse_any(project).is_err() && holds.refuse_any(ProjectId::random()).is_ok());
        drop(two);
        assert!(holds.refuse_held(project, &name).is_ok() && holds.refuse_any(project).is_ok());
    }
}
