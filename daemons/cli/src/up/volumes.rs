//! The hosts' volumes and the project image; and their removal.

use std::path::{Path, PathBuf};

use cocalc_core::{BoxError, ids::HostId, runner::Runner};
use cocalc_podman::{ProcessRunner, Unenforceable};
use cocalc_storage::{Btrfs, loopback, loopback::Loopback};

use super::{
    configure::private_dir,
    narrator::{Told, told},
    plan::{Plan, image_cache},
};
use crate::failure::{Failure, While};

/// The size of a host's loopback volume. Sparse: it takes what is written.
const VOLUME_BYTES: u64 = 8 << 30;

/// Builds the project image, or finds it in the cache. `None` where projects
/// are plain processes.
pub(super) fn image(plan: &Plan) -> Result<Told<Option<PathBuf>>, Failure> {
    if !plan.podman {
        return told(None, "none needed: projects are plain processes");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut built = false;
    let tar = runtime
        .block_on(cocalc_podman::image::build_tar(&image_cache(), |line| {
            built = true;
            println!("           {line}");
        }))
        .during("cannot build the project image")?;
    let said = format!("{} {}", if built { "built" } else { "from the cache:" }, tar.display());
    told(Some(tar), said)
}

/// Makes each host's volume: a loopback Btrfs, mounted and prepared, or a
/// directory.
pub(super) fn make(plan: &Plan) -> Result<Told<()>, Failure> {
    for host in &plan.hosts {
        private_dir(&host.dir)?;
        if !plan.btrfs {
            private_dir(&host.volume())?;
            continue;
        }
        private_dir(&host.volume())?;
        Loopback::open_or_create(&host.image_file(), VOLUME_BYTES, &host.volume())
            .during(format!("cannot make the volume of {}", host.name))?
            // It must outlive this process's crashes, and is released by `down`.
            .keep();
        Btrfs::initialize(&host.volume()).during(format!("cannot prepare the volume of {}", host.name))?;
    }
    let kind = if plan.btrfs { "Btrfs on loop devices, 8 GiB each, sparse" } else { "plain directories" };
    told((), kind)
}

/// Stops everything that runs for the host in `dir`, and removes its
/// containers, mounts and networks. Its files stay.
pub(super) fn stop_projects(dir: &Path) -> Result<(), Failure> {
    let Some(host) = host_id(dir) else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let records = dir.join("data").join("runner");
    if records.join("projects").exists() {
        let ended = runtime.block_on(async {
            let runner = ProcessRunner::open(&records, Unenforceable::Accept).await?;
            for status in runner.list().await? {
                runner.remove(status.project).await?;
            }
            Ok::<_, BoxError>(())
        });
        ended.map_err(|e| Failure::failed(format!("cannot end the processes of {}: {e}", dir.display())))?;
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    runtime
        .block_on(cocalc_podman::cleanup_instance(host, None))
        .during(format!("cannot remove the containers of {}", dir.display()))
}

/// Unmounts the host's volume and frees its loop device.
pub(super) fn unmount(dir: &Path) -> Result<(), Failure> {
    let image = dir.join("volume.btrfs");
    if !image.exists() {
        return Ok(());
    }
    loopback::release(&image).during(format!("cannot release {}", image.display()))
}

/// Removes the little that a host notes outside its directory.
pub(super) fn forget(dir: &Path) {
    if let Some(host) = host_id(dir) {
        // Ordinary users have none.
        let _ = std::fs::remove_file(format!("/run/cocalc/{host}.position"));
    }
}

/// What of the host's projects is still there: containers, network
/// namespaces, mounts.
pub(super) fn project_leftovers(dir: &Path) -> Vec<String> {
    let Some(host) = host_id(dir) else { return Vec::new() };
    if !rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    cocalc_podman::leftovers(host)
}

/// The id that the host in `dir` has, once it has joined.
fn host_id(dir: &Path) -> Option<HostId> {
    #[derive(serde::Deserialize)]
    struct Membership {
        id: HostId,
    }
    let bytes = std::fs::read(dir.join("data").join("membership.json")).ok()?;
    serde_json::from_slice::<Membership>(&bytes).ok().map(|membership| membership.id)
}
