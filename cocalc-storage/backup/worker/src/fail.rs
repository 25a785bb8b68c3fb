//! Places at which a test ends the process, as `kill -9` or a loss of power
//! would: between any two steps whose order matters. Only a debug build has
//! them; in all others `point` is nothing.

/// Every place, for tests that die at each of them in turn.
#[cfg(debug_assertions)]
const NAMES: &[&str] = &[
    "store.write",
    "store.written",
    "store.remove",
    "store.removed",
    "backup.opened",
    "backup.stored",
    "backup.confirmed",
    "backup.marked",
    "backup.listed",
    "restore.planned",
    "restore.contents",
    "restore.written",
    "restore.compared",
    "restore.synced",
    "prune.planned",
    "prune.done",
    "repair.fetched",
    "repair.indexed",
    "erase.removed",
    "mirror.copied",
];

/// The variable that names the place to die at, and with `:N` after it, at the
/// how manieth time.
#[cfg(debug_assertions)]
const VARIABLE: &str = "COCALC_FAIL_POINT";

/// Ends the process here with `SIGKILL`, if it was told to.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &'static str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };
    static ORDERED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let ordered = std::env::var(VARIABLE).ok()?;
        let (name, nth) = match ordered.split_once(':') {
            Some((name, nth)) => (name, nth.parse().ok()?),
            None => (ordered.as_str(), 1),
        };
        assert!(NAMES.contains(&name), "{name} is not among the fail points: {NAMES:?}");
        Some((name.to_owned(), nth))
    });
    static SEEN: AtomicU64 = AtomicU64::new(0);
    debug_assert!(NAMES.contains(&name), "{name} is not among the fail points");
    if let Some((ordered, nth)) = &*ORDERED
        && ordered == name
        && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == *nth
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

/// Nothing, in this build.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &'static str) {}
