//! Root file systems built from Debian packages.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{
    ImageError,
    lines::{Last, Lines},
};
use crate::podman::find_program;

const TOOL: &str = "mmdebstrap";
/// The Debian release of the standard image.
const SUITE: &str = "bookworm";
/// What the standard image contains, beside what Debian calls required.
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
/// How long it is tried to remove what a build leaves that was broken off.
const REMOVAL_PAUSE: Duration = Duration::from_millis(200);
const REMOVAL_TRIES: u32 = 50;
/// How much a recipe may say.
const ITEMS_MAX: usize = 1000;

/// A root file system to be built from Debian packages. Without more it is the
/// standard image.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The release of Debian.
    #[serde(default = "suite")]
    pub suite: String,
    /// Packages beside those that every project image has.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Where they come from, for instance `http://deb.debian.org/debian`.
    /// Default: what mmdebstrap knows.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Lines for a shell, run by root in the new root file system, outside any
    /// container: a recipe is trusted as the host's operator is.
    #[serde(default)]
    pub run: Vec<String>,
}

fn suite() -> String {
    SUITE.to_owned()
}

impl Default for Recipe {
    fn default() -> Self {
        Self { suite: suite(), packages: Vec::new(), mirror: None, run: Vec::new() }
    }
}

impl Recipe {
    /// Whether every word of it is what it should be.
    ///
    /// # Errors
    ///
    /// The first that is not.
    pub fn check(&self) -> Result<(), ImageError> {
        let refused = |reason: String| Err(ImageError::Recipe { reason });
        let word = |text: &str, more: &[u8]| {
            text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && text.len() <= 200
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || more.contains(&b))
        };
        if !word(&self.suite, b"-") {
            return refused(format!("suite: {:?} is no release of Debian", self.suite));
        }
        if self.packages.len() > ITEMS_MAX || self.run.len() > ITEMS_MAX {
            return refused(format!("packages and run have at most {ITEMS_MAX} items"));
        }
        if let Some(wrong) = self.packages.iter().find(|name| !word(name, b"+.-:=~")) {
            return refused(format!("packages: {wrong:?} is no name of a package"));
        }
        if let Some(mirror) = &self.mirror {
            let is_url = ["http://", "https://", "file:/"].iter().any(|start| mirror.starts_with(start));
            if !is_url || !mirror.bytes().all(|byte| byte.is_ascii_graphic()) {
                return refused(format!("mirror: {mirror:?} is no address"));
            }
        }
        match self.run.iter().find(|line| line.contains('\0') || line.is_empty()) {
            Some(_) => refused("run: a line is empty, or has a NUL in it".to_owned()),
            None => Ok(()),
        }
    }

    fn all_packages(&self) -> Vec<&str> {
        let mut all = PACKAGES.to_vec();
        for package in &self.packages {
            if !all.contains(&package.as_str()) {
                all.push(package);
            }
        }
        all
    }

    fn hooks(&self) -> Vec<String> {
        // What the operator adds comes before what takes traces away.
        let (made, tidied) = CUSTOMIZE.split_at(4);
        let quoted = |line: &String| format!("chroot \"$1\" /bin/sh -ec '{}'", line.replace('\'', "'\\''"));
        let mut hooks: Vec<String> = made.iter().map(|line| (*line).to_owned()).collect();
        hooks.extend(self.run.iter().map(quoted));
        hooks.extend(tidied.iter().map(|line| (*line).to_owned()));
        hooks
    }

    /// The name of the tar that it makes. Another recipe, another name.
    pub fn tar_name(&self) -> String {
        let mirror = self.mirror.as_deref().unwrap_or_default();
        let text = format!(
            "1\n{}\n{:?}\n{:?}\n{}{mirror}",
            self.suite,
            self.all_packages(),
            self.hooks(),
            std::env::consts::ARCH
        );
        let hash: String =
            Sha256::digest(text.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("project-{}-{hash}.tar", self.suite)
    }

    /// Builds it as a tar in `cache_dir`, or finds it there. `progress` gets a
    /// line for each step. Needs root and a Debian mirror when it builds; takes
    /// about a minute, and while it builds, in that directory too, twice the space.
    ///
    /// # Errors
    ///
    /// A recipe that makes no sense, a missing tool, an unusable cache, or what
    /// `mmdebstrap` complained of.
    ///
    /// # Cancel safety
    ///
    /// Dropping it ends the build, and leaves no tar and nothing mounted; what was
    /// unpacked may be there a few seconds longer.
    pub async fn build(
        &self,
        cache_dir: &Path,
        mut progress: impl FnMut(&str),
    ) -> Result<PathBuf, ImageError> {
        self.check()?;
        let cache = |source| ImageError::Cache { dir: cache_dir.to_owned(), source };
        let failed = |complaint: String| ImageError::Failed { tool: TOOL, complaint };
        let name = self.tar_name();
        let tar = cache_dir.join(&name);
        if tar.is_file() {
            return Ok(tar);
        }
        let program = find_program(TOOL).ok_or(ImageError::NoTool { tool: TOOL })?;
        std::fs::create_dir_all(cache_dir).map_err(cache)?;
        // Two builders at once each make their own, and the later one wins.
        let draft = Draft(cache_dir.join(format!(".{name}.{}.tmp", std::process::id())));
        std::fs::create_dir_all(draft.tree()).map_err(cache)?;
        // It mounts things, and starts processes: in namespaces of their own, so that
        // all of that goes with it, however it ends.
        let mut command = tokio::process::Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg("--")
            .arg(program)
            .env("TMPDIR", draft.tree())
            .args(["--variant=minbase", "--format=tar"])
            .arg(format!("--include={}", self.all_packages().join(",")));
        for step in self.hooks() {
            command.arg(format!("--customize-hook={step}"));
        }
        command.args(["--aptopt=Acquire::Retries \"3\"", "--dpkgopt=path-exclude=/usr/share/man/*"]);
        command.arg(&self.suite).arg(&draft.0);
        command.args(&self.mirror);
        // The archive's times, not the build's, where mmdebstrap has a choice.
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        drop(command);
        let mut last = Last::new(20);
        let watch = async {
            if let Some(stderr) = child.stderr.take() {
                let mut lines = Lines::new(stderr);
                while let Some(line) = lines.next().await {
                    if line.starts_with("I: ") {
                        progress(line.trim_start_matches("I: "));
                    }
                    last.push(line);
                }
            }
            child.wait().await
        };
        let timed_out = |_| ImageError::TimedOut { tool: TOOL, limit: LIMIT };
        let status = tokio::time::timeout(LIMIT, watch).await.map_err(timed_out)?;
        match status {
            Ok(status) if status.success() => {}
            Ok(_) => return Err(failed(last.text())),
            Err(error) => return Err(failed(error.to_string())),
        }
        std::fs::File::open(&draft.0).and_then(|file| file.sync_all()).map_err(cache)?;
        std::fs::rename(&draft.0, &tar).map_err(cache)?;
        Ok(tar)
    }
}

/// The name of the tar that the standard image is.
pub fn tar_name() -> String {
    Recipe::default().tar_name()
}

/// Builds the standard image: [`Recipe::build`] of the default.
///
/// # Errors
///
/// As there.
///
/// # Cancel safety
///
/// As there.
pub async fn build_tar(cache_dir: &Path, progress: impl FnMut(&str)) -> Result<PathBuf, ImageError> {
    Recipe::default().build(cache_dir, progress).await
}

/// Removes an unfinished tar, and what it is made from.
struct Draft(PathBuf);

impl Draft {
    /// Where what goes into the tar is put together.
    fn tree(&self) -> PathBuf {
        self.0.with_extension("tree")
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let (tar, tree) = (self.0.clone(), self.tree());
        let gone = |done: io::Result<()>| match done {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let remove = move || gone(std::fs::remove_file(&tar)).and(gone(std::fs::remove_dir_all(&tree)));
        if remove().is_ok() {
            return;
        }
        // Who was killed a moment ago may still be making files.
        let path = self.0.clone();
        std::thread::spawn(move || {
            for _ in 0..REMOVAL_TRIES {
                std::thread::sleep(REMOVAL_PAUSE);
                if remove().is_ok() {
                    return;
                }
            }
            tracing::warn!(path = %path.display(), "an unfinished image is left");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_adds_to_the_standard_image() {
        let standard = Recipe::default();
        assert_eq!(standard.all_packages(), PACKAGES);
        assert_eq!(standard.hooks(), CUSTOMIZE);
        let more = Recipe {
            packages: vec!["git".into(), "r-base".into()],
            run: vec!["echo 'it''s' > /etc/motd".into()],
            ..Recipe::default()
        };
        more.check().unwrap();
        assert_eq!(more.all_packages().last(), Some(&"r-base"));
        assert_eq!(more.all_packages().len(), PACKAGES.len() + 1);
        assert_eq!(more.hooks()[4], "chroot \"$1\" /bin/sh -ec 'echo '\\''it'\\'''\\''s'\\'' > /etc/motd'");
        assert_ne!(more.tar_name(), standard.tar_name());
        assert!(more.tar_name().starts_with("project-bookworm-"));
    }

    #[test]
    fn what_is_no_package_is_refused_with_its_name() {
        let with = |change: fn(&mut Recipe)| {
            let mut recipe = Recipe::default();
            change(&mut recipe);
            recipe.check().unwrap_err().to_string()
        };
        assert!(with(|r| r.packages.push("a,b".into())).contains("a,b"));
        assert!(with(|r| r.packages.push("--hook".into())).contains("--hook"));
        assert!(with(|r| r.suite = "--x".into()).contains("suite"));
        assert!(with(|r| r.mirror = Some("ftp://x".into())).contains("mirror"));
        assert!(with(|r| r.mirror = Some("http://x y".into())).contains("mirror"));
        assert!(with(|r| r.run.push("a\0".into())).contains("run"));
    }

    #[tokio::test]
    async fn a_build_that_is_broken_off_leaves_nothing() {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        let dir = tempfile::tempdir().unwrap();
        // A mirror that takes its time.
        let mirror = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/debian", mirror.local_addr().unwrap());
        let recipe = Recipe { mirror: Some(address), ..Recipe::default() };
        let in_it = |at: &Path| -> Vec<PathBuf> {
            std::fs::read_dir(at).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(120);
        let begun = async {
            loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                assert!(std::time::Instant::now() < deadline, "mmdebstrap does not begin");
                let within = in_it(dir.path()).iter().flat_map(|tree| in_it(tree)).collect::<Vec<_>>();
                if within.iter().any(|root| root.join("etc/apt").exists()) {
                    break;
                }
            }
        };
        tokio::select! {
            built = recipe.build(dir.path(), |_| {}) => panic!("{built:?}"),
            () = begun => {}
        }
        let works = || {
            let lines = std::fs::read_dir("/proc").unwrap().flatten();
            let mut lines = lines.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
            lines.any(|line| String::from_utf8_lossy(&line).contains(&*dir.path().to_string_lossy()))
        };
        while !in_it(dir.path()).is_empty() || works() {
            assert!(std::time::Instant::now() < deadline, "{:?} is left", in_it(dir.path()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*dir.path().to_string_lossy()));
    }
}
