//! Automatic snapshots: when they are taken, and which of them are kept.
//!
//! | part | where | what it is |
//! |---|---|---|
//! | [`auto_name`], [`auto_time`] | pure | the names by which automatic snapshots are known |
//! | [`Policy`] | pure | what a project's owner wants |
//! | [`superfluous`], [`expendable`] | pure | which snapshots go: in the course of time, and when space is short |
//! | [`Schedule`] | pure | which project is due |
//! | [`Relief`] | pure | how many snapshots go when a project is nearly full |
//! | [`Keeper`] | driver | does it, over `Storage`, `Runner` and the ledger |
//!
//! What people name is theirs: nothing here ever deletes it.

mod keeper;
mod name;
mod policy;
mod relief;
pub(crate) mod retention;
mod schedule;

pub use keeper::{Keeper, KeeperSettings, Numbers, RaisedRoom};
pub use name::{AUTO_PREFIX, auto_name, auto_time};
pub use policy::{Policy, PolicyError, PolicyFields};
pub use relief::{Need, Relief};
pub use retention::{expendable, latest, superfluous};
pub use schedule::{Outcome, Schedule};
