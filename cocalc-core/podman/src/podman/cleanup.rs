//! Removing everything of one instance, whatever state it was left in.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use cocalc_core::ids::HostId;

use super::{
    BuildError,
    builder::tag,
    cli::{CONTAINERS_CONF, Cli, LIMIT, find_program},
    keepers::{self, Keeper},
    lifecycle::{LABEL_INSTANCE, mounts_below, unmount_below},
};
use crate::{command::run_blocking, net, probe};

/// Stops and removes every container, mount, network namespace, cable and
/// firewall rule of `instance`, also after its daemon was killed. The projects'
/// files and logs stay. `runtime_dir` is what the runner was built with;
/// `None` is its default. Harmless if nothing is left.
///
/// # Errors
///
/// The first thing that could not be removed; the rest is removed.
pub async fn cleanup_instance(instance: HostId, runtime_dir: Option<&Path>) -> Result<(), BuildError> {
    if !rustix::process::geteuid().is_root() {
        // Only root's runners make any of this.
        return Ok(());
    }
    let runtime_dir = runtime_dir.map_or_else(|| default_runtime_dir(instance), Path::to_path_buf);
    let runtime_dir = std::path::absolute(runtime_dir)
        .map_err(|error| BuildError::new("find its runtime directory", error))?;
    let containers = remove_containers(instance, &runtime_dir).await;
    let rest = tokio::task::spawn_blocking(move || remove_rest(instance, &runtime_dir))
        .await
        .unwrap_or_else(|error| Err(BuildError::new("clean up", error)));
    containers.and(rest)
}

/// Names, for people, what of `instance` is still there of all that
/// [`cleanup_instance`] removes from a machine. Knows the default runtime
/// directory only. Blocks.
pub fn leftovers(instance: HostId) -> Vec<String> {
    if !rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    let mut left = Vec::new();
    // Without podman there are no containers.
    if let Some(program) = find_program("podman") {
        let mut podman = Command::new(program);
        let filter = format!("label={}", label(instance));
        podman.args(["ps", "--all", "--filter", &filter, "--format", "{{.Names}}"]);
        match run_blocking(podman, "") {
            Ok(names) => left.extend(names.lines().map(|name| format!("container {name}"))),
            Err(error) => left.push(format!("perhaps containers: {error}")),
        }
    }
    left.extend(keepers_of(instance).into_iter().map(|keeper| format!("container {}", keeper.name)));
    left.sort();
    left.dedup();
    let runtime_dir = default_runtime_dir(instance);
    // Mount points are listed as the kernel resolved them.
    if let Ok(resolved) = runtime_dir.canonicalize() {
        let mounts = mounts_below(&resolved).unwrap_or_default();
        left.extend(mounts.iter().map(|path| format!("mount {}", path.display())));
        left.push(format!("directory {}", runtime_dir.display()));
    }
    let tag = tag(instance);
    left.extend(net::cables(&tag).into_iter().map(|name| format!("network interface {name}")));
    left.extend(net::table(&tag).map(|name| format!("firewall {name}")));
    left
}

fn default_runtime_dir(instance: HostId) -> PathBuf {
    Path::new("/run/cocalc").join(instance.to_string())
}

/// The label of an instance's containers.
pub(super) fn label(instance: HostId) -> String {
    format!("{LABEL_INSTANCE}={instance}")
}

/// What keeps containers of an instance that podman does not know. Blocks.
fn keepers_of(instance: HostId) -> Vec<Keeper> {
    let prefix = format!("cocalc-{instance}-");
    keepers::find(|name| name.starts_with(&prefix))
}

async fn remove_containers(instance: HostId, runtime_dir: &Path) -> Result<(), BuildError> {
    // Without podman there are no containers.
    let (Some(program), Some(runtime)) = (find_program("podman"), probe::working_runtime()) else {
        return Ok(());
    };
    let containers_conf = runtime_dir.join("containers.conf");
    let made = !containers_conf.exists();
    let failed = |error| BuildError::new("remove its containers", error);
    if made {
        std::fs::create_dir_all(runtime_dir)
            .and_then(|()| std::fs::write(&containers_conf, CONTAINERS_CONF))
            .map_err(|error| BuildError::new("write podman's configuration", error))?;
    }
    let cli = Cli::new(program, runtime.clone(), containers_conf);
    let all = cli.listed(&label(instance), LIMIT).await.map_err(failed)?;
    let mut done = Ok(());
    for (name, _) in all {
        match cli.run(["rm", "--force", "--ignore", "--time", "0", &name]).await {
            Err(error) if !error.is_missing() => done = done.and(Err(failed(error))),
            _ => {}
        }
    }
    let left = tokio::task::spawn_blocking(move || keepers_of(instance)).await;
    for keeper in left.unwrap_or_default() {
        keeper.end(&runtime).await;
    }
    done
}

fn remove_rest(instance: HostId, runtime_dir: &Path) -> Result<(), BuildError> {
    let network =
        net::remove_all(&tag(instance)).map_err(|error| BuildError::new("remove its network", error));
    // Mount points are listed as the kernel resolved them.
    let Ok(resolved) = runtime_dir.canonicalize() else { return network };
    let mounts = unmount_below(&resolved).map_err(|error| BuildError::new("unmount its file systems", error));
    if mounts.is_ok() {
        // Never with something mounted below: that would be users' files.
        let removed = remove_tree(&resolved);
        return network.and(removed);
    }
    network.and(mounts)
}

/// Removes a directory tree without ever crossing into another file system.
fn remove_tree(directory: &Path) -> Result<(), BuildError> {
    use std::os::unix::fs::MetadataExt;
    let failed = |error| BuildError::new("remove its runtime directory", error);
    let device = std::fs::symlink_metadata(directory).map_err(failed)?.dev();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let about = std::fs::symlink_metadata(&path).map_err(failed)?;
        if about.dev() != device {
            return Err(failed(std::io::Error::other(format!("{} is still mounted", path.display()))));
        }
        if about.is_dir() {
            remove_tree(&path)?;
        } else {
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    std::fs::remove_dir(directory).map_err(failed)
}
