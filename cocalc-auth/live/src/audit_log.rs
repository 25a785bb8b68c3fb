//! Writes the audit chain to files, behind a bounded queue.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use cocalc_auth::audit::{Chain, Event, VerifyError, verify};
use cocalc_core::ids::{AccountId, ProjectId, Timestamp};

/// Events that wait to be written.
const QUEUE: usize = 1024;
/// A file is closed and another begun at this size.
const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How long a flush may wait for events before it.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

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
    dropped: Arc<AtomicU64>,
    head: Arc<Mutex<Chain>>,
    /// How many were dropped since the start.
    lost: AtomicU64,
}

enum Order {
    Write(Box<Event>),
    Flush(SyncSender<()>),
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
        let mut writer = Writer::open(folder)?;
        let (queue, orders) = sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let head = Arc::new(Mutex::new(writer.chain.clone()));
        let (seen, shown) = (dropped.clone(), head.clone());
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&orders, &seen, &shown))
            .map_err(|source| AuditError::Io { operation: "start writing", path: folder.into(), source })?;
        Ok(Self(Arc::new(Shared { queue, dropped, head, lost: AtomicU64::new(0) })))
    }

    /// Queues an event. When the queue is full it is dropped and counted, and
    /// the count becomes an event of its own.
    pub fn record(&self, event: Event) {
        if let Err(TrySendError::Full(_)) = self.0.queue.try_send(Order::Write(Box::new(event))) {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            self.0.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many events were dropped since the start, because the queue was full.
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    /// Whether events were dropped, and the log has not caught up yet.
    pub fn is_full(&self) -> bool {
        self.0.dropped.load(Ordering::Relaxed) > 0
    }

    /// How many lines were written, and the hash of the last.
    pub fn head(&self) -> (u64, String) {
        let head = self.0.head.lock().unwrap_or_else(PoisonError::into_inner);
        (head.count(), head.head().to_owned())
    }

    /// Blocks until what was recorded before is in the file, at most five
    /// seconds; whether it is.
    pub fn flush(&self) -> bool {
        let (done, wait) = sync_channel(1);
        self.0.queue.send(Order::Flush(done)).is_ok() && wait.recv_timeout(FLUSH_LIMIT).is_ok()
    }
}

impl fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditLog").field("head", &self.head()).finish_non_exhaustive()
    }
}

/// Verifies every file of a folder, oldest first, as one chain.
///
/// # Errors
///
/// The first file that is not as it was written.
fn verify_folder(folder: &Path) -> Result<Chain, AuditError> {
    let mut chain = Chain::default();
    for path in files(folder)? {
        let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
        chain = verify(chain, BufReader::new(file))
            .map_err(|source| AuditError::Chain { path: path.clone(), source })?;
    }
    Ok(chain)
}

impl AuditLog {
    /// Verifies the log in `folder` offline, and returns how many lines it has
    /// and the hash of the last, to be compared with what the master was told.
    ///
    /// # Errors
    ///
    /// The first file that is not as it was written, or cannot be read.
    pub fn verify(folder: &Path) -> Result<(u64, String), AuditError> {
        let chain = verify_folder(folder)?;
        Ok((chain.count(), chain.head().to_owned()))
    }
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

impl AuditLog {
    /// The hash of a line of the log in `folder`, from 1; `None` if it has
    /// fewer. Verified is what [`verify`](Self::verify) says.
    ///
    /// # Errors
    ///
    /// The file system failed.
    pub fn hash_of(folder: &Path, line: u64) -> Result<Option<String>, AuditError> {
        let mut at = 0;
        for path in files(folder)? {
            let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
            for text in BufReader::new(file).lines() {
                let text = text.map_err(|source| io_error("read", &path, source))?;
                at += 1;
                if at == line {
                    return Ok(text.split_once(' ').map(|(hash, _)| hash.to_owned()));
                }
            }
        }
        Ok(None)
    }
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
        let mut chain = Chain::default();
        for path in files(folder)? {
            let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
            for line in BufReader::new(file).lines() {
                let mut line = line.map_err(|source| io_error("read", &path, source))?;
                line.push('\n');
                chain = verify(chain, line.as_bytes())
                    .map_err(|source| AuditError::Chain { path: path.clone(), source })?;
                let event = line.split_once(' ').and_then(|(_, json)| serde_json::from_str(json).ok());
                if let Some(event) = event.filter(|event| query.finds(event)) {
                    found(event);
                }
            }
        }
        Ok((chain.count(), chain.head().to_owned()))
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
    bytes: u64,
    /// The first line of the current file.
    first: u64,
    chain: Chain,
}

impl Writer {
    fn open(folder: &Path) -> Result<Self, AuditError> {
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
                Ok(Self { folder: folder.into(), file, bytes, first, chain })
            }
            Err(AuditError::Chain { source, .. }) => {
                let aside = folder.join(format!("audit-broken-{}.log", Timestamp::now().millis()));
                tracing::error!(error = %source, path = %aside.display(), "the audit log was changed");
                fs::rename(&path, &aside).map_err(|source| io_error("put aside", &path, source))?;
                let file = create(&path)?;
                let mut writer = Self { folder: folder.into(), file, bytes: 0, first, chain: closed };
                let event = Event::new("broken", source.to_string(), Timestamp::now());
                writer.write(&event).map_err(|source| io_error("write", &path, source))?;
                Ok(writer)
            }
            Err(other) => Err(other),
        }
    }

    fn run(&mut self, orders: &Receiver<Order>, dropped: &AtomicU64, shown: &Mutex<Chain>) {
        while let Ok(order) = orders.recv() {
            let result = match &order {
                Order::Write(event) => self.write(event),
                Order::Flush(_) => self.file.sync_data(),
            };
            let lost = dropped.swap(0, Ordering::Relaxed);
            let result = result.and_then(|()| match lost {
                0 => Ok(()),
                lost => {
                    let reason = format!("{lost} events were dropped: the queue was full");
                    self.write(&Event::new("dropped", reason, Timestamp::now()))
                }
            });
            if let Err(error) = result {
                // It shows as full, so that administrative actions wait.
                dropped.fetch_add(lost + 1, Ordering::Relaxed);
                tracing::error!(%error, folder = %self.folder.display(), "cannot write the audit log");
            } else if let Order::Flush(done) = order {
                let _ = done.try_send(());
            }
            *shown.lock().unwrap_or_else(PoisonError::into_inner) = self.chain.clone();
        }
        let _ = self.file.sync_data();
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            self.rotate()?;
        }
        let mut chain = self.chain.clone();
        let line = chain.append(event);
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // Half a line would break the chain for what comes later.
            self.file.set_len(self.bytes)?;
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
