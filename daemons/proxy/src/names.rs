//! Other names of projects, which the master knows.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use cocalc_core::{
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerReply, PeerRequest, api_subject},
    ids::{ProjectAlias, ProjectId},
};
use cocalc_ssh::Names;

/// How long the master may take to answer.
const LIMIT: Duration = Duration::from_secs(4);
/// How long an answer counts without a question. A name that is somebody else's
/// by then opens nothing: hosts decide by the project.
const FRESH: Duration = Duration::from_secs(30);
/// How many names are known, so that they are known while the master is away,
/// too. Names that mean nothing are not kept: there is no end of them.
const NAMES_MAX: usize = 100_000;

/// Asks the master, and remembers.
pub(crate) struct MasterNames {
    bus: Arc<dyn Bus>,
    peer: Peer,
    known: Mutex<BTreeMap<ProjectAlias, (ProjectId, Instant)>>,
}

impl fmt::Debug for MasterNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MasterNames").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl MasterNames {
    pub(crate) fn new(bus: Arc<dyn Bus>, peer: Peer) -> Self {
        Self { bus, peer, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<ProjectAlias, (ProjectId, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the master says; `None` if it says nothing.
    async fn ask(&self, alias: &ProjectAlias) -> Option<Option<ProjectId>> {
        let payload = Payload::json(&PeerRequest::Alias { alias: alias.clone() }).ok()?;
        let answer = self.bus.request(&api_subject(self.peer), payload, LIMIT).await.ok()?;
        match answer.payload.parse() {
            Ok(PeerReply::Alias { project }) => Some(project),
            _ => None,
        }
    }
}

#[async_trait]
impl Names for MasterNames {
    async fn project(&self, alias: &ProjectAlias) -> Option<ProjectId> {
        let known = self.known().get(alias).copied();
        if let Some((project, at)) = known
            && at.elapsed() < FRESH
        {
            return Some(project);
        }
        let Some(project) = self.ask(alias).await else {
            // The master is away: what was known goes on.
            return known.map(|(project, _)| project);
        };
        let mut names = self.known();
        match project {
            Some(project) => {
                if names.len() >= NAMES_MAX && !names.contains_key(alias) {
                    names.pop_first();
                }
                names.insert(alias.clone(), (project, Instant::now()));
            }
            None => drop(names.remove(alias)),
        }
        project
    }
}
