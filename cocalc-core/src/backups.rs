//! Backups of projects.
//!
//! | part | where | what it is |
//! |---|---|---|
//! | [`Backups`] | trait | the contract; backends come with `cocalc-backup` |
//! | [`Policy`] | pure | what a project's owner wants |
//! | [`superfluous`] | pure | which backups go |
//! | [`Status`] | pure | how a project stands, as its host keeps it |
//! | [`Query`], [`answer`] | | questions, and answers that fit a frame |
//! | [`Keeper`] | driver | backs up what is due, over `Storage`, `Backups` and the ledger |

mod error;
mod fetched;
mod keeper;
mod policy;
mod query;
mod retention;
mod status;
mod types;
mod works;

use std::{fmt, path::Path};

use async_trait::async_trait;
use cocalc_ids::{ProjectId, TreePath};

use crate::storage::Changes;
pub use error::Error;
pub use fetched::{fetched_name, is_fetched};
pub use keeper::{Keeper, KeeperParts, Numbers, Trial};
pub use policy::{Policy, PolicyError, PolicyFields};
pub(crate) use query::compare;
pub use query::{Answer, Query, answer};
pub use retention::superfluous;
pub use status::{Failure, Last, Status, StatusStore, backup_error};
pub use types::{
    Access, Backup, BackupKind, BackupSource, CheckOptions, Checked, Entries, Entry, Erased, Lost, Phase,
    Progress, ProgressSink, PruneOptions, Pruned, Restored,
};
pub use works::{Step, Work, Works};

/// The result of a backup call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Keeps copies of project snapshots outside their host.
///
/// # Contract
///
/// - A backup that is listed restores: it was complete and durable before it
///   was listed. What could not be read is an error, not a gap.
/// - What is restored is what was backed up: names, contents, owners, modes,
///   times of modification, extended attributes, links and hard links, holes,
///   special files (a socket, which only its process could use, may be left
///   out), and the root directory itself.
/// - A call on one project changes no backup of another, and reads none.
/// - Where projects share a repository, a prune or a repair tidies all of it;
///   every backup that is listed stays whole.
/// - Several backups, and a prune, may run at once on one project.
/// - Dropping a call ends the work. It leaves no backup listed, and what was
///   restored so far is below the target. Repeating it is harmless; a backup
///   goes on from the data that are stored already.
#[async_trait]
pub trait Backups: fmt::Debug + Send + Sync + 'static {
    /// Backs up the files of a read-only snapshot. The first backup of a
    /// project makes its repository.
    async fn back_up(&self, source: &BackupSource, progress: ProgressSink<'_>) -> Result<Backup>;

    /// The backups of a project, oldest snapshot first; empty if it has none.
    async fn list(&self, project: ProjectId) -> Result<Vec<Backup>>;

    /// What is in a directory of a backup, by name, at most `max` entries of
    /// those after the name of `after`. [`NotFound`](Error::NotFound) if there
    /// is no such backup or directory.
    async fn ls(
        &self,
        project: ProjectId,
        backup: &str,
        directory: &TreePath,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Entries>;

    /// What in a backup has a name that contains `text`, ignoring the case of
    /// ASCII letters: at most `max` entries.
    async fn find(&self, project: ProjectId, backup: &str, text: &str, max: usize) -> Result<Entries>;

    /// What is different at `now`, a directory in which nothing changes
    /// meanwhile, from a backup, in and below `directory`: at most `max` changes,
    /// in the order of their paths (component by component, by bytes), of those
    /// after `after`. What the backup left out by its patterns is left out. A file
    /// with the same size and time of modification is taken for the same.
    /// [`NotFound`](Error::NotFound) if there is no such backup, or the directory
    /// is neither in it nor there.
    async fn diff(
        &self,
        project: ProjectId,
        backup: &str,
        now: &Path,
        directory: &TreePath,
        after: Option<&TreePath>,
        max: usize,
    ) -> Result<Changes>;

    /// Restores a backup into `target`, an empty directory, or one path of it
    /// to `target/<its name>`. Everything is read back and compared, and
    /// durable, before this returns. Nothing is written elsewhere.
    async fn restore(
        &self,
        project: ProjectId,
        backup: &str,
        path: &TreePath,
        target: &Path,
        progress: ProgressSink<'_>,
    ) -> Result<Restored>;

    /// Takes backups off the list. Forgetting what is not there is harmless.
    /// Space returns with [`prune`](Self::prune).
    async fn forget(&self, project: ProjectId, backups: &[String]) -> Result<()>;

    /// Marks what no backup needs, and deletes what was marked long enough
    /// ago. Safe beside running backups.
    async fn prune(&self, project: ProjectId, options: &PruneOptions) -> Result<Pruned>;

    /// Looks for damage.
    async fn check(&self, project: ProjectId, options: &CheckOptions) -> Result<Checked>;

    /// Deletes every backup of a project, and the repository if it is the
    /// project's own; of a shared one, its data are marked, and go with the
    /// prunes that come after their grace. No other call on the project may run.
    /// Erasing nothing is harmless.
    async fn erase(&self, project: ProjectId) -> Result<Erased>;
}
