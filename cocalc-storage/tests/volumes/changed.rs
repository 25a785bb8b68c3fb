//! Whether a live volume has changed since a snapshot of it.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    path::Path,
    process::Command,
};

use cocalc_core::{
    ids::ProjectId,
    storage::{CloneOptions, Error, SendOptions, Storage, VolumeOptions},
};

use crate::stores::{self, name};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_was_written_is_missed_and_nothing_else_is_seen() {
    let one = stores::one().await;
    let store = &one.store;
    let project = ProjectId::random();
    let live = store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
    let home = live.join("home");
    // Written without copying on write, where no new extent tells of it.
    fs::write(home.join("in-place"), "").unwrap();
    assert!(Command::new("chattr").arg("+C").arg(home.join("in-place")).status().unwrap().success());
    fs::write(home.join("in-place"), vec![1; 1 << 16]).unwrap();
    fs::write(home.join("f"), vec![1; 1 << 16]).unwrap();

    type Write = fn(&Path);
    let writes: [(&str, Write); 9] = [
        ("a byte in place", |home| {
            let file = OpenOptions::new().write(true).open(home.join("f")).unwrap();
            file.write_all_at(b"x", 7).unwrap();
        }),
        ("a byte where nothing is copied on write", |home| {
            let file = OpenOptions::new().write(true).open(home.join("in-place")).unwrap();
            file.write_all_at(b"x", 7).unwrap();
        }),
        ("the same again", |home| {
            let file = OpenOptions::new().write(true).open(home.join("in-place")).unwrap();
            file.write_all_at(b"y", 7).unwrap();
        }),
        ("a new file", |home| fs::write(home.join("new"), "").unwrap()),
        ("a mode", |home| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(home.join("f"), mode).unwrap();
        }),
        ("a name", |home| fs::rename(home.join("new"), home.join("newer")).unwrap()),
        ("a link", |home| fs::hard_link(home.join("f"), home.join("linked")).unwrap()),
        ("an attribute", |home| {
            rustix::fs::setxattr(home.join("f"), "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap();
        }),
        ("a removal", |home| fs::remove_file(home.join("newer")).unwrap()),
    ];
    for (number, (what, write)) in writes.into_iter().enumerate() {
        let taken = name(&format!("s{number}"));
        store.snapshot(project, &taken).await.unwrap();
        assert!(!store.changed_since(project, &taken).await.unwrap(), "nothing before {what}");
        // Other projects, reading and measuring are no changes.
        let other = ProjectId::random();
        store.create(other, &VolumeOptions::default()).await.unwrap();
        fs::read(home.join("f")).unwrap();
        store.set_limit(project, Some(500 << 20)).await.unwrap();
        assert!(!store.changed_since(project, &taken).await.unwrap(), "still nothing before {what}");
        write(&home);
        assert!(store.changed_since(project, &taken).await.unwrap(), "{what}");
        assert!(store.changed_since(project, &taken).await.unwrap(), "{what}, asked again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_relatives_are_compared() {
    let one = stores::one().await;
    let store = &one.store;
    let (project, clone, options) = (ProjectId::random(), ProjectId::random(), VolumeOptions::default());
    let live = store.create(project, &options).await.unwrap().path.unwrap();
    fs::write(live.join("home/f"), "1").unwrap();
    store.snapshot(project, &name("a")).await.unwrap();
    fs::write(live.join("home/f"), "2").unwrap();
    store.snapshot(project, &name("b")).await.unwrap();
    assert!(store.changed_since(project, &name("a")).await.unwrap());
    assert!(!store.changed_since(project, &name("b")).await.unwrap());

    store.restore(project, &name("a"), &name("former")).await.unwrap();
    assert!(!store.changed_since(project, &name("a")).await.unwrap(), "it was just restored");
    assert!(store.changed_since(project, &name("b")).await.unwrap(), "another state");
    assert!(store.changed_since(project, &name("former")).await.unwrap(), "what it was before");
    fs::write(live.join("home/f"), "3").unwrap();
    assert!(store.changed_since(project, &name("a")).await.unwrap(), "it was written since");

    let same_owner = CloneOptions { same_owner: true, ..CloneOptions::default() };
    store.clone_volume(project, &name("a"), clone, &same_owner).await.unwrap();
    store.snapshot(clone, &name("a")).await.unwrap();
    assert!(!store.changed_since(clone, &name("a")).await.unwrap());
    assert!(store.changed_since(project, &name("a")).await.unwrap(), "a clone is another volume");

    let sent = store.send(project, &name("b"), &SendOptions::whole()).await.unwrap();
    let header = cocalc_core::storage::SendHeader { project: ProjectId::random(), ..sent.header };
    store.receive(&header, sent.reader).await.unwrap();
    let came = store.restore(header.project, &name("b"), &name("x")).await.unwrap().path.unwrap();
    assert!(!store.changed_since(header.project, &name("b")).await.unwrap(), "it has just come");
    fs::write(came.join("home/f"), "4").unwrap();
    assert!(store.changed_since(header.project, &name("b")).await.unwrap());

    let missing = store.changed_since(project, &name("none")).await;
    assert!(matches!(missing, Err(Error::NoSnapshot { .. })), "{missing:?}");
    store.set_aside(project, &name("aside")).await.unwrap();
    let missing = store.changed_since(project, &name("aside")).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_may_ask_at_once() {
    let one = stores::one().await;
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..24 {
        let project = ProjectId::random();
        let live = one.store.create(project, &VolumeOptions::default()).await.unwrap().path.unwrap();
        one.store.snapshot(project, &name("s")).await.unwrap();
        let store = one.store.clone();
        asked.spawn(async move {
            let written = number % 2 == 0;
            if written {
                fs::write(live.join("home/f"), "x").unwrap();
            }
            assert_eq!(store.changed_since(project, &name("s")).await.unwrap(), written, "{number}");
        });
    }
    while let Some(joined) = asked.join_next().await {
        joined.unwrap();
    }
}
