//! The images of this host: which are here, which come, which go.

mod garbage;
mod peer;
mod room;
mod settings;
mod work;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cocalc_core::{
    connector::Connector,
    control::{CommandError, ErrorCode, ImageReply, ImageReport, ImageRequest},
    grant::{Entry, Ledger},
    ids::{HostId, ImageDigest, Timestamp},
    images::ImageName,
};
use cocalc_storage::{Btrfs, ImageError, ImageRecord};
use tokio::sync::watch;

pub(crate) use self::garbage::{announce, keep};
pub use self::settings::ImageSettings;
use self::work::Work;

/// What was asked for so recently is about to be used.
const FRESH: Duration = Duration::from_secs(30);
/// The use of an image is written down when it is so much later than the last
/// that was.
const USE_STEP: Duration = Duration::from_secs(3600);
/// The longest that another host may be offered an image.
const OFFER_MAX: Duration = Duration::from_secs(3600);

/// The images of a host. Clones share them.
#[derive(Clone)]
pub struct Images(Arc<Inner>);

struct Inner {
    store: Option<Btrfs>,
    settings: ImageSettings,
    state: Mutex<State>,
    /// Counts changes, for whom the master is told of.
    changed: watch::Sender<u64>,
    work: Work,
}

#[derive(Default)]
struct State {
    known: BTreeMap<ImageDigest, Known>,
    default: Option<ImageDigest>,
    offers: BTreeMap<(ImageDigest, HostId), Instant>,
}

struct Known {
    path: PathBuf,
    record: ImageRecord,
    /// When somebody last asked for it, in this process.
    asked: Option<Instant>,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").field("digests", &self.digests()).finish_non_exhaustive()
    }
}

impl Images {
    /// Of a host without images, or with these, which are somebody else's to
    /// keep; the default first.
    pub fn fixed(images: impl IntoIterator<Item = (ImageDigest, PathBuf)>) -> Self {
        let images: Vec<_> = images.into_iter().collect();
        let default = images.first().map(|(digest, _)| *digest);
        let known = images
            .into_iter()
            .map(|(digest, path)| (digest, Known { path, record: ImageRecord::default(), asked: None }));
        let state = State { known: known.collect(), default, ..State::default() };
        Self::with(None, ImageSettings::default(), state)
    }

    /// Those on the volume. `default` is among them, if it is said.
    ///
    /// # Errors
    ///
    /// Those of reading the volume.
    pub async fn open(
        store: Btrfs,
        settings: ImageSettings,
        default: Option<ImageDigest>,
    ) -> Result<Self, ImageError> {
        let images = Self::with(Some(store), settings, State { default, ..State::default() });
        images.refresh().await?;
        Ok(images)
    }

    fn with(store: Option<Btrfs>, settings: ImageSettings, state: State) -> Self {
        let work = Work::default();
        let state = Mutex::new(state);
        Self(Arc::new(Inner { store, settings, state, changed: watch::Sender::new(0), work }))
    }

    /// Where an image's files are; that it was asked for keeps it from being
    /// deleted for a while, and counts as its use.
    pub fn path(&self, digest: ImageDigest) -> Option<PathBuf> {
        let mut state = self.state();
        let known = state.known.get_mut(&digest)?;
        known.asked = Some(Instant::now());
        Some(known.path.clone())
    }

    /// The images that are here, the default first.
    pub fn digests(&self) -> Vec<ImageDigest> {
        let state = self.state();
        let default = state.default.filter(|digest| state.known.contains_key(digest));
        let others = state.known.keys().filter(|digest| Some(**digest) != default).copied();
        default.into_iter().chain(others).collect()
    }

    /// Carries out what the master asks.
    pub(crate) async fn execute(&self, request: ImageRequest, world: &World) -> ImageReply {
        let done = match request {
            ImageRequest::Work { operation, task, wait_ms } => {
                self.work(operation, task, Duration::from_millis(wait_ms), world).await
            }
            ImageRequest::Cancel { operation } => {
                self.0.work.cancel(operation).await;
                Ok(ImageReply::Cancelled { operation })
            }
            ImageRequest::Offer { digest, to, life_secs } => self.offer(digest, to, life_secs),
            ImageRequest::Note { digest, pinned, name } => self.note(digest, pinned, name, world).await,
            ImageRequest::Prune { unused_secs, dry_run } => {
                self.prune(Duration::from_secs(unused_secs), dry_run, world).await
            }
        };
        done.unwrap_or_else(|error| {
            tracing::info!(code = ?error.code, reason = %error.message, "nothing done about an image");
            ImageReply::Error(error)
        })
    }

    /// What the master is told of all of them.
    pub(crate) fn reports(&self, ledger: &Ledger) -> Vec<ImageReport> {
        let uses = uses(ledger);
        let digests = self.digests();
        let state = self.state();
        digests.iter().filter_map(|digest| state.report(digest, &uses)).collect()
    }

    /// Hears that the images, or what is noted of them, have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Has the master told once more.
    pub(crate) fn tell_again(&self) {
        self.0.changed.send_modify(|count| *count += 1);
    }

    fn offer(&self, digest: ImageDigest, to: HostId, life_secs: u64) -> Result<ImageReply, CommandError> {
        self.path(digest).ok_or_else(|| missing(digest))?;
        let until = Instant::now() + Duration::from_secs(life_secs).min(OFFER_MAX);
        let mut state = self.state();
        state.offers.retain(|_, until| *until > Instant::now());
        state.offers.insert((digest, to), until);
        Ok(ImageReply::Offered { digest, to })
    }

    /// Whether the master said that this host may have this image now.
    fn is_offered(&self, digest: ImageDigest, to: HostId) -> bool {
        self.state().offers.get(&(digest, to)).is_some_and(|until| *until > Instant::now())
    }

    async fn note(
        &self,
        digest: ImageDigest,
        pinned: Option<bool>,
        name: Option<String>,
        world: &World,
    ) -> Result<ImageReply, CommandError> {
        let store = self.store()?;
        let name = name.map(|name| clean_name(&name)).transpose()?;
        if let Some(name) = &name {
            self.take_name(name, digest).await?;
        }
        let changed = store.note_image(&digest, move |record| {
            record.pinned = pinned.unwrap_or(record.pinned);
            record.names.extend(name.map(|name| name.to_string()));
        });
        changed.await.map_err(image_error)?;
        self.refresh().await.map_err(image_error)?;
        let report = self.state().report(&digest, &uses(&world.ledger));
        report.map(ImageReply::Noted).ok_or_else(|| missing(digest))
    }

    /// A name means one image: whichever else has it loses it.
    async fn take_name(&self, name: &ImageName, keeper: ImageDigest) -> Result<(), CommandError> {
        let store = self.store()?;
        let losers: Vec<ImageDigest> = {
            let state = self.state();
            let has = |known: &Known| known.record.names.contains(name.as_str());
            let losers = state.known.iter().filter(|(digest, known)| **digest != keeper && has(known));
            losers.map(|(digest, _)| *digest).collect()
        };
        for digest in losers {
            let name = name.to_string();
            let lose = move |record: &mut ImageRecord| {
                record.names.remove(&name);
            };
            store.note_image(&digest, lose).await.map_err(image_error)?;
        }
        Ok(())
    }

    async fn prune(
        &self,
        unused: Duration,
        dry_run: bool,
        world: &World,
    ) -> Result<ImageReply, CommandError> {
        self.store()?;
        let uses = uses(&world.ledger);
        let now = Timestamp::now();
        let policy = cocalc_core::images::Policy { unused, free_bytes_min: 0, unused_min: unused };
        let surplus = cocalc_core::images::surplus(&self.kept(&uses), &policy, now, u64::MAX);
        let mut images = Vec::new();
        for digest in surplus {
            let Some(report) = self.state().report(&digest, &uses) else { continue };
            if dry_run || self.remove(digest, &world.ledger).await? {
                images.push(report);
            }
        }
        Ok(ImageReply::Pruned { images })
    }

    /// What the decision about each is made from.
    fn kept(&self, uses: &BTreeMap<ImageDigest, u64>) -> Vec<cocalc_core::images::Kept> {
        let state = self.state();
        let kept = state.known.iter().map(|(digest, known)| cocalc_core::images::Kept {
            digest: *digest,
            pinned: known.record.pinned || state.default == Some(*digest),
            in_use: uses.contains_key(digest) || known.is_fresh(),
            used: known.record.used.max(known.record.imported),
            bytes: known.record.bytes,
        });
        kept.collect()
    }

    /// Deletes an image unless somebody uses it, or is about to.
    async fn remove(&self, digest: ImageDigest, ledger: &Ledger) -> Result<bool, CommandError> {
        let store = self.store()?;
        let removed = {
            // From here on nobody finds it; who found it before is in the ledger
            // by now, or has asked a moment ago.
            let mut state = self.state();
            let stays = |known: &Known| known.record.pinned || known.is_fresh();
            if state.default == Some(digest) || state.known.get(&digest).is_none_or(stays) {
                return Ok(false);
            }
            if uses(ledger).contains_key(&digest) {
                return Ok(false);
            }
            state.known.remove(&digest)
        };
        match store.remove_image(&digest).await {
            Ok(()) => {
                tracing::info!(%digest, "image deleted");
                self.tell_again();
                Ok(true)
            }
            Err(error) => {
                if let Some(known) = removed {
                    self.state().known.insert(digest, known);
                }
                match error {
                    ImageError::InUse { .. } => Ok(false),
                    error => Err(image_error(error)),
                }
            }
        }
    }

    /// Reads anew what is on the volume.
    async fn refresh(&self) -> Result<(), ImageError> {
        let Some(store) = &self.0.store else { return Ok(()) };
        let mut found = BTreeMap::new();
        for (digest, record) in store.images().await? {
            found.insert(digest, (store.image_path(&digest).await?, record));
        }
        let mut state = self.state();
        state.known = found
            .into_iter()
            .map(|(digest, (path, record))| {
                let asked = state.known.get(&digest).and_then(|known| known.asked);
                (digest, Known { path, record, asked })
            })
            .collect();
        if state.default.is_none_or(|default| !state.known.contains_key(&default)) {
            // Whichever came first is what projects get that say nothing.
            let first = state.known.iter().min_by_key(|(digest, known)| (known.record.imported, **digest));
            state.default = first.map(|(digest, _)| *digest);
        }
        drop(state);
        self.tell_again();
        Ok(())
    }

    fn store(&self) -> Result<&Btrfs, CommandError> {
        self.0.store.as_ref().ok_or_else(|| CommandError {
            code: ErrorCode::Failed,
            message: "this host keeps no images: they need Btrfs storage and the podman runner".to_owned(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the work on images needs of the host.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) ledger: Ledger,
    pub(crate) peers: Arc<dyn Connector>,
}

impl Known {
    fn is_fresh(&self) -> bool {
        self.asked.is_some_and(|asked| asked.elapsed() < FRESH)
    }
}

impl State {
    fn report(&self, digest: &ImageDigest, uses: &BTreeMap<ImageDigest, u64>) -> Option<ImageReport> {
        let known = self.known.get(digest)?;
        let record = &known.record;
        Some(ImageReport {
            digest: *digest,
            names: record.names.clone(),
            sources: record.sources.clone(),
            bytes: record.bytes,
            pinned: record.pinned,
            projects: uses.get(digest).copied().unwrap_or(0),
            used: record.used,
            imported: record.imported,
        })
    }
}

/// How many projects have each image: those that are here, and those that are
/// on their way.
fn uses(ledger: &Ledger) -> BTreeMap<ImageDigest, u64> {
    let mut uses = BTreeMap::new();
    for entry in ledger.entries() {
        for digest in wanted(&entry) {
            *uses.entry(digest).or_insert(0) += 1;
        }
    }
    uses
}

fn wanted(entry: &Entry) -> BTreeSet<ImageDigest> {
    let here = (entry.granted.is_some() || entry.reserved.is_some()).then_some(entry.config.image).flatten();
    let coming = entry.reserved.as_ref().and_then(|reserved| reserved.config.image);
    here.into_iter().chain(coming).collect()
}

fn clean_name(name: &str) -> Result<ImageName, CommandError> {
    name.parse().map_err(|error| invalid(format!("{name:?}: {error}")))
}

fn missing(digest: ImageDigest) -> CommandError {
    CommandError { code: ErrorCode::NotFound, message: format!("image {digest} is not on this host") }
}

fn invalid(message: impl Into<String>) -> CommandError {
    CommandError { code: ErrorCode::Invalid, message: message.into() }
}

fn image_error(error: ImageError) -> CommandError {
    let code = match &error {
        ImageError::NotFound { .. } => ErrorCode::NotFound,
        ImageError::BadArchive { .. } | ImageError::Different { .. } => ErrorCode::Invalid,
        ImageError::NoSpace => ErrorCode::NoSpace,
        ImageError::InUse { .. } => ErrorCode::InUse,
        _ => ErrorCode::Failed,
    };
    CommandError { code, message: cocalc_core::chain(&error) }
}
