//! The properties that make up the contract, by name.

use std::{any::Any, fmt, panic::AssertUnwindSafe, pin::Pin};

use cocalc_core::storage::Capabilities;
use futures_util::FutureExt as _;

use super::{
    Harness, Host, files, hostile, outside::Outside, posix, power, promises, sharing, space, streams,
};

type Check = for<'a> fn(&'a dyn Harness) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// One promise of the contract, and how it is checked.
#[derive(Clone, Copy)]
pub struct Property {
    /// Its name, which stays: `subject.promise`.
    pub name: &'static str,
    /// What it promises, in a sentence.
    pub promise: &'static str,
    /// Whether it can be checked on a backend that can do this; otherwise the
    /// backend is only asked whether it says so.
    needs: fn(&Capabilities) -> bool,
    asks: Asks,
    check: Check,
}

/// What a property asks of the harness, which is left out where that has none.
#[derive(Clone, Copy, PartialEq)]
enum Asks {
    Nothing,
    /// Paths of real files.
    Files,
    /// A way to cut the power.
    Power,
    /// Directories outside, which are looked at after every other property.
    Outside,
}

impl Asks {
    fn offered(self, harness: &dyn Harness) -> bool {
        match self {
            Self::Nothing => true,
            Self::Files => harness.has_files(),
            Self::Power => harness.cuts_power(),
            Self::Outside => !harness.outside().is_empty(),
        }
    }
}

impl fmt::Debug for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Property").field(&self.name).finish()
    }
}

/// How the properties of a backend came out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The names of those that hold.
    pub kept: Vec<&'static str>,
    /// Those that its capabilities, or what the harness does not offer, leave
    /// out.
    pub left_out: Vec<&'static str>,
    /// Those that are broken, each with what was seen.
    pub broken: Vec<(&'static str, String)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} kept, {} left out, {} broken",
            self.kept.len(),
            self.left_out.len(),
            self.broken.len()
        )?;
        for (name, seen) in &self.broken {
            write!(f, "\n{name}: {seen}")?;
        }
        Ok(())
    }
}

macro_rules! properties {
    ($($name:literal, $promise:literal, $needs:expr, $asks:ident, $check:path;)*) => {
        /// Every property, in the order in which they are checked.
        pub const PROPERTIES: &[Property] = &[$(Property {
            name: $name,
            promise: $promise,
            needs: $needs,
            asks: Asks::$asks,
            check: |harness| Box::pin($check(harness)),
        }),*];
    };
}

fn all(_: &Capabilities) -> bool {
    true
}

properties! {
    "volume.lifecycle", "A volume is there from create to delete, once, listed in order, and nothing of it comes back", all, Nothing, promises::volumes;
    "snapshot.immutable", "A snapshot never changes, whatever is written, and its name is taken once", all, Nothing, promises::snapshots;
    "restore.equal", "A restored volume equals its snapshot, what was live is kept, and a repeated restore changes nothing", all, Nothing, promises::restores;
    "aside.kept", "What is set aside is no longer live, and is kept", all, Nothing, promises::set_aside;
    "clone.equal", "A clone equals its source and is independent of it, for one owner and for two", all, Nothing, promises::clones;
    "project.isolated", "Projects never see each other's files or snapshots", all, Nothing, promises::isolation;
    "limit.holds", "Writing fails past the limit and never below it; what snapshots hold is charged; a full project can be frozen", all, Nothing, promises::limits;
    "limit.when-full", "In a full project snapshots, and the project itself, can be deleted, and another volume of its name is empty and not charged for it", |can| can.quotas, Nothing, promises::deleted_when_full;
    "hold.keeps", "A held snapshot is not deleted, nor is its project, until the last hold is dropped", all, Nothing, promises::holds;
    "changed.noticed", "What was written since a snapshot is always noticed, by whatever way the volume came to be live", all, Nothing, promises::changes_noticed;
    "changed.quiet", "An untouched volume has not changed since its snapshot", |can| can.detects_no_change, Nothing, promises::no_change;
    "footprint.adds-up", "Exclusive bytes are part of all bytes, shared while a snapshot has them, and exclusive when nothing else has", |can| can.shares_bytes, Nothing, sharing::footprint;
    "footprint.honest", "A footprint says how many entries and bytes there are, or that it cannot be known", all, Nothing, sharing::measured;
    "diff.complete", "What was added, removed and changed is said, in order, and nothing else", all, Nothing, sharing::diff;
    "diff.pages", "Pages of any size are parts of the whole", all, Nothing, sharing::diff_pages;
    "copy.equal", "A copied path equals its source, in another project and back from a snapshot, and is independent of it", all, Nothing, sharing::copies;
    "copy.refuses", "A copy replaces nothing it was not told to, and a refused one changes nothing", all, Nothing, sharing::copies_refused;
    "retry.same", "Every call made again after it was done, at once or later, is harmless and gives the same answer", all, Nothing, promises::retried;
    "copy.charged", "Between owners every byte of a copy and of a clone is charged to who has it", |can| can.quotas, Nothing, sharing::charged;
    "stream.whole", "A received snapshot equals the sent one, keeps its origin, and is received once", all, Nothing, streams::whole;
    "stream.delta", "A delta to a snapshot that is there gives the same as the whole, also on the way back", all, Nothing, streams::deltas;
    "stream.chain", "A chain of deltas gives what a whole stream gives", all, Nothing, streams::chain;
    "stream.refused", "A foreign stream, one without its base, or in the place of another snapshot is refused", all, Nothing, streams::refused;
    "stream.broken", "A cut, flipped, reordered or prolonged stream, and a sender's failure, leave nothing", all, Nothing, streams::broken;
    "stream.cancelled", "A receive that nobody waits for leaves nothing, and is in nobody's way", all, Nothing, streams::cancelled;
    "stream.twice", "The same stream received twice at once, and two at once, do not mix", all, Nothing, streams::at_once;
    "stream.repeatable", "A snapshot sent again is the same stream, byte for byte", |can| can.repeatable_streams, Nothing, streams::repeatable;
    "stream.holds", "A snapshot that is being sent, and its base, are not deleted meanwhile", all, Nothing, streams::held;
    "space.returns", "What is deleted, replaced or not received to its end is no longer charged, and is free again, soon", all, Nothing, space::returns;
    "path.hostile", "Paths and names that mean something to a shell, a URL or another system are names like others, and what is no path is refused", all, Nothing, hostile::names;
    "concurrent.orderly", "Calls on one project at the same time end, each with an answer that some order explains", all, Nothing, promises::concurrent;
    "list.consistent", "A listing during changes holds what was there all the time, once, and nothing half made", all, Nothing, promises::listed_meanwhile;
    "files.snapshot", "A snapshot has every name and all that Linux knows of a file", |can| can.full_metadata, Files, files::snapshot;
    "files.restore", "A restored volume has it, too", |can| can.full_metadata, Files, files::restore;
    "files.clone", "A clone has it, too, for one owner and for two", |can| can.full_metadata, Files, files::clone;
    "files.stream", "A received snapshot has it, too", |can| can.full_metadata, Files, files::stream;
    "files.delta", "A delta carries every kind of change: renames that swap, links, modes, times, attributes, holes", |can| can.full_metadata, Files, files::delta;
    "files.copy", "A copied directory has it, too", |can| can.full_metadata, Files, files::copy;
    "files.basic", "Contents, names of any bytes, links, modes and times to the nanosecond are kept by snapshots, clones, copies and streams", all, Files, files::basic;
    "files.links-lead-nowhere", "Links in a volume are followed by nobody, even when they change during the call", all, Files, files::links;
    "files.staged", "What was written to a place in staging is a snapshot like others when it is published, charged to its project, and nothing at all when it is dropped", all, Files, files::staged;
    "files.raced", "A directory that is swapped for a link to outside during a copy, a restore, a snapshot or a comparison lets nothing in or out", all, Files, hostile::raced;
    "files.posix", "A live volume is a Unix file system", all, Files, posix::behaves;
    "power.cut", "What was acknowledged is there after a loss of power at once: volumes, snapshots, copies, limits and deletions", all, Power, power::cut;
    "outside.untouched", "Nothing outside of a store is ever touched: no name, no content, no time", all, Outside, seen_by_others;
}

/// Checks one property; `Err` with what was seen.
async fn check(harness: &dyn Harness, property: &Property) -> Result<(), String> {
    let said = AssertUnwindSafe((property.check)(harness)).catch_unwind().await;
    said.map_err(|panic| words(panic.as_ref()))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// Checks the properties that `wanted` chooses, and says how each came out.
/// Where something outside was touched, [`Report::broken`] names it and during
/// which property that was.
pub async fn examine(harness: &dyn Harness, wanted: impl Fn(&Property) -> bool) -> Report {
    let capabilities = harness.store(Host::First).capabilities();
    let mut report = Report::default();
    let mut outside = Outside::plant(harness);
    let mut touched = Vec::new();
    let (last, others): (Vec<&Property>, Vec<&Property>) = PROPERTIES
        .iter()
        .filter(|property| wanted(property))
        .partition(|property: &&Property| property.asks == Asks::Outside);
    for property in others {
        if !(property.needs)(&capabilities) || !property.asks.offered(harness) {
            report.left_out.push(property.name);
            continue;
        }
        match check(harness, property).await {
            Ok(()) => report.kept.push(property.name),
            Err(seen) => report.broken.push((property.name, seen)),
        }
        touched.extend(outside.touched().into_iter().map(|path| format!("{path}, during {}", property.name)));
    }
    for property in last {
        if outside.is_empty() {
            report.left_out.push(property.name);
        } else if touched.is_empty() {
            report.kept.push(property.name);
        } else {
            report.broken.push((property.name, touched.join("; ")));
        }
    }
    report
}

/// For the property that is found out by all others.
async fn seen_by_others(_: &dyn Harness) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_promises_are_sentences() {
        let mut names: Vec<_> = PROPERTIES.iter().map(|property| property.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PROPERTIES.len());
        for property in PROPERTIES {
            assert!(property.promise.len() > 20 && !property.promise.ends_with('.'), "{property:?}");
        }
    }
}
