//! A project's root file system on real podman and Btrfs: what is installed in
//! it goes wherever the project goes; images of other tools; what a start asks
//! of podman. Needs root, podman, docker-registry and busybox.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "world/mod.rs"]
mod world;

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use cocalc_core::{
    ids::{Epoch, HostId, ImageDigest, ProjectId, SnapshotName},
    images::Reference,
    runner::{Error, Isolation, Limits, ProjectSpec, Runner, State},
    storage::{SendOptions, Storage, VolumeOptions},
};
use cocalc_podman::{
    Podman, cleanup_instance,
    image::{self, ImageError, Origin, Pull, Pulled, Step},
};
use cocalc_storage::{Btrfs, ImageLimits, ImageRecord, loopback::Loopback};
use world::{Guarded, World, must};

const GRACE: Duration = Duration::from_secs(5);

fn name(text: &str) -> SnapshotName {
    text.parse().unwrap()
}

/// A host's volume with images, and its runner. Fields are dropped in order.
struct Site {
    podman: Podman,
    store: Btrfs,
    instance: HostId,
    _state: tempfile::TempDir,
    volume: Option<Loopback>,
    _root: tempfile::TempDir,
}

impl Site {
    async fn new(index: u16) -> Self {
        let root = tempfile::Builder::new().prefix("cocalc-site-").tempdir().unwrap();
        let volume = Loopback::create(&root.path().join("v.img"), 3 << 30, &root.path().join("v"));
        let volume = volume.unwrap_or_else(|error| panic!("needs root and loop devices: {error}"));
        Btrfs::initialize(volume.path()).unwrap();
        let store = Btrfs::open(volume.path()).await.unwrap();
        let images = store.path().join("images");
        let find = move |digest: ImageDigest| {
            let path = images.join(digest.to_string());
            path.is_dir().then_some(path)
        };
        let (instance, state) = (HostId::random(), tempfile::tempdir().unwrap());
        let podman = Podman::builder(instance, state.path(), Arc::new(find))
            .machine_index(index)
            .build()
            .await
            .unwrap();
        Self { podman, store, instance, _state: state, volume: Some(volume), _root: root }
    }

    async fn spec(&self, project: ProjectId, image: ImageDigest, slot: u32) -> ProjectSpec {
        ProjectSpec {
            project,
            epoch: Epoch::FIRST,
            volume: self.store.volume(project).await.unwrap().path.unwrap(),
            image: Some(image),
            slot,
            limits: Limits::default(),
            env: Default::default(),
            isolation: Isolation::default(),
        }
    }

    async fn root(&self, project: ProjectId, line: &str) -> String {
        world::run_in(&self.podman, project, Some("root"), line).await
    }

    async fn user(&self, project: ProjectId, line: &str) -> String {
        world::run_in(&self.podman, project, None, line).await
    }

    async fn close(mut self) {
        cleanup_instance(self.instance, None).await.unwrap();
        let volume = self.volume.take().unwrap();
        drop(self);
        drop(volume);
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.volume.is_some() {
            let instance = self.instance;
            let cleanup = move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let _ = runtime.block_on(cleanup_instance(instance, None));
            };
            let _ = std::thread::spawn(cleanup).join();
        }
    }
}

/// Makes a package with a program, a setuid program, a conffile and a user of
/// its own, and installs it with apt.
const INSTALL: &str = r#"set -e
d=$(mktemp -d); mkdir -p $d/p/DEBIAN $d/p/usr/local/bin $d/p/etc
printf 'Package: cocalc-tool\nVersion: 1.2\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: a tool\n' > $d/p/DEBIAN/control
printf '#!/bin/sh\nset -e\nid tool >/dev/null 2>&1 || useradd --system --uid 777 tool\nchown tool: /etc/tool.conf\nchmod 4755 /usr/local/bin/tool-root\n' > $d/p/DEBIAN/postinst
chmod 755 $d/p/DEBIAN/postinst
printf '#!/bin/sh\necho tool works\n' > $d/p/usr/local/bin/tool; chmod 755 $d/p/usr/local/bin/tool
cp /usr/bin/id $d/p/usr/local/bin/tool-root
echo setting > $d/p/etc/tool.conf
chmod 755 $d $d/p
dpkg-deb --root-owner-group --build $d/p $d/cocalc-tool.deb >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get install -y $d/cocalc-tool.deb >/dev/null
DEBIAN_FRONTEND=noninteractive apt-get purge -y rsync >/dev/null
rm -r $d"#;

/// Whether all of it is there, and what was removed is not.
const CHECK: &str = "tool && dpkg-query -W -f '${Version} ${db:Status-Status}\\n' cocalc-tool && stat -c '%U %a' /etc/tool.conf /usr/local/bin/tool-root \
    && tool-root -u && ! command -v rsync && ! dpkg-query -W -f '${db:Status-Status}' rsync 2>/dev/null | grep -qx installed && sudo -n id -u && cat ~/mine";
const EXPECTED: &str = "tool works\n1.2 installed\ntool 644\nroot 4755\n0\n0\nmy own\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_package_survives_stop_snapshot_restore_and_a_move_to_another_host() {
    let (a, b) = (Site::new(40).await, Site::new(41).await);
    let limits = ImageLimits::default();
    let tar = tokio::task::spawn_blocking(world::image_tar).await.unwrap();
    let image = a.store.import_image_file(&tar, &limits).await.unwrap();
    let sent = a.store.send_image(&image, u32::MAX).await.unwrap();
    assert_eq!(b.store.receive_image(&sent.header, sent.reader, &limits).await.unwrap(), image);

    let project = ProjectId::random();
    a.store.create(project, &VolumeOptions::default()).await.unwrap();
    let spec = a.spec(project, image, 2).await;
    a.podman.start(&spec).await.unwrap();
    a.user(project, "echo my own > ~/mine").await;
    a.root(project, INSTALL).await;
    assert_eq!(a.user(project, CHECK).await, EXPECTED);
    // sudo's root is nobody outside.
    let map = a.user(project, "sudo -n cat /proc/self/uid_map").await;
    assert!(map.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap() >= 0x1000_0000, "{map}");

    a.podman.stop(project, GRACE).await.unwrap();
    a.podman.start(&spec).await.unwrap();
    assert_eq!(a.user(project, CHECK).await, EXPECTED, "after a stop");

    a.podman.stop(project, GRACE).await.unwrap();
    a.store.snapshot(project, &name("good")).await.unwrap();
    a.podman.start(&spec).await.unwrap();
    a.root(project, "apt-get purge -y cocalc-tool >/dev/null && rm /home/user/mine").await;
    assert_eq!(a.user(project, "command -v tool || echo gone").await, "gone\n");
    a.podman.stop(project, GRACE).await.unwrap();
    a.podman.remove(project).await.unwrap();
    a.store.restore(project, &name("good"), &name("former")).await.unwrap();
    let spec = a.spec(project, image, 2).await;
    a.podman.start(&spec).await.unwrap();
    assert_eq!(a.user(project, CHECK).await, EXPECTED, "after going back to a snapshot");

    // To another host, where it has another range of ids.
    a.podman.stop(project, GRACE).await.unwrap();
    a.podman.remove(project).await.unwrap();
    a.store.snapshot(project, &name("moving")).await.unwrap();
    let sent = a.store.send(project, &name("moving"), &SendOptions::whole()).await.unwrap();
    b.store.receive(&sent.header, sent.reader).await.unwrap();
    b.store.restore(project, &name("moving"), &name("former")).await.unwrap();
    let there = ProjectSpec { epoch: Epoch::FIRST.next(), ..b.spec(project, image, 7).await };
    b.podman.start(&there).await.unwrap();
    assert_eq!(b.user(project, CHECK).await, EXPECTED, "on another host");
    // What is stored has the same owners on both.
    let owner = |site: &Site, path: &str| {
        let root = site.store.path().join("projects").join(project.to_string());
        std::fs::metadata(root.join(format!("system/{image}/upper")).join(path)).unwrap().uid()
    };
    for path in ["etc/tool.conf", "usr/local/bin/tool-root"] {
        assert_eq!(owner(&a, path), owner(&b, path), "{path}");
    }
    assert_eq!(owner(&b, "etc/tool.conf"), 777);
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_image_keeps_home_and_the_former_one_its_layer() {
    let world = World::new().await;
    let other = ImageDigest::from_bytes([8; 32]);
    let (first, second) = (world.volume.root.join("image"), world.volume.root.join("image-2"));
    if !second.exists() {
        must(Command::new("btrfs").args(["subvolume", "snapshot"]).arg(&first).arg(&second));
        std::fs::write(second.join("etc/which"), "the second\n").unwrap();
    }
    let find = move |digest: ImageDigest| match digest {
        world::IMAGE => Some(first.clone()),
        digest if digest == other => Some(second.clone()),
        _ => None,
    };
    let podman = Podman::builder(world.instance, world.state.path(), Arc::new(find))
        .machine_index(world.index)
        .build()
        .await
        .unwrap();
    let spec = world.project(3);
    let project = spec.project;
    let run = async |user: Option<&str>, line: &str| world::run_in(&podman, project, user, line).await;
    podman.start(&spec).await.unwrap();
    run(Some("root"), "echo made > /opt/made").await;
    run(None, "echo mine > ~/mine").await;
    let busy = ProjectSpec { image: Some(other), ..spec.clone() };
    assert!(podman.prepare(&busy).await.is_ok(), "nothing is changed while it runs");
    assert_eq!(run(None, "cat /opt/made").await, "made\n");
    podman.stop(project, GRACE).await.unwrap();

    let changed = ProjectSpec { image: Some(other), ..spec.clone() };
    podman.prepare(&changed).await.unwrap();
    podman.start(&changed).await.unwrap();
    assert_eq!(run(None, "cat /etc/which ~/mine; ls /opt").await, "the second\nmine\n");
    run(Some("root"), "echo other > /opt/other").await;
    podman.stop(project, GRACE).await.unwrap();

    podman.start(&spec).await.unwrap();
    assert_eq!(
        run(None, "cat ~/mine; ls /opt; test -e /etc/which || echo first").await,
        "mine\nmade\nfirst\n"
    );
    podman.stop(project, GRACE).await.unwrap();
    let missing = ProjectSpec { image: Some(ImageDigest::from_bytes([1; 32])), ..spec };
    assert!(matches!(podman.start(&missing).await, Err(Error::NoImage { .. })));
}

/// A podman that notes how it is called.
fn noting(dir: &Path) -> (PathBuf, PathBuf) {
    let (script, calls) = (dir.join("podman"), dir.join("calls"));
    let text = format!("#!/bin/sh\necho \"$@\" >> {}\nexec podman \"$@\"\n", calls.display());
    cocalc_testkit::executable::write(&script, text);
    (script, calls)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_asks_podman_for_its_own_container_however_many_there_are() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (script, calls) = noting(dir.path());
    let podman = world::builder(world.instance, world.state.path(), world.index, &world.volume)
        .podman(script)
        .build()
        .await
        .unwrap();
    let spec = world.project(0);
    let container = format!("cocalc-{}-{}", world.instance, spec.project);
    let start = async || {
        podman.prepare(&spec).await.unwrap();
        std::fs::write(&calls, "").unwrap();
        podman.start(&spec).await.unwrap();
        let made = std::fs::read_to_string(&calls).unwrap();
        podman.stop(spec.project, GRACE).await.unwrap();
        made.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let alone = start().await;
    for slot in 1..9 {
        podman.prepare(&world.project(slot)).await.unwrap();
    }
    let among = start().await;
    assert_eq!(alone, among);
    assert_eq!(among.len(), 1, "{among:?}");
    assert!(among[0].contains(" start ") && among[0].ends_with(&container), "{among:?}");
    // Its receipt names each step.
    let steps: Vec<String> = podman.start_phases(spec.project).into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, ["container", "mounts", "podman start", "first process"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_has_more_projects_than_ranges_of_ids_and_addresses() {
    let world = World::new().await;
    let builder = || world::builder(world.instance, world.state.path(), world.index, &world.volume).slots(2);
    let podman = builder().build().await.unwrap();
    // The last two ask for what this host has not.
    let specs: Vec<ProjectSpec> = (0..4).map(|slot| world.project(slot)).collect();
    let [one, two, three, four] = &specs[..] else { unreachable!() };
    let run = async |podman: &Podman, spec: &ProjectSpec, line| {
        world::run_in(podman, spec.project, Some("root"), line).await
    };
    for spec in [one, two] {
        podman.start(spec).await.unwrap();
        run(&podman, spec, "mkdir -p /opt/mine && chown 4242:4343 /opt/mine && echo kept > ~user/file").await;
    }
    let full = podman.start(three).await.unwrap_err();
    assert!(matches!(full, Error::Busy { .. }), "{full}");
    assert!(full.to_string().contains("2 projects run here"), "{full}");
    // The one that was stopped gives up what it has, the one that runs nothing.
    podman.stop(one.project, GRACE).await.unwrap();
    podman.start(three).await.unwrap();
    assert_eq!(podman.status(two.project).await.unwrap().state, State::Running);
    let address = "hostname -I 2>/dev/null || cat /proc/net/fib_trie";
    let (second, third) = (run(&podman, two, address).await, run(&podman, three, address).await);
    assert_ne!(second, third);
    assert!(podman.prepare(one).await.is_err(), "there is no place to make it ready in");
    // Under other ids its files are what they were.
    podman.stop(two.project, GRACE).await.unwrap();
    podman.prepare(four).await.unwrap();
    podman.start(one).await.unwrap();
    assert_eq!(
        run(&podman, one, "stat -c %u:%g /opt/mine; stat -c %U ~user; cat ~user/file").await,
        "4242:4343\nuser\nkept\n"
    );
    // So it is for a runner that finds them.
    let again = builder().build().await.unwrap();
    again.stop(three.project, GRACE).await.unwrap();
    again.start(two).await.unwrap();
    assert_eq!(run(&again, two, "cat ~user/file").await, "kept\n");
    assert_eq!(again.status(one.project).await.unwrap().state, State::Running);
}

/// A registry with one user, on a port of its own.
struct Registry {
    address: String,
    auth_file: PathBuf,
    _process: Guarded,
}

impl Registry {
    fn start(dir: &Path) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("localhost:{port}");
        let hash = must(Command::new("python3").args([
            "-W",
            "ignore",
            "-c",
            "import crypt; print(crypt.crypt('secret', crypt.mksalt(crypt.METHOD_BLOWFISH, rounds=16)))",
        ]));
        std::fs::write(dir.join("htpasswd"), format!("alice:{hash}")).unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {0}/registry\n\
             http:\n  addr: 127.0.0.1:{port}\nauth:\n  htpasswd:\n    realm: test\n    path: {0}/htpasswd\n",
            dir.display()
        );
        std::fs::write(dir.join("config.yml"), config).unwrap();
        let mut serve = Command::new("docker-registry");
        serve.arg("serve").arg(dir.join("config.yml"));
        serve.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let process = Guarded::spawn(&mut serve);
        let begun = std::time::Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "the registry does not answer");
            std::thread::sleep(Duration::from_millis(50));
        }
        let auth_file = dir.join("auth.json");
        // alice:secret
        let auth = format!(r#"{{"auths":{{"{address}":{{"auth":"YWxpY2U6c2VjcmV0"}}}}}}"#);
        std::fs::write(&auth_file, auth).unwrap();
        Self { address, auth_file, _process: process }
    }
}

/// Makes an image of two layers, the second of which removes a file of the
/// first; pushes it, and saves it as both kinds of archive.
const MAKE_IMAGE: &str = r#"set -e
export TMPDIR=$D
P="podman --root $D/store --runroot $D/run --storage-driver overlay --events-backend none"
mkdir -p $D/root/bin $D/root/etc
cp /bin/busybox $D/root/bin/busybox
for tool in sh id ls cat touch test sleep; do ln -s busybox $D/root/bin/$tool; done
echo 'root:x:0:0:root:/root:/bin/sh' > $D/root/etc/passwd
echo first > $D/root/etc/gone
tar -C $D/root --owner=0 --group=0 -cf $D/root.tar .
$P import -q $D/root.tar base >/dev/null
c=$($P create base /bin/sh)
m=$($P mount $c)
rm $m/etc/gone; echo second > $m/etc/added
$P unmount $c >/dev/null
$P commit -q $c img >/dev/null
$P push -q --tls-verify=false --authfile $AUTH img docker://$TO
$P save -q --format oci-archive -o $D/oci.tar img
$P save -q --format docker-archive -o $D/docker.tar img
"#;

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_a_registry_and_from_archives_and_are_the_same_image() {
    let site = Site::new(42).await;
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path());
    let to = format!("{}/team/img:2", registry.address);
    must(
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--", "/bin/sh", "-c", MAKE_IMAGE])
            .env("D", dir.path())
            .env("AUTH", &registry.auth_file)
            .env("TO", &to),
    );
    let reference: Reference = to.parse().unwrap();
    let pull =
        async |origin: Origin, auth: bool, bytes_max: u64| -> Result<(ImageDigest, String), ImageError> {
            let scratch = site.store.scratch().await.unwrap();
            let pull = Pull {
                origin,
                work: scratch.path(),
                auth_file: auth.then(|| registry.auth_file.clone()),
                insecure: vec![registry.address.clone()],
                bytes_max,
            };
            let mut steps: Vec<Step> = Vec::new();
            let pulled: Pulled = pull.run(|step| steps.push(step)).await?;
            assert!(!steps.is_empty());
            let tar = pulled.tar().unwrap();
            let noted = ImageRecord { sources: [pulled.source.clone()].into(), ..ImageRecord::default() };
            let digest =
                site.store.import_image_as(tar, &ImageLimits::default(), noted, image::dress).await.unwrap();
            Ok((digest, pulled.source))
        };
    const ROOM: u64 = 1 << 30;
    let (digest, source) = pull(Origin::Reference(reference.clone()), true, ROOM).await.unwrap();
    assert!(source.starts_with(&format!("{}/team/img@sha256:", registry.address)), "{source}");
    // By the digest that it was found to have, once more.
    let pinned: Reference = source.parse().unwrap();
    assert_eq!(pull(Origin::Reference(pinned), true, ROOM).await.unwrap(), (digest, source));
    for (file, is) in [("oci.tar", "oci"), ("docker.tar", "docker")] {
        let origin = Origin::of_archive(&dir.path().join(file)).unwrap();
        match (&origin, is) {
            (Some(Origin::OciArchive(_)), "oci") | (Some(Origin::DockerArchive(_)), "docker") => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(pull(origin.unwrap(), true, ROOM).await.unwrap().0, digest, "{file}");
    }
    assert_eq!(Origin::of_archive(&dir.path().join("root.tar")).unwrap(), None);
    assert_eq!(site.store.images().await.unwrap().len(), 1, "it is stored once");

    let denied = pull(Origin::Reference(reference.clone()), false, ROOM).await.unwrap_err();
    assert!(matches!(denied, ImageError::Failed { .. }), "{denied}");
    let large = pull(Origin::Reference(reference), true, 1 << 10).await;
    // It may be here before it is looked at; then it is small enough for that.
    assert!(matches!(large, Err(ImageError::TooLarge { .. }) | Ok(_)), "{large:?}");
    let missing = format!("{}/team/none:1", registry.address).parse().unwrap();
    assert!(pull(Origin::Reference(missing), true, ROOM).await.is_err());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("/staging/"), "nothing of podman stays mounted");

    // And a project runs on it, although it knows no ordinary user.
    let project = ProjectId::random();
    site.store.create(project, &VolumeOptions::default()).await.unwrap();
    let spec = site.spec(project, digest, 1).await;
    assert_eq!(site.podman.start(&spec).await.unwrap().state, State::Running);
    let said =
        site.user(project, "id -un; id -u; cat /etc/added; test -e /etc/gone || echo gone; touch ~/x").await;
    assert_eq!(said, "user\n1000\nsecond\ngone\n");
    assert_eq!(site.root(project, "id -u").await, "0\n");
    site.podman.stop(project, GRACE).await.unwrap();
    site.close().await;
}
