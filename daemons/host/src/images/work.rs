//! Work that brings an image, in tasks that the master asks after.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cocalc_core::{
    control::{CommandError, ErrorCode, ImageReply, ImageReport, ImageTask},
    ids::{ImageDigest, OperationId},
    images::Reference,
};
use cocalc_podman::image::{self, Origin, Pull, Recipe, Step};
use cocalc_storage::{Btrfs, ImageRecord};
use tokio::sync::{Semaphore, watch};

use super::{Images, World, clean_name, image_error, invalid, missing, room::no_space, uses};

/// How many images come at once.
const AT_ONCE: usize = 2;
/// How much work is under way or remembered; more is refused.
const WORK_MAX: usize = 256;
/// How long the end of some is remembered.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// The longest that an answer waits for news.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// The largest recipe, in bytes.
const RECIPE_MAX: usize = 48 << 10;

/// The work under way, and how what was asked for lately has ended.
pub(super) struct Work {
    jobs: Mutex<BTreeMap<OperationId, Job>>,
    places: Arc<Semaphore>,
    /// One image comes from another host at a time: who waits for the same one
    /// finds it here then.
    pub(super) fetching: Arc<tokio::sync::Mutex<()>>,
}

impl Default for Work {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Self { jobs: Mutex::default(), places, fetching: Arc::default() }
    }
}

struct Job {
    state: watch::Receiver<State>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Debug)]
enum State {
    Going { phase: String, bytes: u64, bytes_expected: Option<u64> },
    Ended(Instant, Result<ImageReport, CommandError>),
}

/// Who hears how far some work is.
pub(super) struct Progress(watch::Sender<State>);

impl Progress {
    pub(super) fn phase(&self, text: &str) {
        self.0.send_modify(|state| {
            if let State::Going { phase, .. } = state {
                text.clone_into(phase);
            }
        });
    }

    pub(super) fn bytes(&self, have: u64, expected: Option<u64>) {
        self.0.send_modify(|state| {
            if let State::Going { bytes, bytes_expected, .. } = state {
                (*bytes, *bytes_expected) = (have, expected);
            }
        });
    }

    fn step(&self, step: &Step) {
        self.phase(&step.phase);
        if let Some(bytes) = step.bytes {
            self.bytes(bytes, None);
        }
    }
}

impl Work {
    fn jobs(&self) -> MutexGuard<'_, BTreeMap<OperationId, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends some work, and waits until it has.
    pub(super) async fn cancel(&self, operation: OperationId) {
        let job = self.jobs().remove(&operation);
        if let Some(job) = job {
            job.task.abort();
            let _ = job.task.await;
        }
    }
}

impl Images {
    /// Begins work unless it was begun, and says how far it is.
    pub(super) async fn work(
        &self,
        operation: OperationId,
        task: ImageTask,
        wait: Duration,
        world: &World,
    ) -> Result<ImageReply, CommandError> {
        self.store()?;
        let mut state = {
            let mut jobs = self.0.work.jobs();
            jobs.retain(
                |_, job| !matches!(&*job.state.borrow(), State::Ended(at, _) if at.elapsed() > REMEMBERED),
            );
            match jobs.get(&operation) {
                Some(job) => job.state.clone(),
                None if jobs.len() >= WORK_MAX => {
                    let message = format!("{WORK_MAX} images are on their way, or have just come; try later");
                    return Err(CommandError { code: ErrorCode::Busy, message });
                }
                None => {
                    let going = State::Going { phase: "queued".into(), bytes: 0, bytes_expected: None };
                    let (sender, receiver) = watch::channel(going);
                    let (images, world) = (self.clone(), world.clone());
                    let task = tokio::spawn(async move {
                        let progress = Progress(sender);
                        let done = images.bring(task, &progress, &world).await;
                        progress.0.send_replace(State::Ended(Instant::now(), done));
                    });
                    jobs.insert(operation, Job { state: receiver.clone(), task });
                    receiver
                }
            }
        };
        let now = state.clone();
        let ended = state.wait_for(|state| matches!(state, State::Ended(..)));
        let last = match tokio::time::timeout(wait.min(WAIT_MAX), ended).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) => {
                // The task is gone without a word.
                self.0.work.jobs().remove(&operation);
                let message = "the work on the image broke off; try again".to_owned();
                return Err(CommandError { code: ErrorCode::Unavailable, message });
            }
            Err(_) => now.borrow().clone(),
        };
        match last {
            State::Going { phase, bytes, bytes_expected } => {
                Ok(ImageReply::Working { operation, phase, bytes, bytes_expected })
            }
            State::Ended(_, Ok(image)) => Ok(ImageReply::Done { operation, image }),
            State::Ended(_, Err(error)) => Err(error),
        }
    }

    async fn bring(
        &self,
        task: ImageTask,
        progress: &Progress,
        world: &World,
    ) -> Result<ImageReport, CommandError> {
        let broken = || CommandError { code: ErrorCode::Failed, message: "this host is ending".into() };
        let _place = Arc::clone(&self.0.work.places).acquire_owned().await.map_err(|_| broken())?;
        let name = match &task {
            ImageTask::Pull { name, .. } | ImageTask::Build { name, .. } | ImageTask::Import { name, .. } => {
                name.as_deref().map(clean_name).transpose()?
            }
            ImageTask::Fetch { .. } => None,
        };
        let store = self.store()?.clone();
        let mut noted = ImageRecord::default();
        noted.names.extend(name.as_ref().map(ToString::to_string));
        let comes = async {
            match task {
                ImageTask::Pull { reference, .. } => {
                    let reference: Reference =
                        reference.parse().map_err(|error| invalid(format!("{error}")))?;
                    self.pull(&store, Origin::Reference(reference), noted, progress).await
                }
                ImageTask::Import { file, .. } => self.import(&store, &file, noted, progress).await,
                ImageTask::Build { recipe, .. } => self.build(&store, &recipe, noted, progress).await,
                ImageTask::Fetch { digest, from } => {
                    let _alone = self.0.work.fetching.lock().await;
                    if self.path(digest).is_none() {
                        self.fetch(&store, digest, from, progress, world).await?;
                    }
                    Ok(digest)
                }
            }
        };
        let digest = self.while_there_is_room(&store, comes).await?;
        self.refresh().await.map_err(image_error)?;
        if let Some(name) = &name {
            self.take_name(name, digest).await?;
            self.refresh().await.map_err(image_error)?;
        }
        let report = self.state().report(&digest, &uses(&world.ledger));
        report.ok_or_else(|| missing(digest))
    }

    /// Has podman bring an image, and imports what it brought.
    async fn pull(
        &self,
        store: &Btrfs,
        origin: Origin,
        mut noted: ImageRecord,
        progress: &Progress,
    ) -> Result<ImageDigest, CommandError> {
        let limits = self.0.settings.limits();
        let scratch = store.scratch().await.map_err(image_error)?;
        let pull = Pull {
            origin,
            work: scratch.path(),
            auth_file: self.0.settings.auth_file.clone(),
            insecure: self.0.settings.insecure_registries.clone(),
            bytes_max: limits.bytes.saturating_mul(2),
        };
        let pulled = pull.run(|step| progress.step(&step)).await.map_err(source_error)?;
        progress.phase("unpacking");
        noted.sources.insert(pulled.source.clone());
        let tar = pulled.tar().map_err(source_error)?;
        let done = store.import_image_as(tar, &limits, noted, image::dress).await;
        drop(scratch);
        done.map_err(image_error)
    }

    async fn import(
        &self,
        store: &Btrfs,
        file: &str,
        noted: ImageRecord,
        progress: &Progress,
    ) -> Result<ImageDigest, CommandError> {
        let path = self.import_path(file)?;
        progress.phase("looking at the archive");
        // It takes about as much, or more, whatever is in it.
        let about = std::fs::metadata(&path).map_err(|error| invalid(format!("{file}: {error}")))?;
        let needs = about.len().saturating_add(self.0.settings.reserve_bytes);
        if store.free_bytes().is_ok_and(|free| free < needs) {
            return Err(no_space(self.0.settings.reserve_bytes));
        }
        let look = path.clone();
        let origin = tokio::task::spawn_blocking(move || Origin::of_archive(&look)).await;
        let origin = origin
            .map_err(|error| invalid(format!("{file}: {error}")))?
            .map_err(|error| invalid(format!("{file}: {error}")))?;
        if let Some(origin) = origin {
            return self.pull(store, origin, noted, progress).await;
        }
        progress.phase("unpacking");
        let archive =
            tokio::fs::File::open(&path).await.map_err(|error| invalid(format!("{file}: {error}")))?;
        let limits = self.0.settings.limits();
        store.import_image_as(Box::pin(archive), &limits, noted, image::dress).await.map_err(image_error)
    }

    /// A plain file in the directory for that.
    fn import_path(&self, file: &str) -> Result<PathBuf, CommandError> {
        let Some(dir) = &self.0.settings.import_dir else {
            return Err(invalid(
                "this host imports no files: set import_dir under [images] in its configuration",
            ));
        };
        let plain = !file.is_empty() && !file.starts_with('.') && !file.contains(['/', '\0', ':']);
        if !plain {
            return Err(invalid(format!("{file:?} is no name of a file in the host's directory for images")));
        }
        let path = dir.join(file);
        match std::fs::symlink_metadata(&path) {
            Ok(about) if about.is_file() => Ok(path),
            Ok(_) => Err(invalid(format!("{file:?} is no plain file"))),
            Err(error) => {
                let message = format!("{file:?} is not in {}: {error}", dir.display());
                Err(CommandError { code: ErrorCode::NotFound, message })
            }
        }
    }

    async fn build(
        &self,
        store: &Btrfs,
        recipe: &str,
        mut noted: ImageRecord,
        progress: &Progress,
    ) -> Result<ImageDigest, CommandError> {
        let recipe = parse_recipe(recipe)?;
        let limits = self.0.settings.limits();
        let scratch = store.scratch().await.map_err(image_error)?;
        let tar = recipe.build(&scratch.path(), |step| progress.phase(step)).await.map_err(source_error)?;
        noted.sources.insert(format!("recipe:{}", file_name(&tar)));
        progress.phase("unpacking");
        let archive = tokio::fs::File::open(&tar).await.map_err(|error| invalid(error.to_string()))?;
        let done = store.import_image_as(Box::pin(archive), &limits, noted, image::dress).await;
        drop(scratch);
        done.map_err(image_error)
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Reads a recipe: TOML with `suite`, `packages`, `mirror` and `run`.
fn parse_recipe(text: &str) -> Result<Recipe, CommandError> {
    if text.len() > RECIPE_MAX {
        return Err(invalid(format!("a recipe has at most {RECIPE_MAX} bytes")));
    }
    let recipe: Recipe = toml::from_str(text).map_err(|error| invalid(format!("the recipe: {error}")))?;
    recipe.check().map_err(source_error)?;
    Ok(recipe)
}

/// Whether a program failed because there was no room: each says it in its way.
fn is_full(complaint: &str) -> bool {
    complaint.to_ascii_lowercase().contains("no space left on device")
}

fn source_error(error: image::ImageError) -> CommandError {
    let code = match &error {
        image::ImageError::Failed { complaint, .. } if is_full(complaint) => ErrorCode::NoSpace,
        image::ImageError::Recipe { .. } | image::ImageError::TooLarge { .. } => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    CommandError { code, message: cocalc_core::chain(&error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_a_few_lines_and_says_what_is_wrong_with_it() {
        let recipe = parse_recipe("suite = \"trixie\"\npackages = [\"r-base\", \"gcc\"]\n").unwrap();
        assert_eq!((recipe.suite.as_str(), recipe.packages.len()), ("trixie", 2));
        assert_eq!(parse_recipe("").unwrap(), Recipe::default());
        for (text, what) in [
            ("suit = \"x\"", "suit"),
            ("packages = \"x\"", "packages"),
            ("packages = [\"a;b\"]", "a;b"),
            (&format!("# {}", "x".repeat(RECIPE_MAX)), "at most"),
        ] {
            let error = parse_recipe(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::Invalid);
            assert!(error.message.contains(what), "{}", error.message);
        }
    }

    #[test]
    fn only_plain_files_of_the_directory_are_imported() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::fixed([]);
        assert!(images.import_path("a.tar").unwrap_err().message.contains("import_dir"));
        let settings =
            super::super::ImageSettings { import_dir: Some(dir.path().to_owned()), ..Default::default() };
        let images = Images::with(None, settings, Default::default());
        std::fs::write(dir.path().join("a.tar"), "").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert_eq!(images.import_path("a.tar").unwrap(), dir.path().join("a.tar"));
        for wrong in ["", "../a.tar", "/etc/passwd", "link", ".hidden", "a:b", "missing", "."] {
            assert!(images.import_path(wrong).is_err(), "{wrong}");
        }
    }
}
