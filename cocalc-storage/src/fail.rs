//! Places at which a test ends the process, as `kill -9` or a loss of power
//! would: between any two steps whose order matters.
//!
//! Only a debug build has them, or one with the feature `fail-points`; in all
//! others `point` is nothing.

/// Every place, for tests that die at each of them in turn.
pub const NAMES: &[&str] = &[
    "create.staged",
    "create.in-place",
    "snapshot.taken",
    "delete-snapshot.destroyed",
    "intent.written",
    "intent.done",
    "intent.committed",
    "restore.staged",
    "restore.marked",
    "restore.frozen",
    "restore.exchanged",
    "set-aside.frozen",
    "set-aside.renamed",
    "delete.live",
    "delete.group",
    "delete.snapshots",
    "reaper.destroyed",
    "reaper.committed",
    "clone.in-place",
    "receive.prepared",
    "receive.applied",
    "receive.marked",
    "receive.published",
    "copy.intended",
    "copy.built",
    "copy.synced",
    "copy.in-place",
    "copy.committed",
    "stage.prepared",
    "stage.published",
];

/// Whether this build has them.
pub(crate) const HAS_POINTS: bool = cfg!(any(debug_assertions, feature = "fail-points"));

/// The variable that names the place to die at, and with `:N` after it, at the
/// how manieth time.
pub const VARIABLE: &str = "COCALC_FAIL_POINT";

/// Ends the process here with `SIGKILL`, if it was told to.
#[cfg(any(debug_assertions, feature = "fail-points"))]
pub(crate) fn point(name: &'static str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };
    static ORDERED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let ordered = std::env::var(VARIABLE).ok()?;
        Some(match ordered.rsplit_once(':').and_then(|(name, nth)| Some((name, nth.parse().ok()?))) {
            Some((name, nth)) => (name.to_owned(), nth),
            None => (ordered, 1),
        })
    });
    static SEEN: AtomicU64 = AtomicU64::new(0);
    debug_assert!(NAMES.contains(&name), "{name} is not among the fail points");
    if let Some((ordered, nth)) = &*ORDERED
        && ordered == name
        && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == *nth
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // It takes effect before the call returns to this thread; if it were
        // refused, going on would hide that.
        std::process::abort();
    }
}

/// Nothing, in this build.
#[cfg(not(any(debug_assertions, feature = "fail-points")))]
pub(crate) fn point(_name: &'static str) {}
