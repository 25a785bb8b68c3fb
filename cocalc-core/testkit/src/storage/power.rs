//! The promise that what was acknowledged survives a loss of power.

use cocalc_core::{
    ids::{ProjectId, TreePath},
    storage::{CloneOptions, CopyOptions, Place, SendOptions, VolumeOptions},
};

use super::{Harness, Host, Tree, promises::name};

const MIB: u64 = 1 << 20;
/// What was received looks whole long before it is: of this many files some
/// would be empty.
const FILES: usize = 2000;

/// All that the first host's store shows of some projects.
async fn seen(h: &dyn Harness, projects: &[ProjectId]) -> Vec<(String, Tree)> {
    let store = h.store(Host::First);
    let mut seen = Vec::new();
    let listed = store.list().await.unwrap();
    for (number, project) in projects.iter().enumerate() {
        if listed.iter().any(|volume| volume.project == *project) {
            let limit = store.usage(*project).await.unwrap().limit_bytes;
            let files = h.live(Host::First, *project).await.unwrap();
            seen.push((format!("{number} is live, with limit {limit:?}"), files));
        }
        for snapshot in store.snapshots(*project).await.unwrap() {
            let files = h.frozen(Host::First, *project, &snapshot.name).await.unwrap();
            seen.push((format!("{number} has {} of {}", snapshot.name, snapshot.origin), files));
        }
    }
    seen
}

/// Panics with what is missing, more or other.
fn same(step: usize, got: &[(String, Tree)], expected: &[(String, Tree)]) {
    let names = |seen: &[(String, Tree)]| seen.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(got), names(expected), "after step {step}");
    for ((name, got), (_, expected)) in got.iter().zip(expected) {
        let all = expected.keys().chain(got.keys());
        let mut other = all.filter(|path| got.get(*path) != expected.get(*path));
        if let Some(path) = other.next() {
            let size = |files: &Tree| files.get(path).map(Vec::len);
            panic!("after step {step}: {name}: {path}: {:?} bytes, not {:?}", size(got), size(expected));
        }
    }
}

pub(super) async fn cut(h: &dyn Harness) {
    let (store, source) = (h.store(Host::First), h.store(Host::Second));
    let ids = [(); 5].map(|()| ProjectId::random());
    let [p, q, clone, shared, doomed] = ids;
    let copies = CopyOptions { same_owner: true, ..CopyOptions::default() };
    let path = |text: &str| -> TreePath { text.parse().unwrap() };
    source.create(q, &VolumeOptions::default()).await.unwrap();
    for number in 0..FILES {
        let content = number.to_string().repeat(100);
        h.write(Host::Second, q, &format!("home/{number}"), content.as_bytes()).await.unwrap();
    }
    source.snapshot(q, &name("arrived")).await.unwrap();
    h.write(Host::Second, q, "home/0", b"changed").await.unwrap();
    source.snapshot(q, &name("later")).await.unwrap();
    store.create(doomed, &VolumeOptions::default()).await.unwrap();
    store.snapshot(doomed, &name("s")).await.unwrap();

    for step in 0..15 {
        match step {
            0 => drop(store.create(p, &VolumeOptions { limit_bytes: Some(600 * MIB) }).await.unwrap()),
            1 => {
                for number in 0..300 {
                    h.write(Host::First, p, &format!("home/{number}"), &[7; 5000]).await.unwrap();
                }
                store.snapshot(p, &name("one")).await.unwrap();
            }
            2 => {
                h.write(Host::First, p, "home/big", &vec![8; 8_000_000]).await.unwrap();
                store.snapshot(p, &name("two")).await.unwrap();
            }
            3 => drop(store.restore(p, &name("one"), &name("former")).await.unwrap()),
            4 => {
                let from = Place::frozen(p, name("two"), path("home"));
                let _copied = store.copy(&from, &Place::live(p, path("home/copy")), &copies).await;
            }
            5 => drop(store.clone_volume(p, &name("two"), clone, &CloneOptions::default()).await.unwrap()),
            6 => {
                let options = CloneOptions { same_owner: true, ..CloneOptions::default() };
                drop(store.clone_volume(p, &name("two"), shared, &options).await.unwrap());
            }
            7 => {
                let sent = source.send(q, &name("arrived"), &SendOptions::whole()).await.unwrap();
                drop(store.receive(&sent.header, sent.reader).await.unwrap());
            }
            8 => {
                let options = SendOptions::since(Some(&name("arrived")));
                let sent = source.send(q, &name("later"), &options).await.unwrap();
                drop(store.receive(&sent.header, sent.reader).await.unwrap());
            }
            9 => drop(store.restore(q, &name("later"), &name("former")).await.unwrap()),
            10 => drop(store.set_aside(q, &name("aside")).await.unwrap()),
            // Where there are no limits it is refused.
            11 => drop(store.set_limit(p, Some(700 * MIB)).await),
            12 if h.has_files() => {
                let place = store.stage(q, &name("staged")).await.unwrap();
                for number in 0..FILES {
                    std::fs::write(place.path().join(number.to_string()), number.to_string().repeat(100))
                        .unwrap();
                }
                drop(place.publish().await.unwrap());
            }
            12 => {}
            13 => store.delete_snapshot(p, &name("two")).await.unwrap(),
            _ => store.delete(doomed).await.unwrap(),
        }
        let up = h.cut_power().await;
        let up = up.unwrap_or_else(|error| panic!("after step {step} it does not come up: {error}"));
        same(step, &seen(&*up, &ids).await, &seen(h, &ids).await);
    }
    for host in [Host::First, Host::Second] {
        for project in ids {
            h.store(host).delete(project).await.unwrap();
        }
    }
}
