//! Who uses a project, when it is idle, and why it runs or was stopped.
//!
//! Ingresses note what passes on a [`Meter`], which costs an atomic store. The
//! host's watcher drains it into the project's [`Record`], which is pure: events
//! and the time go in, a [`Verdict`] comes out.
//!
//! What somebody *does* is work: a request, what is typed or sent, a download,
//! CPU and network above a floor, a declared job. What a page or terminal that is
//! only open *receives or asks by itself* is presence: background reads of a
//! browser, frames from an app, a terminal's output. A project is stopped when no
//! work was seen for its idle time. Presence defers that, because somebody may be
//! reading, but not for ever, because tabs are forgotten. No project is stopped
//! without a warning, nor while it is moved, backed up or kept.
//!
//! All times are of the boot clock, so that a jump of the wall clock stops
//! nothing; what is saved or sent is ages and durations.

mod explain;
mod meter;
mod metered;
mod policy;
mod record;

pub use explain::{Explained, IdleReport, explain, time};
pub use meter::{Meter, Meters, Noted, Tap, Use, Warning};
pub use metered::Metered;
pub use policy::{IdleLimits, IdlePolicy, IdleSettings, PolicyError};
pub use record::{Circumstances, Record, Saved, Source, Verdict};
