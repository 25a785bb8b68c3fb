//! Images that other tools make, through podman in a storage of its own.
//!
//! podman runs in a mount namespace of its own too, so that nothing it mounts
//! is seen, or stays when it is killed.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cocalc_core::{images::Reference, stream::BoxRead};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
};

use super::{
    ImageError, Step,
    lines::{Last, Lines},
};
use crate::podman::find_program;

const TOOL: &str = "podman";
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(3600);
/// How often it is looked how much has come.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Where an image comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Origin {
    /// A registry.
    Reference(Reference),
    /// A file that `podman save --format oci-archive` or `skopeo` wrote.
    OciArchive(PathBuf),
    /// A file that `podman save` or `docker save` wrote.
    DockerArchive(PathBuf),
}

impl Origin {
    /// What the archive at `path` is; `None` if it is neither, so perhaps a root
    /// file system itself. Reads the names in it. Blocks.
    ///
    /// # Errors
    ///
    /// Those of reading it.
    pub fn of_archive(path: &Path) -> std::io::Result<Option<Self>> {
        // Both kinds have few names in them: of more than that it is neither.
        let mut names = std::process::Command::new("tar");
        names.arg("--list").arg("--file").arg(path);
        let mut child = names.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let Some(stdout) = child.stdout.take() else { return Ok(None) };
        let (mut oci, mut index, mut manifest) = (false, false, false);
        let lines = std::io::BufRead::lines(std::io::BufReader::new(std::io::Read::take(stdout, 1 << 20)));
        for line in lines.map_while(Result::ok) {
            match line.trim_start_matches("./") {
                "oci-layout" => oci = true,
                "index.json" => index = true,
                "manifest.json" => manifest = true,
                _ => {}
            }
        }
        let _ = child.kill();
        child.wait()?;
        let path = path.to_owned();
        Ok(match (oci && index, manifest) {
            (true, _) => Some(Self::OciArchive(path)),
            (false, true) => Some(Self::DockerArchive(path)),
            (false, false) => None,
        })
    }

    fn transport(&self) -> String {
        match self {
            Self::Reference(reference) => format!("docker://{}", reference.as_str()),
            Self::OciArchive(path) => format!("oci-archive:{}", path.display()),
            Self::DockerArchive(path) => format!("docker-archive:{}", path.display()),
        }
    }
}

/// An image to be brought here.
#[derive(Clone, Debug)]
pub struct Pull {
    /// From where.
    pub origin: Origin,
    /// An empty directory for what comes; with space for the image twice.
    pub work: PathBuf,
    /// Credentials per registry, as `podman login --authfile` writes them.
    pub auth_file: Option<PathBuf>,
    /// Registries that are spoken to without TLS, as `host:port`.
    pub insecure: Vec<String>,
    /// What it may take in `work`.
    pub bytes_max: u64,
}

/// An image that has come, in its own directory.
#[derive(Debug)]
pub struct Pulled {
    work: PathBuf,
    run: Run,
    program: PathBuf,
    id: String,
    /// What exactly it is: `registry/path@sha256:…`, or `oci:sha256:…` of an
    /// archive.
    pub source: String,
}

/// What podman keeps until a reboot: in a place of its own, because the path must
/// be short. Removed when this is dropped.
#[derive(Debug)]
struct Run(PathBuf);

impl Run {
    fn of(work: &Path) -> Self {
        use std::os::unix::ffi::OsStrExt;
        let hash = Sha256::digest(work.as_os_str().as_bytes());
        let hash: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self(Path::new("/run").join(format!("cocalc-image-{hash}")))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // There may be nothing.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// podman, with its storage in `work` and mounts that nobody else sees.
fn podman(program: &Path, work: &Path, run: &Run) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).arg(program).args(globals(work, run));
    command
        .stdin(Stdio::null())
        .current_dir(work)
        .env("TMPDIR", work.join("tmp"))
        // A proxy is the machine's business; credentials are ours.
        .env_remove("REGISTRY_AUTH_FILE")
        .kill_on_drop(true);
    command
}

fn globals(work: &Path, run: &Run) -> Vec<std::ffi::OsString> {
    let mut all: Vec<std::ffi::OsString> = Vec::new();
    for (name, path) in [("--root", work.join("store")), ("--runroot", run.0.clone())] {
        all.push(name.into());
        all.push(path.into());
    }
    all.extend(
        ["--storage-driver", "overlay", "--events-backend", "none", "--log-level", "error"].map(Into::into),
    );
    all
}

impl Pull {
    /// Brings it into `work`.
    ///
    /// # Errors
    ///
    /// What podman complained of; [`ImageError::TooLarge`].
    ///
    /// # Cancel safety
    ///
    /// podman ends; what has come stays in `work`, whose owner removes it.
    pub async fn run(self, mut progress: impl FnMut(Step)) -> Result<Pulled, ImageError> {
        let failed = |complaint: String| ImageError::Failed { tool: TOOL, complaint };
        let program = find_program(TOOL).ok_or(ImageError::NoTool { tool: TOOL })?;
        let use_dir = |source| ImageError::Cache { dir: self.work.clone(), source };
        std::fs::create_dir_all(self.work.join("tmp")).map_err(use_dir)?;
        // Nobody's credentials, where none are given, rather than those of
        // whoever once logged in on this machine.
        let nobody = self.work.join("auth.json");
        std::fs::write(&nobody, "{}").map_err(use_dir)?;
        let run = Run::of(&self.work);
        let mut command = podman(&program, &self.work, &run);
        command.arg("pull").arg("--authfile").arg(self.auth_file.as_ref().unwrap_or(&nobody));
        if let Origin::Reference(reference) = &self.origin
            && self.insecure.iter().any(|registry| registry == reference.registry())
        {
            command.arg("--tls-verify=false");
        }
        command.arg(self.origin.transport()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let pulled = tokio::time::timeout(LIMIT, self.watch(&mut child, &mut progress)).await;
        let ids = match pulled {
            Ok(done) => done?,
            Err(_) => return Err(ImageError::TimedOut { tool: TOOL, limit: LIMIT }),
        };
        let id = match ids.as_slice() {
            [id] if is_id(id) => id.clone(),
            [] => return Err(failed("it says no image".to_owned())),
            _ => return Err(failed("the archive has several images; save one of them alone".to_owned())),
        };
        let source = match &self.origin {
            Origin::Reference(reference) => {
                let digest = self.digest(&program, &id, &run).await?;
                format!("{}@{digest}", reference.repository())
            }
            _ => format!("oci:sha256:{id}"),
        };
        Ok(Pulled { work: self.work, run, program, id, source })
    }

    async fn digest(&self, program: &Path, id: &str, run: &Run) -> Result<String, ImageError> {
        let mut command = podman(program, &self.work, run);
        command.args(["image", "inspect", "--format", "{{.Digest}}", id]);
        let text = crate::command::run(command, Duration::from_secs(60))
            .await
            .map_err(|error| ImageError::Failed { tool: TOOL, complaint: error.to_string() })?;
        Ok(text.trim().to_owned())
    }

    /// Waits for the end of podman; the ids that it printed.
    async fn watch(
        &self,
        child: &mut Child,
        progress: &mut impl FnMut(Step),
    ) -> Result<Vec<String>, ImageError> {
        let failed = |complaint: String| ImageError::Failed { tool: TOOL, complaint };
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(failed("it has no output".to_owned()));
        };
        let (mut ids, mut said) = (Lines::new(stdout.take(64 << 10)), Lines::new(stderr));
        let (mut found, mut last, mut phase) = (Vec::new(), Last::new(8), "asking for the image".to_owned());
        let (mut ids_end, mut said_end) = (false, false);
        let mut look = tokio::time::interval(LOOK_AGAIN);
        while !(ids_end && said_end) {
            tokio::select! {
                line = ids.next(), if !ids_end => match line {
                    Some(line) => found.push(line.trim().to_owned()),
                    None => ids_end = true,
                },
                line = said.next(), if !said_end => match line {
                    Some(line) => {
                        if let Some(step) = step_of(&line) {
                            phase = step.to_owned();
                            progress(Step { phase: phase.clone(), bytes: None });
                        }
                        last.push(line);
                    }
                    None => said_end = true,
                },
                _ = look.tick() => {
                    let work = self.work.clone();
                    let taken = tokio::task::spawn_blocking(move || taken(&work)).await.unwrap_or(0);
                    if taken > self.bytes_max {
                        return Err(ImageError::TooLarge { bytes_max: self.bytes_max });
                    }
                    progress(Step { phase: phase.clone(), bytes: Some(taken) });
                }
            }
        }
        match child.wait().await {
            Ok(status) if status.success() => Ok(found),
            Ok(_) => Err(failed(last.text())),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What podman says that it does, without what people have no use for.
fn step_of(line: &str) -> Option<&'static str> {
    [
        ("Trying to pull", "asking for the image"),
        ("Getting image source", "asking for the image"),
        ("Copying blob", "bringing layers"),
        ("Copying config", "bringing the configuration"),
        ("Writing manifest", "storing layers"),
        ("Storing signatures", "storing layers"),
    ]
    .iter()
    .find_map(|(start, step)| line.starts_with(start).then_some(*step))
}

/// Bytes that files below a directory take. What vanishes meanwhile does not
/// count, and no more than so many names are looked at.
fn taken(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let (mut todo, mut bytes, mut names) = (vec![directory.to_owned()], 0_u64, 0_u32);
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            names += 1;
            let Ok(about) = entry.metadata() else { continue };
            if about.is_dir() {
                todo.push(entry.path());
            } else {
                bytes = bytes.saturating_add(about.blocks().saturating_mul(512));
            }
            if names > 5_000_000 {
                return u64::MAX;
            }
        }
    }
    bytes
}

impl Pulled {
    /// Its root file system as a tar archive, always the same for the same
    /// image; fails, and does not merely end, if tar does.
    ///
    /// # Errors
    ///
    /// If nothing can be started.
    pub fn tar(&self) -> Result<BoxRead, ImageError> {
        let failed = |complaint: String| ImageError::Failed { tool: TOOL, complaint };
        // The mount goes with the namespace.
        let script = "root=$(\"$@\") && exec tar --create --file=- --format=pax --sort=name --sparse \
            --pax-option=delete=atime,delete=ctime --numeric-owner --xattrs '--xattrs-include=*' --acls \
            --directory \"$root\" .";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--", "/bin/sh", "-c", script, "sh"]);
        command.arg(&self.program).args(globals(&self.work, &self.run)).args(["image", "mount", &self.id]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        command.current_dir(&self.work).env("LC_ALL", "C.UTF-8");
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let stdout = child.stdout.take().ok_or_else(|| failed("it has no output".to_owned()))?;
        Ok(Box::pin(UntilItEnds { stdout, child, ended: false }))
    }
}

/// The output of a child, which ends well only if the child does.
struct UntilItEnds {
    stdout: tokio::process::ChildStdout,
    child: Child,
    ended: bool,
}

impl AsyncRead for UntilItEnds {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        use std::task::{Poll, ready};
        if self.ended || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(std::pin::Pin::new(&mut self.stdout).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            return Poll::Ready(Ok(()));
        }
        let status = {
            let waiting = std::pin::pin!(self.child.wait());
            ready!(waiting.poll(cx))?
        };
        self.ended = true;
        if status.success() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Ready(Err(std::io::Error::other(format!("the image could not be read: {status}"))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_told_apart_by_the_names_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, files: &[&str]| {
            let tree = dir.path().join(format!("{name}.d"));
            std::fs::create_dir_all(tree.join("etc")).unwrap();
            for file in files {
                std::fs::write(tree.join(file), "{}").unwrap();
            }
            let tar = dir.path().join(name);
            let mut command = std::process::Command::new("tar");
            command.arg("-cf").arg(&tar).arg("-C").arg(&tree).arg(".");
            assert!(command.status().unwrap().success());
            Origin::of_archive(&tar).unwrap()
        };
        assert!(matches!(make("oci", &["oci-layout", "index.json"]), Some(Origin::OciArchive(_))));
        assert!(matches!(make("docker", &["manifest.json", "repositories"]), Some(Origin::DockerArchive(_))));
        assert_eq!(make("root", &["etc/manifest.json", "etc/oci-layout", "vmlinuz"]), None);
    }
}
