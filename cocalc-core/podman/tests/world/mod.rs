//! What the real tests stand on: a Btrfs volume in a file, the project image
//! on it, and runners that are cleaned up whatever happens.

#![allow(unreachable_pub, dead_code, reason = "shared by several test binaries")]

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use cocalc_core::{
    ids::{Epoch, HostId, ImageDigest, ProjectId},
    runner::{self, ExecRequest, Exit, Isolation, Limits, ProjectSpec, Runner},
};
use cocalc_podman::{Podman, PodmanBuilder, cleanup_instance, image, probe};
use tokio::io::AsyncReadExt;

pub const IMAGE: ImageDigest = ImageDigest::from_bytes([7; 32]);

/// Runs a command and fails with its complaint.
pub fn must(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The Btrfs volume that the tests running at a time share, with the image.
pub struct Volume {
    pub root: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.root).status();
    }
}

/// The volume that some test has, or a new one. Blocks.
pub fn volume() -> Arc<Volume> {
    static SHARED: Mutex<Weak<Volume>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(volume) = shared.upgrade() {
        return volume;
    }
    let volume = Arc::new(make_volume());
    *shared = Arc::downgrade(&volume);
    volume
}

fn make_volume() -> Volume {
    let lacks: Vec<_> = probe().lacks.into_iter().filter(|lack| !lack.optional).collect();
    assert!(lacks.is_empty(), "these tests need: {lacks:#?}");
    let dir = tempfile::Builder::new().prefix("cocalc-podman-").tempdir().unwrap();
    let (file, root) = (dir.path().join("volume.img"), dir.path().join("volume"));
    std::fs::create_dir(&root).unwrap();
    std::fs::File::create(&file).unwrap().set_len(6 << 30).unwrap();
    must(Command::new("mkfs.btrfs").arg("-q").arg(&file));
    must(Command::new("mount").args(["-o", "loop,nosuid,nodev"]).arg(&file).arg(&root));
    let volume = Volume { root, _dir: dir };
    let tar = image_tar();
    let image = volume.root.join("image");
    must(Command::new("btrfs").args(["subvolume", "create"]).arg(&image));
    must(Command::new("tar").arg("-C").arg(&image).args(["--xattrs", "--numeric-owner", "-xpf"]).arg(&tar));
    volume
}

/// The standard image, built if it is not in the cache. Blocks.
pub fn image_tar() -> PathBuf {
    let cache = std::env::var_os("COCALC_IMAGE_CACHE")
        .map_or_else(|| std::env::temp_dir().join("cocalc-images"), PathBuf::from);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(image::build_tar(&cache, |step| eprintln!("image: {step}")))
        .unwrap()
}

/// Runs a line in a project of any runner, which must succeed.
pub async fn run_in(podman: &Podman, project: ProjectId, user: Option<&str>, line: &str) -> String {
    let (exit, text) = exit_in(podman, project, user, line).await;
    assert_eq!(exit, Exit::Code(0), "{line:?}: {text}");
    text
}

/// Runs a line: how it ended and what it printed, errors behind.
async fn exit_in(podman: &Podman, project: ProjectId, user: Option<&str>, line: &str) -> (Exit, String) {
    let request = ExecRequest {
        command: runner::Command::Line(line.into()),
        user: user.map(str::to_owned),
        ..ExecRequest::default()
    };
    let mut process = podman.exec(project, request).await.unwrap();
    drop(process.stdin);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut stderr = process.stderr.take().unwrap();
    let all = async {
        let (a, b) = tokio::join!(process.stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
        a.unwrap();
        b.unwrap();
        process.handle.wait().await.unwrap()
    };
    let exit = tokio::time::timeout(Duration::from_secs(120), all)
        .await
        .unwrap_or_else(|_| panic!("{line:?} did not end"));
    out.extend(err);
    (exit, String::from_utf8_lossy(&out).into_owned())
}

/// One runner, and the projects made for it.
pub struct World {
    pub podman: Podman,
    pub instance: HostId,
    pub state: tempfile::TempDir,
    pub index: u16,
    pub volume: Arc<Volume>,
}

/// A number that no other runner of tests on this machine has, so that their ranges
/// differ; away from those of hosts that really run here.
fn next_index() -> u16 {
    for index in (20..56).rev() {
        let path = std::env::temp_dir().join(format!("cocalc-test-index-{index}"));
        let file = std::fs::File::create(path).unwrap();
        if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok() {
            // Held to the end of this process.
            std::mem::forget(file);
            return index;
        }
    }
    panic!("too many runners of tests at a time");
}

pub fn builder(instance: HostId, state: &Path, index: u16, volume: &Volume) -> PodmanBuilder {
    let image = volume.root.join("image");
    let images = move |digest: ImageDigest| (digest == IMAGE).then(|| image.clone());
    Podman::builder(instance, state, Arc::new(images)).machine_index(index)
}

impl World {
    pub async fn new() -> Self {
        let volume = tokio::task::spawn_blocking(volume).await.unwrap();
        let (instance, state, index) = (HostId::random(), tempfile::tempdir().unwrap(), next_index());
        let podman = builder(instance, state.path(), index, &volume).build().await.unwrap();
        Self { podman, instance, state, index, volume }
    }

    /// A project with a volume of its own.
    pub fn project(&self, slot: u32) -> ProjectSpec {
        let project = ProjectId::random();
        let path = self.volume.root.join(project.to_string());
        must(Command::new("btrfs").args(["subvolume", "create"]).arg(&path));
        ProjectSpec {
            project,
            epoch: Epoch::FIRST,
            volume: path,
            image: Some(IMAGE),
            slot,
            limits: Limits::default(),
            env: [("FROM_SPEC".to_owned(), "yes".to_owned())].into(),
            isolation: Isolation::default(),
        }
    }

    pub async fn started(&self, slot: u32) -> ProjectSpec {
        let spec = self.project(slot);
        self.podman.start(&spec).await.unwrap();
        spec
    }

    /// Runs a line as `user`: how it ended and what it printed, errors behind.
    pub async fn run_as(&self, project: ProjectId, user: Option<&str>, line: &str) -> (Exit, String) {
        exit_in(&self.podman, project, user, line).await
    }

    /// The host's number of a project's first process.
    pub fn first_process(&self, project: ProjectId) -> String {
        let container = format!("cocalc-{}-{project}", self.instance);
        let mut podman = Command::new("podman");
        must(podman.args(["inspect", "--format", "{{.State.Pid}}", &container])).trim().to_owned()
    }

    /// A file of a project's control group, by its name in either version.
    pub fn group_file(&self, project: ProjectId, v1: &str, v2: &str) -> String {
        let pid = self.first_process(project);
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let (controller, name) = v1.split_once('/').unwrap();
        let find = |key: &str| groups.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(key));
        let path = match find(&format!("{controller}:")) {
            Some(group) => format!("/sys/fs/cgroup/{controller}{group}/{name}"),
            None => format!("/sys/fs/cgroup{}/{v2}", find(":").unwrap()),
        };
        std::fs::read_to_string(path).unwrap()
    }

    /// A limit of a project's control group.
    pub fn limit(&self, project: ProjectId, v1: &str, v2: &str) -> u64 {
        self.group_file(project, v1, v2).trim().parse().unwrap()
    }

    /// Runs a line as the ordinary user, which must succeed.
    pub async fn run(&self, project: ProjectId, line: &str) -> String {
        let (exit, text) = self.run_as(project, None, line).await;
        assert_eq!(exit, Exit::Code(0), "{line:?}: {text}");
        text
    }

    /// Runs a line as root inside, which must succeed.
    pub async fn root(&self, project: ProjectId, line: &str) -> String {
        let (exit, text) = self.run_as(project, Some("root"), line).await;
        assert_eq!(exit, Exit::Code(0), "{line:?}: {text}");
        text
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let instance = self.instance;
        // On a thread with a runtime of its own: this may be a panicking test.
        let done = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(cleanup_instance(instance, None))
        })
        .join();
        if !std::thread::panicking() {
            done.unwrap().unwrap();
        }
    }
}

/// A podman that hangs in every call while a file is there: both, in `dir`.
pub fn podman_that_may_hang(dir: &Path) -> (PathBuf, PathBuf) {
    let (wrapper, switch) = (dir.join("podman"), dir.join("switch"));
    let real = std::env::split_paths(&std::env::var_os("PATH").unwrap())
        .map(|dir| dir.join("podman"))
        .find(|path| path.exists())
        .unwrap();
    let script = format!(
        "#!/bin/sh\nif test -e {}; then exec sleep 86400; fi\nexec {} \"$@\"\n",
        switch.display(),
        real.display()
    );
    cocalc_testkit::executable::write(&wrapper, script);
    (wrapper, switch)
}

/// Waits until `condition` holds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Starts something on the host that ends with the test.
pub struct Guarded(pub std::process::Child);

impl Guarded {
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.process_group(0).stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
