//! The podman runner on real podman, Btrfs and network. Needs root.

#[path = "world/mod.rs"]
mod world;

use std::{os::unix::fs::MetadataExt, time::Duration};

use cocalc_core::runner::{Error, Exit, Runner, State};
use world::World;

#[tokio::test(flavor = "multi_thread")]
async fn what_root_installs_is_in_the_volume_with_canonical_owners_and_survives() {
    let world = World::new().await;
    let spec = world.started(3).await;
    let project = spec.project;
    world
        .root(
            project,
            "useradd -m -u 1234 other && echo tool > /usr/local/bin/tool && chown user: /usr/local/bin/tool",
        )
        .await;
    world.run(project, "sudo -n sh -c 'echo root > /root/made' && echo mine > ~/mine").await;

    let upper = spec.volume.join("system").join(world::IMAGE.to_string()).join("upper");
    let owner = |path: &std::path::Path| {
        let about = std::fs::symlink_metadata(path).unwrap();
        (about.uid(), about.gid())
    };
    assert_eq!(owner(&upper.join("usr/local/bin/tool")), (1000, 1000));
    assert_eq!(owner(&upper.join("root/made")), (0, 0));
    assert_eq!(owner(&upper.join("home/other")), (1234, 1234));
    assert_eq!(owner(&spec.volume.join("home/mine")), (1000, 1000));
    assert!(!upper.join("dev/cocalc-init").exists(), "the helper leaves no trace");
    assert!(!world.volume.root.join("image/root/made").exists(), "the image is untouched");

    let stopped = world.podman.stop(project, Duration::from_secs(5)).await.unwrap();
    assert_eq!((stopped.state, stopped.reason), (State::Stopped, None));
    assert!(matches!(world.podman.dial(project, 80).await, Err(Error::NotRunning { .. })));
    let again = world.podman.start(&spec).await.unwrap();
    assert_eq!(again.state, State::Running);
    assert!(again.started >= stopped.started);
    assert_eq!(world.run(project, "cat /usr/local/bin/tool ~/mine; id -u other").await, "tool\nmine\n1234\n");
    let (exit, _) = world.run_as(project, None, "exit 7").await;
    assert_eq!(exit, Exit::Code(7));
}
