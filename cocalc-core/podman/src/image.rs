//! The standard project image: a root file system built from Debian packages.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::podman::find_program;

/// The Debian release of the image.
const SUITE: &str = "bookworm";
/// What the image contains, beside what Debian calls required.
const PACKAGES: [&str; 12] = [
    "apt",
    "bash",
    "ca-certificates",
    "coreutils",
    "curl",
    "git",
    "openssh-sftp-server",
    "procps",
    "python3",
    "rsync",
    "sudo",
    "tzdata",
];
/// Done in the new root, in this order: the ordinary user, root rights for it,
/// names, and nothing that depends on when or where it was built.
const CUSTOMIZE: [&str; 7] = [
    "chroot \"$1\" useradd --create-home --uid 1000 --shell /bin/bash user",
    "printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\\n' > \"$1/etc/sudoers.d/user\" && chmod 440 \"$1/etc/sudoers.d/user\"",
    "printf 'LANG=C.UTF-8\\n' > \"$1/etc/default/locale\"",
    "printf '127.0.0.1 localhost\\n::1 localhost\\n' > \"$1/etc/hosts\"",
    "rm -f \"$1/etc/hostname\" \"$1/etc/resolv.conf\"",
    "printf '#!/bin/sh\\nexit 101\\n' > \"$1/usr/sbin/policy-rc.d\" && chmod 755 \"$1/usr/sbin/policy-rc.d\"",
    "rm -rf \"$1\"/var/cache/apt/archives/*.deb \"$1\"/var/log/*.log \"$1\"/var/log/apt",
];
/// How long a build may take on a slow line.
const LIMIT: Duration = Duration::from_secs(1800);

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The tool is missing.
    #[error("mmdebstrap is not installed (apt-get install -y mmdebstrap)")]
    NoTool,
    /// The cache can't be used.
    #[error("could not use the image cache {dir}")]
    Cache {
        /// The cache directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The build failed.
    #[error("mmdebstrap failed: {complaint}")]
    Build {
        /// Its last lines.
        complaint: String,
    },
    /// The build took too long.
    #[error("building the image took longer than {0:?}")]
    TimedOut(Duration),
}

/// The name of the tar that the present recipe makes. Another recipe, another
/// name.
pub fn tar_name() -> String {
    let recipe = format!("1\n{SUITE}\n{PACKAGES:?}\n{CUSTOMIZE:?}\n{}", std::env::consts::ARCH);
    let hash: String =
        Sha256::digest(recipe.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("project-{SUITE}-{hash}.tar")
}

/// Builds the standard image as a tar in `cache_dir`, or finds it there.
/// `progress` gets a line for each step. Needs root and a Debian mirror when
/// it builds; takes about a minute.
///
/// # Errors
///
/// A missing tool, an unusable cache, or what `mmdebstrap` complained of.
///
/// # Cancel safety
///
/// Dropping it ends the build and leaves no tar.
pub async fn build_tar(cache_dir: &Path, mut progress: impl FnMut(&str)) -> Result<PathBuf, ImageError> {
    let cache = |source| ImageError::Cache { dir: cache_dir.to_owned(), source };
    let tar = cache_dir.join(tar_name());
    if tar.is_file() {
        return Ok(tar);
    }
    let program = find_program("mmdebstrap").ok_or(ImageError::NoTool)?;
    std::fs::create_dir_all(cache_dir).map_err(cache)?;
    // Two builders at once each make their own, and the later one wins.
    let draft = Draft(cache_dir.join(format!(".{}.{}.tmp", tar_name(), std::process::id())));
    let mut command = tokio::process::Command::new(program);
    command.args(["--variant=minbase", "--format=tar"]).arg(format!("--include={}", PACKAGES.join(",")));
    for step in CUSTOMIZE {
        command.arg(format!("--customize-hook={step}"));
    }
    command.args(["--aptopt=Acquire::Retries \"3\"", "--dpkgopt=path-exclude=/usr/share/man/*"]);
    command.arg(SUITE).arg(&draft.0);
    // The archive's times, not the build's, where mmdebstrap has a choice.
    command.env("SOURCE_DATE_EPOCH", "1700000000");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| ImageError::Build { complaint: error.to_string() })?;
    drop(command);
    let mut last = Vec::new();
    let watch = async {
        if let Some(stderr) = child.stderr.take() {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if line.starts_with("I: ") {
                    progress(line.trim_start_matches("I: "));
                }
                last.push(line);
                let surplus = last.len().saturating_sub(20);
                last.drain(..surplus);
            }
        }
        child.wait().await
    };
    let status = tokio::time::timeout(LIMIT, watch).await.map_err(|_| ImageError::TimedOut(LIMIT))?;
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => return Err(ImageError::Build { complaint: last.join("\n") }),
        Err(error) => return Err(ImageError::Build { complaint: error.to_string() }),
    }
    std::fs::File::open(&draft.0).and_then(|file| file.sync_all()).map_err(cache)?;
    std::fs::rename(&draft.0, &tar).map_err(cache)?;
    Ok(tar)
}

/// Removes an unfinished tar.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
