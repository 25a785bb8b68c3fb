//! Writes the audit chain to files, behind a bounded queue.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use cocalc_auth::audit::{Chain, Event, VerifyError, verify};
use cocalc_core::ids::{AccountId, ProjectId, Timestamp};
use tokio::sync::watch;

/// Events that wait to be written.
const QUEUE: usize = 1024;
/// A file is closed and another begun at this size.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How long a flush may wait for events before it.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// No line of ours is nearly as long; more is damage.
const LINE_BYTES_MAX: u64 = 64 * 1024;

const CURRENT: &str = "audit.log";

/// The audit log of one daemon: `audit.log` in its folder, and closed files
/// `audit-<first line>-<last line>.log`. One chain runs through all of them.
///
/// Clones write to the same log; when the last is dropped, what was queued is
/// written and the thread ends.
#[derive(Clone)]
pub struct AuditLog(Arc<Shared>);

struct Shared {
    queue: SyncSender<Order>,
    counts: Arc<Counts>,
    head: Arc<Mutex<Chain>>,
    rotations: watch::Receiver<u64>,
}

/// What did not become a line.
#[derive(Debug, Default)]
struct Counts {
    /// Events that are missing, and no line says so yet.
    gap: AtomicU64,
    /// Events that are missing, since the start.
    lost: AtomicU64,
    /// Writes that failed, since the start.
    failures: AtomicU64,
}

impl Counts {
    fn lose(&self) {
        self.gap.fetch_add(1, Ordering::Relaxed);
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
}

enum Order {
    Write(Box<Event>),
    Flush(SyncSender<(u64, String)>),
}

impl AuditLog {
    /// Continues the log in `folder`, which exists. A last line that a crash
    /// cut off is removed; a log that was changed is put aside as
    /// `audit-broken-<time>.log`, and the next one says so.
    ///
    /// # Errors
    ///
    /// The file system failed.
    pub fn open(folder: &Path) -> Result<Self, AuditError> {
        let (rotated, rotations) = watch::channel(0);
        let mut writer = Writer::open(folder, rotated)?;
        let (queue, orders) = sync_channel(QUEUE);
        let counts = Arc::new(Counts::default());
        let head = Arc::new(Mutex::new(writer.chain.clone()));
        let (seen, shown) = (counts.clone(), head.clone());
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&orders, &seen, &shown))
            .map_err(|source| AuditError::Io { operation: "start writing", path: folder.into(), source })?;
        Ok(Self(Arc::new(Shared { queue, counts, head, rotations })))
    }

    /// Queues an event, and never waits: when the queue is full, because the
    /// disk is slow, or the disk cannot be written, because it is full, the
    /// event is dropped and counted. As soon as a line can be written again,
    /// one of kind `dropped` says how many are missing, and why.
    pub fn record(&self, event: Event) {
        if let Err(TrySendError::Full(_)) = self.0.queue.try_send(Order::Write(Box::new(event))) {
            self.0.counts.lose();
        }
    }

    /// How many events were dropped since the start.
    pub fn lost(&self) -> u64 {
        self.0.counts.lost.load(Ordering::Relaxed)
    }

    /// How many writes have failed since the start.
    pub fn failures(&self) -> u64 {
        self.0.counts.failures.load(Ordering::Relaxed)
    }

    /// Whether events were dropped, and no line says so yet.
    pub fn is_full(&self) -> bool {
        self.0.counts.gap.load(Ordering::Relaxed) > 0
    }

    /// How many lines were written, and the hash of the last.
    pub fn head(&self) -> (u64, String) {
        let head = self.0.head.lock().unwrap_or_else(PoisonError::into_inner);
        (head.count(), head.head().to_owned())
    }

    /// Blocks until what was recorded before is durable, at most five seconds;
    /// whether it is.
    pub fn flush(&self) -> bool {
        self.durable_head().is_some()
    }

    /// As [`flush`](Self::flush), and returns where the chain was then: what a
    /// power cut does not take back, so that it can be told to others.
    pub fn durable_head(&self) -> Option<(u64, String)> {
        let (done, wait) = sync_channel(1);
        let until = Instant::now() + FLUSH_LIMIT;
        let mut order = Order::Flush(done);
        // The queue may stay full for as long as the disk stands still.
        loop {
            match self.0.queue.try_send(order) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < until => order = back,
                Err(_) => return None,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        wait.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }

    /// Changes each time that a file is closed and another begun.
    pub fn rotations(&self) -> watch::Receiver<u64> {
        self.0.rotations.clone()
    }
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditLog").field("head", &self.head()).finish_non_exhaustive()
    }
}

impl AuditLog {
    /// Verifies the log in `folder` offline, and returns how many lines it has
    /// and the hash of the last, to be compared with what the master was told.
    ///
    /// # Errors
    ///
    /// The first file that is not as it was written, or cannot be read.
    pub fn verify(folder: &Path) -> Result<(u64, String), AuditError> {
        Self::verify_each(folder, |_, _| {})
    }

    /// As [`verify`](Self::verify), and shows each line's number, from 1, with
    /// its hash, once it is verified.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn verify_each(folder: &Path, mut seen: impl FnMut(u64, &str)) -> Result<(u64, String), AuditError> {
        walk(folder, |chain, _| seen(chain.count(), chain.head()))
    }
}

/// Verifies every file of a folder, oldest first, as one chain, and shows the
/// chain after each line with the line's event.
fn walk(folder: &Path, mut seen: impl FnMut(&Chain, &str)) -> Result<(u64, String), AuditError> {
    let mut chain = Chain::default();
    for path in files(folder)? {
        let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
            if read.map_err(|source| io_error("read", &path, source))? == 0 {
                break;
            }
            chain = verify(chain, line.as_slice())
                .map_err(|source| AuditError::Chain { path: path.clone(), source })?;
            let json = str::from_utf8(&line).ok().and_then(|line| line.trim_end().split_once(' '));
            seen(&chain, json.map_or("", |(_, json)| json));
        }
    }
    Ok((chain.count(), chain.head().to_owned()))
}

/// Which events are asked for; what is `None` does not matter.
#[derive(Clone, Copy, Debug, Default)]
pub struct AuditQuery {
    /// About this project.
    pub project: Option<ProjectId>,
    /// About this account.
    pub account: Option<AccountId>,
    /// At this time or later.
    pub since: Option<Timestamp>,
    /// Before this time.
    pub until: Option<Timestamp>,
}

impl AuditQuery {
    fn finds(&self, event: &Event) -> bool {
        self.project.is_none_or(|project| event.project == Some(project))
            && self.account.is_none_or(|account| event.account == Some(account))
            && self.since.is_none_or(|since| event.time >= since)
            && self.until.is_none_or(|until| event.time < until)
    }
}

impl AuditLog {
    /// Reads the log in `folder` offline, oldest first, gives what the query
    /// finds to `found`, and returns the chain's end as [`verify`](Self::verify)
    /// does. Every line is verified before it is shown: what was changed is an
    /// error, and nothing after it is shown.
    ///
    /// # Errors
    ///
    /// As [`verify`](Self::verify).
    pub fn query(
        folder: &Path,
        query: &AuditQuery,
        mut found: impl FnMut(Event),
    ) -> Result<(u64, String), AuditError> {
        walk(folder, |_, json| {
            let event = serde_json::from_str(json).ok();
            if let Some(event) = event.filter(|event| query.finds(event)) {
                found(event);
            }
        })
    }
}

/// The files of a log, oldest first.
fn files(folder: &Path) -> Result<Vec<PathBuf>, AuditError> {
    let mut closed = Vec::new();
    let entries = fs::read_dir(folder).map_err(|source| io_error("list", folder, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| io_error("list", folder, source))?;
        let name = entry.file_name();
        let first = name.to_str().and_then(first_line);
        closed.extend(first.map(|first| (first, entry.path())));
    }
    closed.sort();
    let mut paths: Vec<_> = closed.into_iter().map(|(_, path)| path).collect();
    let current = folder.join(CURRENT);
    if current.exists() {
        paths.push(current);
    }
    Ok(paths)
}

/// The first line of a closed file, from its name.
fn first_line(name: &str) -> Option<u64> {
    let (first, last) = name.strip_prefix("audit-")?.strip_suffix(".log")?.split_once('-')?;
    last.parse::<u64>().ok()?;
    first.parse().ok()
}

struct Writer {
    folder: PathBuf,
    file: File,
    /// Of whole lines.
    bytes: u64,
    /// There may be half a line after them.
    torn: bool,
    /// Why the last write failed, if it did.
    trouble: Option<String>,
    rotated: watch::Sender<u64>,
    /// The first line of the current file.
    first: u64,
    chain: Chain,
}

impl Writer {
    fn open(folder: &Path, rotated: watch::Sender<u64>) -> Result<Self, AuditError> {
        let path = folder.join(CURRENT);
        let mut file = create(&path)?;
        cut_torn_line(&mut file).map_err(|source| io_error("mend", &path, source))?;
        let closed = match files(folder)?.iter().rev().find(|file| **file != path) {
            Some(last) => end_of(last)?,
            None => Chain::default(),
        };
        let first = closed.count() + 1;
        match verify_current(closed.clone(), &path) {
            Ok(chain) => {
                let bytes = file.metadata().map_err(|source| io_error("examine", &path, source))?.len();
                Ok(Self {
                    folder: folder.into(),
                    file,
                    bytes,
                    torn: false,
                    trouble: None,
                    rotated,
                    first,
                    chain,
                })
            }
            Err(AuditError::Chain { source, .. }) => {
                let aside = folder.join(format!("audit-broken-{}.log", Timestamp::now().millis()));
                tracing::error!(error = %source, path = %aside.display(), "the audit log was changed");
                fs::rename(&path, &aside).map_err(|source| io_error("put aside", &path, source))?;
                let file = create(&path)?;
                let folder = folder.to_owned();
                let mut writer = Self {
                    folder,
                    file,
                    bytes: 0,
                    torn: false,
                    trouble: None,
                    rotated,
                    first,
                    chain: closed,
                };
                let event = Event::new("broken", source.to_string(), Timestamp::now());
                writer.write(&event).map_err(|source| io_error("write", &path, source))?;
                Ok(writer)
            }
            Err(other) => Err(other),
        }
    }

    fn run(&mut self, orders: &Receiver<Order>, counts: &Counts, shown: &Mutex<Chain>) {
        while let Ok(order) = orders.recv() {
            match order {
                Order::Write(event) => {
                    // What could not be written came before this.
                    let ready = self.trouble.is_none() || self.tell_gap(counts);
                    let written = ready && {
                        let result = self.write(&event);
                        self.settle(result, counts)
                    };
                    if written {
                        self.tell_gap(counts);
                    } else {
                        counts.lose();
                    }
                }
                Order::Flush(done) => {
                    let told = self.tell_gap(counts);
                    // That it succeeds does not mean that a line could be written.
                    let synced = self.file.sync_data();
                    if (synced.is_ok() || self.settle(synced, counts)) && told {
                        let _ = done.try_send((self.chain.count(), self.chain.head().to_owned()));
                    }
                }
            }
            *shown.lock().unwrap_or_else(PoisonError::into_inner) = self.chain.clone();
        }
        self.tell_gap(counts);
        let _ = self.file.sync_data();
    }

    /// Writes how many events are missing, if any are; `false` if even that
    /// fails.
    fn tell_gap(&mut self, counts: &Counts) -> bool {
        let missing = counts.gap.swap(0, Ordering::Relaxed);
        if missing == 0 {
            return true;
        }
        let reason = match &self.trouble {
            Some(error) => format!("{missing} events were dropped: the log could not be written ({error})"),
            None => format!("{missing} events were dropped: the queue was full"),
        };
        let result = self.write(&Event::new("dropped", reason, Timestamp::now()));
        let told = self.settle(result, counts);
        if !told {
            // It shows as full, so that administrative actions wait.
            counts.gap.fetch_add(missing, Ordering::Relaxed);
        }
        told
    }

    /// Keeps in mind how a write ended; whether it ended well.
    fn settle(&mut self, result: io::Result<()>, counts: &Counts) -> bool {
        match result {
            Ok(()) => {
                self.trouble = None;
                true
            }
            Err(error) => {
                counts.failures.fetch_add(1, Ordering::Relaxed);
                // Once for each kind of trouble: there may be thousands a second.
                let text = error.to_string();
                if self.trouble.as_ref() != Some(&text) {
                    tracing::error!(%error, folder = %self.folder.display(), "cannot write the audit log");
                }
                self.trouble = Some(text);
                false
            }
        }
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        if self.torn {
            self.file.set_len(self.bytes)?;
            self.torn = false;
        }
        if self.bytes >= FILE_BYTES_MAX {
            self.rotate()?;
        }
        let mut chain = self.chain.clone();
        let line = chain.append(event);
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // Half a line would break the chain for what comes later.
            self.torn = self.file.set_len(self.bytes).is_err();
            return Err(error);
        }
        self.bytes += u64::try_from(line.len()).unwrap_or(0);
        self.chain = chain;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        let name = format!("audit-{:012}-{:012}.log", self.first, self.chain.count());
        let current = self.folder.join(CURRENT);
        fs::rename(&current, self.folder.join(name))?;
        self.file = create(&current).map_err(io::Error::other)?;
        self.bytes = 0;
        self.first = self.chain.count() + 1;
        self.rotated.send_modify(|count| *count += 1);
        Ok(())
    }
}

fn create(path: &Path) -> Result<File, AuditError> {
    OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| io_error("open", path, source))
}

fn verify_current(closed: Chain, path: &Path) -> Result<Chain, AuditError> {
    let file = File::open(path).map_err(|source| io_error("open", path, source))?;
    verify(closed, BufReader::new(file)).map_err(|source| AuditError::Chain { path: path.into(), source })
}

/// The end of the chain at a closed file, from its name and last line; a whole
/// verification is what `verify` is for.
fn end_of(path: &Path) -> Result<Chain, AuditError> {
    let count = path
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_suffix(".log")?.rsplit_once('-')?.1.parse().ok())
        .unwrap_or(0);
    let file = File::open(path).map_err(|source| io_error("open", path, source))?;
    let mut head = String::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|source| io_error("read", path, source))?;
        head = line.split_once(' ').map_or(String::new(), |(hash, _)| hash.to_owned());
    }
    Ok(Chain::resume(count, &head))
}

/// Removes what follows the last newline.
fn cut_torn_line(file: &mut File) -> io::Result<()> {
    file.rewind()?;
    let mut whole = 0;
    let mut reader = BufReader::new(&mut *file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        if read == 0 || line.last() != Some(&b'\n') {
            break;
        }
        whole += u64::try_from(read).unwrap_or(0);
    }
    file.set_len(whole)
}

fn io_error(operation: &'static str, path: &Path, source: io::Error) -> AuditError {
    AuditError::Io { operation, path: path.to_owned(), source }
}

/// Why the audit log cannot be continued or verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The file system failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not as it was written.
    #[error("{} is not as it was written", path.display())]
    Chain {
        /// The file.
        path: PathBuf,
        /// Where.
        source: VerifyError,
    },
}
