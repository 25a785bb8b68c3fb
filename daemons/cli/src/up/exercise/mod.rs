//! `cocalc up --once`: uses the federation as its users would, and insists on
//! what it promises.

mod access;
mod files;
mod moving;
mod outage;
mod reach;

use std::time::Instant;

use serde_json::json;

use self::reach::Connect;
use super::{Up, narrator::Narrator};
use crate::failure::Failure;

/// Exercises everything, saying each step and its time.
///
/// # Errors
///
/// The first promise that is not kept.
pub(super) fn run(up: &mut Up, narrator: &Narrator) -> Result<(), Failure> {
    narrator.heading("Using the project");
    // Made now, so that it has expired by the time it is tried.
    let short = Connect::new(up, &up.federation.project.id, &json!({ "ttl_secs": 1 }))?;
    let expired = (short, Instant::now());
    access::app(up, narrator)?;
    access::web(up, narrator)?;
    access::shell(up, narrator)?;
    narrator.heading("Being kept out");
    access::refusals(up, narrator, &expired)?;
    narrator.heading("Looking back");
    files::run(up, narrator)?;
    narrator.heading("Moving it while it is used");
    moving::run(up, narrator)?;
    narrator.heading("Losing the master");
    outage::run(up, narrator)
}
