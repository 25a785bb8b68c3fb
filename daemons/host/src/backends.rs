//! What keeps and runs the projects, opened as configured.

use std::{fmt, path::PathBuf, sync::Arc};

use cocalc_core::{
    apps::Services,
    ids::{HostId, ImageDigest},
    runner::Runner,
    storage::Storage,
};
use cocalc_daemon::start::Error;
use cocalc_podman::{Fences, Podman, ProcessRunner, Unenforceable};
use cocalc_storage::{Btrfs, Directory};

use crate::{
    config::{Config, RunnerKind, StorageKind, UnenforceableLimits},
    images::Images,
    startup::Startup,
};

/// The parts of a host that an integrator may bring.
#[derive(Clone)]
pub struct Backends {
    /// Keeps the projects' files.
    pub storage: Arc<dyn Storage>,
    /// Runs the projects.
    pub runner: Arc<dyn Runner>,
    /// The images that are here.
    pub images: Images,
    /// Free bytes where the projects' files are.
    pub free_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Runs the projects' apps, if the runner can.
    pub services: Option<Arc<dyn Services>>,
    /// The wrapper around the runner that runs start-up programs, if it is ours.
    pub startup: Option<Arc<Startup>>,
    /// The volume whose trash the metrics tell of, if it is ours.
    pub volume: Option<Btrfs>,
}

impl fmt::Debug for Backends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backends")
            .field("storage", &self.storage)
            .field("runner", &self.runner)
            .field("images", &self.images)
            .finish_non_exhaustive()
    }
}

impl Backends {
    /// Opens the backends that `config` names, for the host `id`.
    ///
    /// # Errors
    ///
    /// What could not be opened. A volume with unknown data is refused.
    pub async fn open(config: &Config, id: HostId) -> Result<Self, Error> {
        let (storage, images, free_bytes, volume) = match config.storage {
            StorageKind::Btrfs => open_btrfs(config).await?,
            StorageKind::Directory => open_directory(config).await?,
        };
        let unenforceable = match config.unenforceable_limits {
            UnenforceableLimits::Refuse => Unenforceable::Refuse,
            UnenforceableLimits::Accept => Unenforceable::Accept,
        };
        let (runner, services): (Arc<dyn Runner>, Arc<dyn Services>) = match config.runner {
            RunnerKind::Podman => {
                let here = images.clone();
                let find = move |digest: ImageDigest| here.path(digest);
                let mut runner = Podman::builder(id, config.data_dir.join("runner"), Arc::new(find))
                    .machine_index(config.machine_slot)
                    .unenforceable(unenforceable)
                    .fences(Fences {
                        allow: config.project_network.allow.iter().map(|network| network.0).collect(),
                        deny: config.project_network.deny.iter().map(|network| network.0).collect(),
                    });
                if let Some(questions) = config.project_network.questions_per_sec {
                    runner = runner.questions_per_sec(questions.get());
                }
                let runner =
                    runner.build().await.map_err(|error| Error::open("podman runner")(error.into()))?;
                let runner = Arc::new(runner);
                (runner.clone(), runner)
            }
            RunnerKind::Process => {
                let state = config.data_dir.join("runner");
                let opened = if config.confine_processes {
                    ProcessRunner::open_confined(state, unenforceable).await
                } else {
                    ProcessRunner::open(state, unenforceable).await
                };
                let runner = opened.map_err(|error| Error::open("process runner")(error.into()))?;
                let runner = Arc::new(runner);
                (runner.clone(), runner)
            }
        };
        let startup = Arc::new(Startup::new(runner));
        let runner: Arc<dyn Runner> = startup.clone();
        let (services, startup) = (Some(services), Some(startup));
        Ok(Self { storage, runner, images, free_bytes, services, startup, volume })
    }

    /// The directory of an image.
    pub fn image(&self, digest: ImageDigest) -> Option<PathBuf> {
        self.images.path(digest)
    }
}

type Opened = (Arc<dyn Storage>, Images, Arc<dyn Fn() -> u64 + Send + Sync>, Option<Btrfs>);

async fn open_btrfs(config: &Config) -> Result<Opened, Error> {
    let failed = || Error::open("volume");
    let store = Btrfs::open(&config.volume).await.map_err(|error| failed()(error.into()))?;
    let default = match &config.default_image_tar {
        Some(tar) => {
            let imported = store.import_image_file(tar, &config.images.limits()).await;
            Some(imported.map_err(|error| Error::open("default image")(error.into()))?)
        }
        None => None,
    };
    let images = Images::open(store.clone(), config.images.clone(), default)
        .await
        .map_err(|error| Error::open("images")(error.into()))?;
    let (space, volume) = (store.clone(), store.clone());
    Ok((Arc::new(store), images, Arc::new(move || space.free_bytes().unwrap_or(0)), Some(volume)))
}

async fn open_directory(config: &Config) -> Result<Opened, Error> {
    let store =
        Directory::open(&config.volume).await.map_err(|error| Error::open("directory")(error.into()))?;
    let space = store.clone();
    Ok((Arc::new(store), Images::fixed([]), Arc::new(move || space.free_bytes().unwrap_or(0)), None))
}
