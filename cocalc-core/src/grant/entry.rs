//! What one host knows of one project, and how that may change. Pure.

use cocalc_ids::{Epoch, HostId, MoveId, ProjectId, VolumeUuid};
use serde::{Deserialize, Serialize};

use crate::{
    control::{Carried, CommandError, ErrorCode, ProjectConfig},
    router::{HostAddress, Reach, Route},
};

/// How many ended moves an entry remembers, so that their late commands are
/// refused.
const ENDED_MAX: usize = 16;

/// What a host durably knows of one project.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Entry {
    /// Which project.
    pub project: ProjectId,
    /// The grant that is held.
    pub granted: Option<Epoch>,
    /// The freeze of that grant.
    pub frozen: Option<Frozen>,
    /// The highest epoch that was ever seen for this project.
    pub seen: Option<Epoch>,
    /// Who has it now, as far as is known here.
    pub moved_to: Option<MovedTo>,
    /// A move that may bring it here.
    pub reserved: Option<Reservation>,
    /// Moves that are over here, oldest first: their late commands are refused.
    pub ended: Vec<MoveId>,
    /// How it is made and run.
    pub config: ProjectConfig,
    /// Its number among the projects of this host.
    pub slot: Option<u32>,
    /// It was granted to be started, and has not been yet.
    pub start_pending: bool,
    /// It was deleted by command; it never comes back.
    pub deleted: bool,
    /// Snapshots from an earlier stay that the project had no more when it
    /// came back, and that have to go.
    #[serde(default)]
    pub stale: Vec<Carried>,
}

/// The freeze of an epoch, which nothing but a higher grant ends.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Frozen {
    /// Which epoch is frozen.
    pub epoch: Epoch,
    /// By which move.
    pub move_id: MoveId,
    /// Whether the project ran when it was frozen.
    pub was_running: bool,
}

/// The owner that a project has elsewhere.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct MovedTo {
    /// Which host.
    pub owner: HostId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where that host is; `None` if only its name was heard.
    pub address: Option<HostAddress>,
}

/// A move that may bring a project here.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Reservation {
    /// Which move.
    pub move_id: MoveId,
    /// The only host that may send.
    pub source: HostId,
    /// The source's epoch.
    pub epoch: Epoch,
    /// How the project is run.
    pub config: ProjectConfig,
    /// What the live volume is a copy of, once it is.
    pub staged: Option<VolumeUuid>,
    /// It was aborted, and what was received is being deleted.
    pub discarding: bool,
    /// The project's own snapshots that may come.
    #[serde(default)]
    pub announced: Vec<Carried>,
    /// What lay here of the project's snapshots when the move was first
    /// expected; everything else was brought by it. `None` if nobody looked.
    #[serde(default)]
    pub had: Option<Vec<Carried>>,
    /// What lies here and is none of the project's snapshots any more, once
    /// the live volume stands.
    #[serde(default)]
    pub stale: Vec<Carried>,
}

/// Why a host does not do something to a project.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The host holds another grant, has frozen this one, has seen a higher
    /// epoch, or holds none.
    #[error("project {project}: epoch {asked} is not this host's to use ({held})")]
    StaleEpoch {
        /// The project.
        project: ProjectId,
        /// The epoch of the command.
        asked: Epoch,
        /// What the host holds, for people.
        held: String,
    },
    /// A move has it.
    #[error("project {project} is busy: {reason}")]
    Busy {
        /// The project.
        project: ProjectId,
        /// With what.
        reason: String,
    },
    /// Nothing is known of it, or nothing that the command could go on from.
    #[error("project {project} is not here: {reason}")]
    Unknown {
        /// The project.
        project: ProjectId,
        /// What is missing.
        reason: &'static str,
    },
}

impl From<Refusal> for CommandError {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::StaleEpoch { .. } => ErrorCode::StaleEpoch,
            Refusal::Busy { .. } => ErrorCode::Busy,
            Refusal::Unknown { .. } => ErrorCode::NotFound,
        };
        Self { code, message: refusal.to_string() }
    }
}

impl Entry {
    /// Knows nothing of `project` yet.
    pub fn new(project: ProjectId) -> Self {
        Self {
            project,
            granted: None,
            frozen: None,
            seen: None,
            moved_to: None,
            reserved: None,
            ended: Vec::new(),
            config: ProjectConfig::default(),
            slot: None,
            start_pending: false,
            deleted: false,
            stale: Vec::new(),
        }
    }

    /// The epoch under which this host may run the project and write its
    /// files; `None` if it may not.
    pub fn may_run(&self) -> Option<Epoch> {
        let granted = self.granted?;
        (self.frozen.is_none() && self.seen <= Some(granted) && !self.deleted).then_some(granted)
    }

    /// Where users find the project, seen from `host`, which has this entry.
    /// Requests wait while it is `parked`, and, after a move, until the start
    /// that the grant asked for has been tried.
    pub fn route(&self, host: HostId, parked: bool) -> Option<Route> {
        let project = self.project;
        if let Some(epoch) = self.may_run() {
            let how = if parked || self.start_pending { Reach::Parked } else { Reach::Local };
            return Some(Route { project, host, epoch, how });
        }
        if let Some(moved) = &self.moved_to
            && let Some(address) = &moved.address
        {
            let how = Reach::Remote(address.clone());
            return Some(Route { project, host: moved.owner, epoch: moved.epoch, how });
        }
        match (self.granted, self.frozen) {
            // Frozen, and nobody has said yet how it ended: requests wait.
            (Some(epoch), Some(_)) if self.seen <= Some(epoch) && !self.deleted => {
                Some(Route { project, host, epoch, how: Reach::Parked })
            }
            _ => None,
        }
    }

    /// Whether the project needs a number on this host.
    pub fn needs_slot(&self) -> bool {
        !self.deleted && (self.granted.is_some() || self.reserved.is_some())
    }

    /// Whether `epoch` may be acted on by an ordinary command.
    ///
    /// # Errors
    ///
    /// [`Refusal::Busy`] if a move has frozen that epoch; else
    /// [`Refusal::StaleEpoch`] unless it is the one that may run.
    pub fn permit(&self, epoch: Epoch) -> Result<(), Refusal> {
        if self.may_run() == Some(epoch) {
            return Ok(());
        }
        match self.frozen {
            Some(frozen) if frozen.epoch == epoch && self.seen <= Some(epoch) => {
                Err(self.busy(format!("frozen by move {}", frozen.move_id)))
            }
            _ => Err(self.stale(epoch)),
        }
    }

    /// Takes the first grant of a new project.
    ///
    /// # Errors
    ///
    /// Refuses an epoch that is not above everything seen, a project that is
    /// reserved or granted otherwise, and one that was deleted.
    pub fn create(&mut self, epoch: Epoch, config: ProjectConfig) -> Result<(), Refusal> {
        if self.may_run() == Some(epoch) {
            return Ok(());
        }
        if self.deleted || self.seen >= Some(epoch) {
            return Err(self.stale(epoch));
        }
        if self.reserved.is_some() || self.granted.is_some() {
            return Err(self.busy("this host already has files of it".into()));
        }
        self.hold(epoch, config);
        self.start_pending = false;
        Ok(())
    }

    /// Changes how the project is run, under the grant that is held.
    ///
    /// # Errors
    ///
    /// As [`permit`](Self::permit).
    pub fn configure(&mut self, epoch: Epoch, config: ProjectConfig) -> Result<(), Refusal> {
        self.permit(epoch)?;
        self.config = config;
        Ok(())
    }

    /// Gives up the grant because the project is deleted.
    ///
    /// # Errors
    ///
    /// As [`permit`](Self::permit), unless it was deleted under this epoch.
    pub fn delete(&mut self, epoch: Epoch) -> Result<(), Refusal> {
        if self.deleted && self.seen == Some(epoch) {
            return Ok(());
        }
        self.permit(epoch)?;
        self.granted = None;
        self.deleted = true;
        self.start_pending = false;
        Ok(())
    }

    /// Hears that `owner`, another host, has the project under `epoch`. What
    /// this host held of a lower epoch may not run any more, and a reservation
    /// of a lower epoch that led here is void. Says whether anything changed.
    ///
    /// News that `here` is the owner change nothing: a grant comes by command,
    /// and until it has come the host has to wait for it with what it holds.
    pub fn observe(
        &mut self,
        here: HostId,
        owner: HostId,
        epoch: Epoch,
        address: Option<HostAddress>,
    ) -> bool {
        if owner == here || self.seen > Some(epoch) || self.granted >= Some(epoch) {
            return false;
        }
        let before = self.clone();
        self.seen = Some(epoch);
        let known = self.moved_to.take().filter(|m| m.owner == owner).and_then(|m| m.address);
        self.moved_to = Some(MovedTo { owner, epoch, address: address.or(known) });
        // The map has another owner above the epoch that this move was to
        // follow, so this move cannot have been committed.
        if let Some(reserved) = self.reserved.as_mut().filter(|r| r.epoch < epoch) {
            reserved.discarding = true;
        }
        *self != before
    }

    /// Expects the project from another host.
    ///
    /// # Errors
    ///
    /// Refuses what is not above what was seen and held here, a move that is
    /// over, and a second move.
    pub fn reserve(
        &mut self,
        move_id: MoveId,
        source: HostId,
        epoch: Epoch,
        config: ProjectConfig,
    ) -> Result<(), Refusal> {
        if self.ended.contains(&move_id) {
            return Err(self.busy(format!("move {move_id} is over")));
        }
        if self.deleted || self.granted >= Some(epoch) || self.seen > Some(epoch) {
            return Err(self.stale(epoch));
        }
        match &self.reserved {
            Some(held) if held.move_id == move_id && !held.discarding => return Ok(()),
            Some(held) => return Err(self.busy(format!("it holds what move {} brought", held.move_id))),
            None => {}
        }
        self.seen = Some(epoch);
        self.reserved = Some(Reservation {
            move_id,
            source,
            epoch,
            config,
            staged: None,
            discarding: false,
            announced: Vec::new(),
            had: None,
            stale: Vec::new(),
        });
        Ok(())
    }

    /// Expects the project's own `snapshots` from the move that is reserved,
    /// beside those that were announced before. `here` is what lies here of
    /// them, which counts the first time: what comes later, the move brings.
    ///
    /// # Errors
    ///
    /// Refuses without the reservation.
    pub fn announce(
        &mut self,
        move_id: MoveId,
        snapshots: Vec<Carried>,
        here: Vec<Carried>,
    ) -> Result<(), Refusal> {
        self.reservation(move_id)?;
        if let Some(reserved) = &mut self.reserved {
            reserved.had.get_or_insert(here);
            for snapshot in snapshots {
                if !reserved.announced.contains(&snapshot) {
                    reserved.announced.push(snapshot);
                }
            }
        }
        Ok(())
    }

    /// Whether `source` may send a snapshot for `move_id` now.
    ///
    /// # Errors
    ///
    /// Refuses everything but the source of the move that is reserved, and
    /// everything once the live volume stands.
    pub fn expects(&self, move_id: MoveId, source: HostId) -> Result<(), Refusal> {
        let reserved = self.reservation(move_id)?;
        if reserved.source != source {
            return Err(self.busy(format!("move {move_id} comes from another host")));
        }
        if reserved.staged.is_some() {
            return Err(self.busy(format!("what move {move_id} brought stands already")));
        }
        Ok(())
    }

    /// The live volume is a copy of `origin` now, and `stale` is what lies here
    /// of snapshots that the project has no more.
    ///
    /// # Errors
    ///
    /// Refuses without the reservation, or if it is another copy already.
    pub fn stage(&mut self, move_id: MoveId, origin: VolumeUuid, stale: Vec<Carried>) -> Result<(), Refusal> {
        let staged = self.reservation(move_id)?.staged;
        if staged.is_some_and(|staged| staged != origin) {
            return Err(self.busy(format!("move {move_id} staged another snapshot")));
        }
        if let Some(reserved) = &mut self.reserved {
            reserved.staged = Some(origin);
            reserved.stale = stale;
        }
        Ok(())
    }

    /// Takes the grant of the move that brought the project here.
    ///
    /// # Errors
    ///
    /// Refuses what was not staged, and epochs that are not above the
    /// source's or not the highest seen.
    pub fn activate(
        &mut self,
        move_id: MoveId,
        epoch: Epoch,
        config: ProjectConfig,
        start: bool,
    ) -> Result<(), Refusal> {
        if self.granted == Some(epoch) && self.ended.contains(&move_id) {
            return Ok(());
        }
        let reserved = self.reservation(move_id).map_err(|_| self.stale(epoch))?;
        if reserved.epoch >= epoch || self.seen > Some(epoch) {
            return Err(self.stale(epoch));
        }
        if reserved.staged.is_none() {
            return Err(Refusal::Unknown { project: self.project, reason: "nothing was staged" });
        }
        self.stale = self.reserved.take().map(|reserved| reserved.stale).unwrap_or_default();
        self.hold(epoch, config);
        self.start_pending = start;
        self.end(move_id);
        Ok(())
    }

    /// What was left of an earlier stay has been deleted.
    pub fn tidied(&mut self) {
        self.stale.clear();
    }

    /// Marks what `move_id` brought as worthless; nothing of it is accepted
    /// any more. Says whether files of it may lie here.
    pub fn discard(&mut self, move_id: MoveId) -> bool {
        self.end(move_id);
        match &mut self.reserved {
            Some(reserved) if reserved.move_id == move_id => {
                reserved.discarding = true;
                true
            }
            _ => false,
        }
    }

    /// Everything that `move_id` brought has been deleted.
    pub fn discarded(&mut self, move_id: MoveId) {
        self.end(move_id);
        if self.reserved.as_ref().is_some_and(|r| r.move_id == move_id && r.discarding) {
            self.reserved = None;
        }
    }

    /// Whether this host is the source of `move_id` under `epoch`, before or
    /// after the freeze.
    ///
    /// # Errors
    ///
    /// Refuses other epochs, moves that are over, and a second move.
    pub fn source(&self, move_id: MoveId, epoch: Epoch) -> Result<(), Refusal> {
        if self.ended.contains(&move_id) {
            return Err(self.busy(format!("move {move_id} is over")));
        }
        match self.frozen {
            Some(frozen) if frozen.move_id != move_id => self.permit(epoch),
            Some(frozen) if frozen.epoch == epoch && self.seen <= Some(epoch) => Ok(()),
            Some(_) => Err(self.stale(epoch)),
            None => self.permit(epoch),
        }
    }

    /// Ends the right to run under `epoch`, until a higher grant.
    ///
    /// # Errors
    ///
    /// As [`source`](Self::source).
    pub fn freeze(&mut self, move_id: MoveId, epoch: Epoch, was_running: bool) -> Result<(), Refusal> {
        self.source(move_id, epoch)?;
        // A repeated freeze finds the project stopped; what counts is whether
        // it ran when it was frozen first.
        if self.frozen.is_none() {
            self.frozen = Some(Frozen { epoch, move_id, was_running: was_running || self.start_pending });
            self.start_pending = false;
        }
        Ok(())
    }

    /// Takes the project back after an aborted move: under the grant of a
    /// higher epoch, or under the one held if that was never frozen.
    ///
    /// # Errors
    ///
    /// Refuses an epoch that is below what was seen, the frozen epoch itself,
    /// and a project that has moved on.
    pub fn thaw(
        &mut self,
        move_id: MoveId,
        epoch: Epoch,
        config: ProjectConfig,
        start: bool,
    ) -> Result<(), Refusal> {
        if self.ended.contains(&move_id) {
            return Ok(());
        }
        if self.may_run() == Some(epoch) {
            self.end(move_id);
            return Ok(());
        }
        let elsewhere = self.moved_to.as_ref().is_some_and(|m| m.epoch >= epoch);
        if self.granted.is_none() || self.granted >= Some(epoch) || self.seen > Some(epoch) || elsewhere {
            return Err(self.stale(epoch));
        }
        let was_running = self.frozen.is_some_and(|f| f.was_running) || self.start_pending;
        self.hold(epoch, config);
        self.start_pending = start || was_running;
        self.end(move_id);
        Ok(())
    }

    /// Lets go for good: `owner` has the project under `epoch`. A retirement
    /// that comes after the project has returned changes nothing.
    ///
    /// # Errors
    ///
    /// Refuses if this host itself holds `epoch`.
    pub fn retire(
        &mut self,
        move_id: MoveId,
        owner: HostId,
        epoch: Epoch,
        address: HostAddress,
    ) -> Result<(), Refusal> {
        if self.granted == Some(epoch) {
            return Err(self.stale(epoch));
        }
        self.end(move_id);
        if self.is_past(epoch) {
            return Ok(());
        }
        self.granted = None;
        self.frozen = None;
        self.start_pending = false;
        self.seen = Some(epoch);
        self.moved_to = Some(MovedTo { owner, epoch, address: Some(address) });
        Ok(())
    }

    /// Whether what lies here belongs to an epoch from `epoch` on, so that a
    /// retirement for `epoch` must not touch it.
    pub fn is_past(&self, epoch: Epoch) -> bool {
        self.granted >= Some(epoch)
            || self.seen > Some(epoch)
            || self.reserved.as_ref().is_some_and(|r| r.epoch >= epoch)
    }

    /// The start that the grant asked for has been tried, or is not wanted any
    /// more.
    pub fn start_settled(&mut self) {
        self.start_pending = false;
    }

    /// What this host kept of an old epoch has been put aside.
    pub fn let_go(&mut self, epoch: Epoch) {
        if self.granted == Some(epoch) && self.may_run().is_none() {
            self.granted = None;
            self.frozen = None;
            self.start_pending = false;
        }
    }

    /// `move_id` is over here.
    pub fn end(&mut self, move_id: MoveId) {
        if !self.ended.contains(&move_id) {
            if self.ended.len() >= ENDED_MAX {
                self.ended.remove(0);
            }
            self.ended.push(move_id);
        }
    }

    fn hold(&mut self, epoch: Epoch, config: ProjectConfig) {
        self.granted = Some(epoch);
        self.seen = Some(epoch);
        self.frozen = None;
        self.moved_to = None;
        self.config = config;
    }

    fn reservation(&self, move_id: MoveId) -> Result<&Reservation, Refusal> {
        match &self.reserved {
            Some(reserved) if reserved.move_id == move_id && !reserved.discarding => Ok(reserved),
            _ => Err(Refusal::Unknown { project: self.project, reason: "no such move is expected" }),
        }
    }

    fn busy(&self, reason: String) -> Refusal {
        Refusal::Busy { project: self.project, reason }
    }

    fn stale(&self, asked: Epoch) -> Refusal {
        let held = match (self.granted, self.frozen, self.seen) {
            _ if self.deleted => "deleted".into(),
            (Some(granted), _, Some(seen)) if seen > granted => {
                format!("it held {granted}, and {seen} is known")
            }
            (Some(granted), Some(_), _) => format!("it has frozen {granted}"),
            (Some(granted), None, _) => format!("it holds {granted}"),
            (None, _, Some(seen)) => format!("it holds none, and {seen} is known"),
            (None, _, None) => "it holds none".into(),
        };
        Refusal::StaleEpoch { project: self.project, asked, held }
    }
}

#[cfg(test)]
mod tests;
