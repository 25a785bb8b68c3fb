//! Btrfs on loopback volumes. Needs root, btrfs-progs and loop devices.
use cocalc_core::{
    ids::ProjectId,
    storage::{Storage, VolumeOptions},
};
use cocalc_storage::{Btrfs, loopback::Loopback};

#[tokio::test(flavor = "multi_thread")]
async fn smoke() {
    let dir = tempfile::tempdir().unwrap();
    let a = Loopback::create(&dir.path().join("a.img"), 1 << 30, &dir.path().join("a")).unwrap();
    let b = Loopback::create(&dir.path().join("b.img"), 1 << 30, &dir.path().join("b")).unwrap();
    Btrfs::initialize(a.path()).unwrap();
    Btrfs::initialize(b.path()).unwrap();
    let x = Btrfs::open(a.path()).await.unwrap();
    let y = Btrfs::open(b.path()).await.unwrap();
    println!("{:?}", x.capabilities());
    let p = ProjectId::random();
    let v = x.create(p, &VolumeOptions { limit_bytes: Some(50 << 20) }).await.unwrap();
    println!("{v:?}");
    std::fs::write(v.path.as_ref().unwrap().join("home/f"), vec![7; 1 << 20]).unwrap();
    let one = "one".parse().unwrap();
    println!("{:?}", x.snapshot(p, &one).await.unwrap());
    println!("{:?}", x.usage(p).await);
    let s = x.send(p, &one, None).await.unwrap();
    println!("{:?}", y.receive(&s.header, s.reader).await.unwrap());
    let two = "two".parse().unwrap();
    std::fs::write(v.path.as_ref().unwrap().join("home/g"), vec![8; 1 << 20]).unwrap();
    x.snapshot(p, &two).await.unwrap();
    let s = x.send(p, &two, Some(&one)).await.unwrap();
    println!("{:?}", y.receive(&s.header, s.reader).await.unwrap());
    let v = y.restore(p, &two, &"former".parse().unwrap()).await.unwrap();
    assert!(std::fs::read(v.path.as_ref().unwrap().join("home/g")).unwrap().len() == 1 << 20);
    let q = ProjectId::random();
    let c = y.clone_volume(p, &two, q, &VolumeOptions::default()).await.unwrap();
    println!("{c:?} {:?}", y.usage(q).await);
    y.restore(p, &one, &"former2".parse().unwrap()).await.unwrap();
    println!("{:?}", x.set_aside(p, &"kept".parse().unwrap()).await.unwrap());
    println!("{:?}", y.snapshots(p).await.unwrap());
    y.delete(p).await.unwrap();
    println!("{:?}", y.list().await.unwrap());
    std::process::Command::new("ls")
        .args([
            "-la",
            b.path().join("staging").to_str().unwrap(),
            b.path().join("trash").to_str().unwrap(),
            b.path().join("snapshots").to_str().unwrap(),
        ])
        .status()
        .unwrap();
}
