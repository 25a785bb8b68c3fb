//! What is said: events to the caller, and what rustic says that it would
//! only log.

use std::{
    io::Write as _,
    panic,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use cocalc_backup::protocol::{Event, PROGRESS_EVERY};
use cocalc_core::backups::{Phase, Progress};
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustic_core::{Progress as Bar, ProgressBars, ProgressType, RusticProgress};

/// How many warnings are kept; there may be one per file.
const WARNINGS_MAX: usize = 20;

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static PANIC: Mutex<Option<String>> = Mutex::new(None);

struct Ear;

impl Log for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn && metadata.target().starts_with("rustic_core")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let mut warnings = WARNINGS.lock().unwrap_or_else(PoisonError::into_inner);
            if warnings.len() < WARNINGS_MAX {
                warnings.push(record.args().to_string());
            }
        }
    }

    fn flush(&self) {}
}

/// Hears warnings and panics from now on.
pub(crate) fn listen() {
    static EAR: Ear = Ear;
    if log::set_logger(&EAR).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    panic::set_hook(Box::new(|info| {
        let mut first = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| info.to_string());
    }));
}

/// The warnings so far, the first few of them. rustic warns of a file that it
/// cannot read or write, and goes on; here that is a failure.
pub(crate) fn warnings() -> Vec<String> {
    WARNINGS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Forgets what was said: the job begins again.
pub(crate) fn forget() {
    WARNINGS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// The words of the first panic.
pub(crate) fn panic() -> Option<String> {
    PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Says something to the caller.
pub(crate) fn tell(event: &Event) {
    let mut stdout = std::io::stdout().lock();
    let told = serde_json::to_writer(&mut stdout, event).is_ok() && stdout.write_all(b"\n").is_ok();
    if !told || stdout.flush().is_err() {
        // Nobody listens.
        std::process::exit(super::UNWANTED);
    }
}

/// Says that a part of the work begins, which may have nothing to count yet.
pub(crate) fn phase(phase: Phase) {
    tell(&Event::Progress(Progress { phase, bytes: 0, total_bytes: None }));
}

/// Tells the progress of one phase.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bars(pub(crate) Phase);

impl ProgressBars for Bars {
    fn progress(&self, kind: ProgressType, _: &str) -> Bar {
        match kind {
            ProgressType::Bytes => Bar::new(BytesBar {
                phase: self.0,
                bytes: AtomicU64::new(0),
                total: AtomicU64::new(0),
                told: Mutex::new(Instant::now()),
            }),
            ProgressType::Spinner | ProgressType::Counter => Bar::hidden(),
        }
    }
}

#[derive(Debug)]
struct BytesBar {
    phase: Phase,
    bytes: AtomicU64,
    total: AtomicU64,
    told: Mutex<Instant>,
}

impl BytesBar {
    fn tell(&self) {
        let total = self.total.load(Ordering::Relaxed);
        tell(&Event::Progress(Progress {
            phase: self.phase,
            bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: (total > 0).then_some(total),
        }));
    }
}

impl RusticProgress for BytesBar {
    fn is_hidden(&self) -> bool {
        false
    }

    fn set_length(&self, length: u64) {
        self.total.store(length, Ordering::Relaxed);
    }

    fn set_title(&self, _: &str) {}

    fn inc(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        // Whoever holds the lock is telling; the next one will say more.
        if let Ok(mut told) = self.told.try_lock()
            && told.elapsed() >= PROGRESS_EVERY
        {
            *told = Instant::now();
            self.tell();
        }
    }

    fn finish(&self) {
        let _telling = self.told.lock();
        // Where there was nothing to do there is nothing to tell: it would look
        // like going back to those who have heard of more.
        if self.total.load(Ordering::Relaxed) > 0 || self.bytes.load(Ordering::Relaxed) > 0 {
            self.tell();
        }
    }
}
