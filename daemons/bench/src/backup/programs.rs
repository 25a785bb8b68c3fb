//! Both sides: our worker and restic, each measured by GNU time.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use cocalc_backup::{Bounds, OnePerProject, Rustic, WrappingKey, WrappingKeys};
use cocalc_core::{
    backups::{Backup, BackupKind, BackupSource, Backups as _, PruneOptions},
    ids::{Epoch, HostId, ProjectId, Timestamp, TreePath},
};
use tokio::runtime::Runtime;

use crate::{Result, tool::run};

const LIMIT: Duration = Duration::from_secs(1800);

/// What a call took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) secs: f64,
    pub(super) cpu_secs: f64,
    pub(super) peak_mib: f64,
}

/// The line that GNU time wrote, and the time that passed.
fn taken(file: &Path, begun: Instant) -> Result<Taken> {
    let secs = begun.elapsed().as_secs_f64();
    let text = fs::read_to_string(file)?;
    let numbers: Vec<f64> =
        text.lines().last().unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
    let [peak_kib, user, system] = numbers[..] else { return Err(format!("time wrote {text:?}").into()) };
    Ok(Taken { secs, cpu_secs: user + system, peak_mib: peak_kib / 1024.0 })
}

pub(super) struct Ours<'a> {
    root: PathBuf,
    runtime: &'a Runtime,
    backups: Rustic,
    project: ProjectId,
    measured: PathBuf,
}

impl<'a> Ours<'a> {
    pub(super) fn new(dir: &Path, runtime: &'a Runtime) -> Result<Self> {
        let root = dir.join("bench-ours");
        let _ = fs::remove_dir_all(&root);
        for name in ["keys", "repositories"] {
            fs::create_dir_all(root.join(name))?;
        }
        let worker = std::env::current_exe()?.with_file_name("cocalc-backup-worker");
        let (script, measured) = (root.join("worker"), root.join("measured"));
        let line = format!(
            "#!/bin/sh\nexec /usr/bin/time -o {} -f '%M %U %S' {}\n",
            measured.display(),
            worker.display()
        );
        fs::write(&script, line)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let wrapping = WrappingKeys::new(WrappingKey::generate("bench")?);
        let keys = OnePerProject::in_directory(root.join("keys"), wrapping, root.join("repositories"));
        // The program that it is compared with does not step back for others.
        let bounds = Bounds { nice: 0, control_group: None, ..Bounds::default() };
        let backups = Rustic::builder(Arc::new(keys)).worker(script).bounds(bounds).build()?;
        Ok(Self { root, runtime, backups, project: ProjectId::random(), measured })
    }

    pub(super) fn back_up(
        &self,
        path: &Path,
        parent: Option<&Backup>,
        moved: bool,
    ) -> Result<(Backup, Taken)> {
        let source = BackupSource {
            project: self.project,
            host: HostId::random(),
            epoch: Epoch::new(1).ok_or("no epoch")?,
            snapshot: "bench".parse()?,
            taken: Timestamp::from_secs(parent.map_or(0, |parent| parent.taken.millis() / 1000 + 60)),
            path: path.to_owned(),
            kind: BackupKind::Manual,
            parent: parent.map(|parent| parent.id.clone()),
            moved,
            excludes: Vec::new(),
        };
        let begun = Instant::now();
        let backup = self.runtime.block_on(self.backups.back_up(&source, &|_| ()))?;
        Ok((backup, taken(&self.measured, begun)?))
    }

    pub(super) fn restore(&self, backup: &Backup, one: Option<&str>, target: &Path) -> Result<Taken> {
        let path = one.map_or(Ok(TreePath::root()), str::parse)?;
        let begun = Instant::now();
        self.runtime.block_on(self.backups.restore(self.project, &backup.id, &path, target, &|_| ()))?;
        taken(&self.measured, begun)
    }

    pub(super) fn prune(&self, forgotten: &[&Backup]) -> Result<Taken> {
        let ids: Vec<_> = forgotten.iter().map(|backup| backup.id.clone()).collect();
        self.runtime.block_on(self.backups.forget(self.project, &ids))?;
        let begun = Instant::now();
        let options = PruneOptions { grace: Duration::ZERO };
        self.runtime.block_on(self.backups.prune(self.project, &options))?;
        taken(&self.measured, begun)
    }

    pub(super) fn end(self) -> Result<()> {
        Ok(fs::remove_dir_all(&self.root)?)
    }
}

pub(super) struct Restic {
    root: PathBuf,
    measured: PathBuf,
    /// Where what is backed up is mounted, so that it has one path.
    place: PathBuf,
}

impl Restic {
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let root = dir.join("bench-restic");
        let _ = fs::remove_dir_all(&root);
        let place = dir.join("bench-source");
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&place)?;
        fs::write(root.join("password"), "bench")?;
        let measured = root.join("measured");
        let restic = Self { root, measured, place };
        restic.run(&["init", "--repository-version", "2"])?;
        Ok(restic)
    }

    fn run(&self, arguments: &[&str]) -> Result<Taken> {
        let mut command = Command::new("/usr/bin/time");
        command
            .arg("-o")
            .arg(&self.measured)
            .args(["-f", "%M %U %S", "restic", "--quiet", "--repo"])
            .arg(self.root.join("repository"))
            .arg("--cache-dir")
            .arg(self.root.join("cache"))
            .arg("--password-file")
            .arg(self.root.join("password"))
            .args(arguments);
        let begun = Instant::now();
        run(&mut command, LIMIT)?;
        taken(&self.measured, begun)
    }

    pub(super) fn back_up(&self, path: &Path, moved: bool) -> Result<Taken> {
        run(Command::new("mount").arg("--bind").args([path, &self.place]), LIMIT)?;
        let place = self.place.display().to_string();
        let mut arguments = vec!["backup", &place];
        if moved {
            arguments.extend(["--ignore-ctime", "--ignore-inode"]);
        }
        let took = self.run(&arguments);
        run(Command::new("umount").arg(&self.place), LIMIT)?;
        took
    }

    pub(super) fn restore(&self, one: Option<&str>, target: &Path) -> Result<Taken> {
        let to = target.display().to_string();
        let include = one.map(|one| self.place.join(one).display().to_string());
        let mut arguments = vec!["restore", "latest", "--target", &to];
        if let Some(include) = &include {
            arguments.extend(["--include", include]);
        }
        let begun = Instant::now();
        let took = self.run(&arguments)?;
        // Ours returns when it is durable.
        run(Command::new("sync").arg("-f").arg(target), LIMIT)?;
        Ok(Taken { secs: begun.elapsed().as_secs_f64(), ..took })
    }

    /// Where a restore put what was below the place.
    pub(super) fn restored(&self, target: &Path) -> PathBuf {
        target.join(self.place.strip_prefix("/").unwrap_or(&self.place))
    }

    pub(super) fn prune(&self) -> Result<Taken> {
        self.run(&["forget", "--keep-last", "2"])?;
        self.run(&["prune"])
    }

    pub(super) fn end(self) -> Result<()> {
        Ok(fs::remove_dir_all(&self.root)?)
    }
}
