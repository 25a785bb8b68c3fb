//! Damage: what it affects is said, and it is put right where there is a copy.
//! Runs as root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use cocalc_backup::{Bounds, Location, OnePerProject, RepositoryName, Rustic, WrappingKey, WrappingKeys};
use cocalc_core::{
    backups::{Backup, Backups, CheckOptions, Error},
    ids::{ProjectId, TreePath},
};
use cocalc_testkit::backups::{Subject, differences, facts};
use common::{files, noise, over, small};
use tempfile::TempDir;

struct Kept {
    root: TempDir,
    backups: Rustic,
    project: ProjectId,
    tree: PathBuf,
    /// With large files, each in packs of its own, and without.
    large: Backup,
    little: Backup,
}

impl Kept {
    async fn new(mirrored: bool) -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["keys", "repositories", "mirrors"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let wrapping = WrappingKeys::new(WrappingKey::generate("test").unwrap());
        let keys =
            OnePerProject::in_directory(root.path().join("keys"), wrapping, root.path().join("repositories"));
        let mirrors = root.path().join("mirrors");
        let place =
            move |name: RepositoryName, _| Location::Directory { path: mirrors.join(name.to_string()) };
        let keys = if mirrored { keys.mirrored(place) } else { keys };
        let backups = over(Arc::new(keys), Bounds::default());
        let (project, tree) = (ProjectId::random(), root.path().join("tree"));
        small(&tree, 1);
        let subject = Subject::new(&backups, root.path());
        let little = backups.back_up(&subject.source(project, &tree, None), &|_| ()).await.unwrap();
        fs::create_dir(tree.join("home/large")).unwrap();
        fs::write(tree.join("home/large/file"), noise(5, 3 << 20)).unwrap();
        let large = backups.back_up(&subject.source(project, &tree, Some(&little)), &|_| ()).await.unwrap();
        Self { root, backups, project, tree, large, little }
    }

    fn repository(&self) -> PathBuf {
        self.root.path().join("repositories").join(self.project.to_string())
    }

    /// The pack of the large file.
    fn pack(&self) -> PathBuf {
        let packs = files(&self.repository().join("data"));
        packs.into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
    }

    async fn restores(&self, backup: &Backup) -> Result<(), Error> {
        let target = tempfile::tempdir_in(self.root.path()).unwrap();
        self.backups.restore(self.project, &backup.id, &TreePath::root(), target.path(), &|_| ()).await?;
        if backup.id == self.large.id {
            let differences = differences(&facts(&self.tree), &facts(target.path()));
            assert!(differences.is_empty(), "{differences:#?}");
        }
        Ok(())
    }
}

const LOOK: CheckOptions = CheckOptions { read_data: true, repair: false };
const REPAIR: CheckOptions = CheckOptions { read_data: true, repair: true };

fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[tokio::test]
async fn damage_is_told_by_backup_and_path_and_stored_again_from_the_files() {
    let kept = Kept::new(false).await;
    flip(&kept.pack());
    let found = kept.backups.check(kept.project, &LOOK).await.unwrap();
    assert_eq!(found.affected, std::slice::from_ref(&kept.large.id), "{found:?}");
    let lost: Vec<_> = found.lost.iter().map(|lost| lost.path.to_string()).collect();
    assert_eq!(lost, ["home/large/file"], "{found:?}");
    kept.restores(&kept.little).await.unwrap();
    assert!(kept.restores(&kept.large).await.is_err());
    // What is not lost can be had.
    let target = tempfile::tempdir_in(kept.root.path()).unwrap();
    let path: TreePath = "home/notes".parse().unwrap();
    kept.backups.restore(kept.project, &kept.large.id, &path, target.path(), &|_| ()).await.unwrap();

    // Without a mirror a repair sets the pack aside, and the next backup without a
    // parent stores again what it finds of it.
    let found = kept.backups.check(kept.project, &REPAIR).await.unwrap();
    assert_eq!((found.repaired, found.lost.len()), (0, 1), "{found:?}");
    assert_eq!(files(&kept.repository().join("cocalc/damaged")).len(), 1);
    let subject = Subject::new(&kept.backups, kept.root.path());
    kept.backups.back_up(&subject.source(kept.project, &kept.tree, None), &|_| ()).await.unwrap();
    assert!(kept.backups.check(kept.project, &LOOK).await.unwrap().is_sound());
    kept.restores(&kept.large).await.unwrap();
    let erased = kept.backups.erase(kept.project).await.unwrap();
    assert!(erased.freed_bytes > 6 << 20 && !kept.repository().exists(), "{erased:?}");
}

#[tokio::test]
async fn what_a_mirror_has_is_put_back() {
    let kept = Kept::new(true).await;
    let mirrored = kept.backups.mirror(kept.project, &|_| ()).await.unwrap();
    assert!(mirrored.files >= 6 && mirrored.bytes > 3 << 20, "{mirrored:?}");
    assert_eq!(kept.backups.mirror(kept.project, &|_| ()).await.unwrap().files, 0);
    let all = |what: &str| files(&kept.repository().join(what));
    // One bit of each file there is, each cut in half, and each gone.
    for harm in ["changed", "cut", "gone"] {
        for kind in ["data", "index"] {
            for file in all(kind) {
                match harm {
                    "changed" => flip(&file),
                    "cut" => {
                        let length = fs::metadata(&file).unwrap().len();
                        fs::File::options().write(true).open(&file).unwrap().set_len(length / 2).unwrap();
                    }
                    // An index that is gone is made anew from the packs, so not both.
                    _ if kind == "index" => {}
                    _ => fs::remove_file(&file).unwrap(),
                }
            }
        }
        assert!(kept.restores(&kept.large).await.is_err(), "{harm}");
        let found = kept.backups.check(kept.project, &REPAIR).await.unwrap();
        assert!(found.is_sound() && found.repaired >= 2, "{harm}: {found:?}");
        kept.restores(&kept.large).await.unwrap();
        kept.restores(&kept.little).await.unwrap();
    }
    // A listed backup whose description is damaged is damage, and put right.
    let listed = kept.backups.list(kept.project).await.unwrap();
    flip(&kept.repository().join("snapshots").join(&kept.large.id));
    let unread = kept.backups.list(kept.project).await;
    assert!(matches!(unread, Err(Error::Damaged { .. })), "{unread:?}");
    assert_eq!(kept.backups.check(kept.project, &REPAIR).await.unwrap().repaired, 1);
    assert_eq!(kept.backups.list(kept.project).await.unwrap(), listed);
    // Erasing takes the mirror along.
    kept.backups.erase(kept.project).await.unwrap();
    assert_eq!(files(&kept.root.path().join("mirrors")).len(), 0);
}

#[tokio::test]
async fn a_repository_without_a_mirror_says_so() {
    let kept = Kept::new(false).await;
    let refused = kept.backups.mirror(kept.project, &|_| ()).await;
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
}
