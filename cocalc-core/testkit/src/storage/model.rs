//! Random operations on a backend and on the in-memory model, compared.

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    storage::{CloneOptions, Error, SendOptions, VolumeOptions},
};
use proptest::{collection::vec, prelude::*};

use super::{Harness, Host, MemoryHarness, promises::name};

const PROJECTS: usize = 2;
const NAMES: usize = 4;

/// One operation, with small numbers for the project, the snapshot's name and
/// the file, so that they often meet.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each is the call of that name")]
pub enum Op {
    Create { host: Host, project: usize },
    Delete { host: Host, project: usize },
    Write { host: Host, project: usize, file: usize, content: u8 },
    Remove { host: Host, project: usize, file: usize },
    Snapshot { host: Host, project: usize, name: usize },
    DeleteSnapshot { host: Host, project: usize, name: usize },
    Restore { host: Host, project: usize, name: usize, former: usize },
    SetAside { host: Host, project: usize, name: usize },
    Clone { host: Host, source: usize, name: usize, target: usize },
    Transfer { from: Host, project: usize, name: usize, base: Option<usize> },
}

/// Scripts of up to `length` operations.
pub fn scripts(length: usize) -> impl Strategy<Value = Vec<Op>> {
    let host = || prop_oneof![3 => Just(Host::First), 1 => Just(Host::Second)];
    let project = || 0..PROJECTS;
    let name = || 0..NAMES;
    let op = prop_oneof![
        3 => (host(), project()).prop_map(|(host, project)| Op::Create { host, project }),
        1 => (host(), project()).prop_map(|(host, project)| Op::Delete { host, project }),
        5 => (host(), project(), 0..3_usize, any::<u8>())
            .prop_map(|(host, project, file, content)| Op::Write { host, project, file, content }),
        1 => (host(), project(), 0..3_usize).prop_map(|(host, project, file)| Op::Remove { host, project, file }),
        4 => (host(), project(), name()).prop_map(|(host, project, name)| Op::Snapshot { host, project, name }),
        1 => (host(), project(), name()).prop_map(|(host, project, name)| Op::DeleteSnapshot { host, project, name }),
        2 => (host(), project(), name(), name())
            .prop_map(|(host, project, name, former)| Op::Restore { host, project, name, former }),
        1 => (host(), project(), name()).prop_map(|(host, project, name)| Op::SetAside { host, project, name }),
        1 => (host(), project(), name(), project())
            .prop_map(|(host, source, name, target)| Op::Clone { host, source, name, target }),
        4 => (host(), project(), name(), proptest::option::of(name()))
            .prop_map(|(from, project, name, base)| Op::Transfer { from, project, name, base }),
    ];
    vec(op, 1..length.max(2))
}

/// What matters of an outcome to a caller.
fn outcome<T>(result: &Result<T, Error>) -> &'static str {
    match result {
        Ok(_) => "done",
        Err(Error::NotFound { .. }) => "not found",
        Err(Error::NoSnapshot { .. }) => "no snapshot",
        Err(Error::AlreadyExists { .. }) => "already exists",
        Err(Error::BadStream { .. }) => "bad stream",
        Err(Error::NoSpace { .. }) => "no space",
        Err(Error::Unsupported { .. }) => "unsupported",
        Err(_) => "failed",
    }
}

/// Runs a script on fresh projects of `harness` and on the model, and panics
/// where they differ. Deletes what it made.
pub async fn agrees_with_model(harness: &dyn Harness, script: &[Op]) {
    let model = MemoryHarness::new();
    let projects: [ProjectId; PROJECTS] = std::array::from_fn(|_| ProjectId::random());
    for (step, op) in script.iter().enumerate() {
        let (real, expected) = (apply(harness, &projects, op).await, apply(&model, &projects, op).await);
        assert_eq!(real, expected, "step {step}, {op:?}, of {script:?}");
        for host in [Host::First, Host::Second] {
            let (real, expected) =
                (state(harness, host, &projects).await, state(&model, host, &projects).await);
            assert_eq!(real, expected, "on {host:?} after step {step}, {op:?}, of {script:?}");
        }
    }
    for host in [Host::First, Host::Second] {
        for project in projects {
            harness.store(host).delete(project).await.unwrap();
        }
    }
}

async fn apply(h: &dyn Harness, projects: &[ProjectId; PROJECTS], op: &Op) -> &'static str {
    let n = |number: usize| name(&format!("n{number}"));
    let file = |number: usize| format!("home/f{number}");
    let options = VolumeOptions::default();
    match *op {
        Op::Create { host, project } => outcome(&h.store(host).create(projects[project], &options).await),
        Op::Delete { host, project } => outcome(&h.store(host).delete(projects[project]).await),
        Op::Write { host, project, file: number, content } => {
            // The length varies too, across what a file system stores inline.
            let content = vec![content; usize::from(content) * 40];
            match h.write(host, projects[project], &file(number), &content).await {
                Ok(()) => "done",
                Err(_) => "failed",
            }
        }
        Op::Remove { host, project, file: number } => {
            match h.remove(host, projects[project], &file(number)).await {
                Ok(()) => "done",
                Err(_) => "failed",
            }
        }
        Op::Snapshot { host, project, name } => {
            outcome(&h.store(host).snapshot(projects[project], &n(name)).await)
        }
        Op::DeleteSnapshot { host, project, name } => {
            outcome(&h.store(host).delete_snapshot(projects[project], &n(name)).await)
        }
        Op::Restore { host, project, name, former } => {
            outcome(&h.store(host).restore(projects[project], &n(name), &n(former)).await)
        }
        Op::SetAside { host, project, name } => {
            outcome(&h.store(host).set_aside(projects[project], &n(name)).await)
        }
        Op::Clone { host, source, name, target } => outcome(
            &h.store(host)
                .clone_volume(projects[source], &n(name), projects[target], &CloneOptions::default())
                .await,
        ),
        Op::Transfer { from, project, name, base } => {
            let base: Option<SnapshotName> = base.map(n);
            match h.store(from).send(projects[project], &n(name), &SendOptions::since(base.as_ref())).await {
                Ok(sent) => outcome(&h.store(from.other()).receive(&sent.header, sent.reader).await),
                Err(error) => outcome::<()>(&Err(error)),
            }
        }
    }
}

/// All that can be seen of the projects on a host.
async fn state(h: &dyn Harness, host: Host, projects: &[ProjectId; PROJECTS]) -> Vec<String> {
    let store = h.store(host);
    let mut seen = Vec::new();
    for volume in store.list().await.unwrap() {
        if let Some(number) = projects.iter().position(|project| *project == volume.project) {
            seen.push(format!("{number} live: {:?}", h.live(host, volume.project).await.unwrap()));
        }
    }
    // The order of random ids is not the order of the numbers.
    seen.sort();
    for (number, project) in projects.iter().enumerate() {
        for snapshot in store.snapshots(*project).await.unwrap() {
            let files = h.frozen(host, *project, &snapshot.name).await.unwrap();
            seen.push(format!("{number} {}: {files:?}", snapshot.name));
        }
    }
    seen
}
