//! What stays free on the volume while images come: projects write there, too.

use std::time::Duration;

use cocalc_core::control::{CommandError, ErrorCode};
use cocalc_storage::Btrfs;

use super::Images;

/// How often it is looked whether the volume has room for more.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Images {
    /// Goes on with what takes space on the volume, whichever program does it, as
    /// long as some stays free: projects write there, too. Then it is dropped, and
    /// with it what has come.
    pub(super) async fn while_there_is_room<T>(
        &self,
        store: &Btrfs,
        comes: impl Future<Output = Result<T, CommandError>>,
    ) -> Result<T, CommandError> {
        let reserve = self.0.settings.reserve_bytes;
        let full = async {
            let mut look = tokio::time::interval(LOOK_AGAIN);
            loop {
                look.tick().await;
                // A volume that cannot be asked fails whatever is written to it.
                if store.free_bytes().is_ok_and(|free| free < reserve) {
                    return no_space(reserve);
                }
            }
        };
        tokio::select! {
            // The first look comes before anything is written.
            biased;
            error = full => Err(error),
            done = comes => done.map_err(|error| match error.code {
                ErrorCode::NoSpace => no_space(reserve),
                _ => error,
            }),
        }
    }
}

/// What whoever asked for an image is told that does not fit.
pub(super) fn no_space(reserve: u64) -> CommandError {
    let message = format!(
        "this host's volume has no room for the image: less than {reserve} bytes would stay free \
         ([images] reserve_bytes). Delete images that nobody uses (cocalc image prune), snapshots or \
         projects, enlarge the volume, or take another host (--host)"
    );
    CommandError { code: ErrorCode::NoSpace, message }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        path::Path,
        process::Command,
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
    };

    use cocalc_core::{
        connector::{Connector, Error, Service},
        control::{ImageReply, ImageTask},
        grant::{Ledger, MemoryLedgerStore},
        ids::{HostId, OperationId},
        stream::BoxStream,
    };
    use cocalc_storage::loopback::Loopback;

    use super::*;
    use crate::images::{ImageSettings, World};

    const MIB: u64 = 1 << 20;

    /// An archive of `mib` MiB, as a root file system and as podman saves one.
    const ARCHIVES: &str = r#"
set -e
mkdir -p $D/root/bin
head -c ${MIB}M /dev/urandom > $D/root/bin/sh
chmod 755 $D/root/bin/sh
tar -C $D/root --owner=0 --group=0 -cf $D/import/root.tar .
rm -r $D/root
P="podman --root $D/store --runroot $D/run --storage-driver vfs --events-backend none"
$P import -q $D/import/root.tar img >/dev/null
$P save -q --format oci-archive -o $D/import/oci.tar img
"#;

    #[derive(Debug)]
    struct Nobody;

    #[async_trait::async_trait]
    impl Connector for Nobody {
        async fn open(
            &self,
            host: HostId,
            _: Service,
            _: Option<std::net::IpAddr>,
            _: Duration,
        ) -> Result<BoxStream, Error> {
            Err(Error::Unknown { host })
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_never_takes_the_room_that_is_left_to_projects() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("import")).unwrap();
        let made = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--", "/bin/sh", "-c", ARCHIVES])
            .env("D", dir.path())
            .env("MIB", "160")
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let volume = Loopback::create(&dir.path().join("v.img"), 640 * MIB, &dir.path().join("v")).unwrap();
        Btrfs::initialize(volume.path()).unwrap();
        let store = Btrfs::open(volume.path()).await.unwrap();
        let host = HostId::random();
        let ledger = Ledger::open(host, Arc::new(MemoryLedgerStore::default())).await.unwrap();
        let world = World { ledger, peers: Arc::new(Nobody) };
        let settings = |reserve_bytes| ImageSettings {
            import_dir: Some(dir.path().join("import")),
            reserve_bytes,
            ..ImageSettings::default()
        };
        let bring = async |images: &Images, file: &str| {
            let (operation, task) =
                (OperationId::random(), ImageTask::Import { file: file.into(), name: None });
            loop {
                let wait = Duration::from_secs(10);
                match images.work(operation, task.clone(), wait, &world).await {
                    Ok(ImageReply::Working { .. }) => {}
                    other => return other,
                }
            }
        };
        let empty = store.free_bytes().unwrap();

        // What cannot fit is not begun with.
        let images = Images::open(store.clone(), settings(empty - 100 * MIB), None).await.unwrap();
        for file in ["root.tar", "oci.tar"] {
            let refused = bring(&images, file).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::NoSpace, "{}", refused.message);
            assert_eq!(std::fs::read_dir(volume.path().join("staging")).unwrap().count(), 0);
        }

        // podman needs it several times: in the middle there is no room for more. A
        // project that writes all the while is not disturbed.
        let reserve = empty - 320 * MIB;
        let images = Images::open(store.clone(), settings(reserve), None).await.unwrap();
        let (over, least) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(u64::MAX)));
        let writer = {
            let (over, least, store) = (Arc::clone(&over), Arc::clone(&least), store.clone());
            let path = volume.path().join("tenant");
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::fs::File::create(&path).unwrap().write_all(&[7; 1 << 16]).unwrap();
                    least.fetch_min(store.free_bytes().unwrap(), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                }
            })
        };
        let refused = bring(&images, "oci.tar").await.unwrap_err();
        over.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        assert_eq!(refused.code, ErrorCode::NoSpace, "{}", refused.message);
        assert!(refused.message.contains("image prune") && refused.message.contains("reserve_bytes"));
        let least = least.load(Ordering::Relaxed);
        assert!(least < reserve && least > 0, "{least} of {reserve} were free");
        // Nothing of it stays.
        let path = volume.path().to_owned();
        let given_back = |store: &Btrfs| {
            // Has the kernel give back what was deleted sooner than by itself.
            let sync = Command::new("btrfs").args(["filesystem", "sync"]).arg(&path).output();
            assert!(sync.unwrap().status.success());
            let staged = std::fs::read_dir(path.join("staging")).unwrap().count();
            staged == 0 && store.free_bytes().unwrap() + 32 * MIB > empty
        };
        let begun = std::time::Instant::now();
        while !given_back(&store) {
            assert!(begun.elapsed() < Duration::from_secs(120), "{} of {empty}", store.free_bytes().unwrap());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(images.digests().is_empty());
        assert!(!used(volume.path()), "no program of it is left");

        // With the room that it needs it comes.
        let images = Images::open(store.clone(), settings(32 * MIB), None).await.unwrap();
        let done = bring(&images, "root.tar").await;
        assert!(matches!(done, Ok(ImageReply::Done { .. })), "{done:?}");
        drop(images);
    }

    /// Whether a process works in a directory below `path`.
    fn used(path: &Path) -> bool {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let mut places = processes.filter_map(|entry| std::fs::read_link(entry.path().join("cwd")).ok());
        places.any(|place| place.starts_with(path.join("staging")))
    }
}
