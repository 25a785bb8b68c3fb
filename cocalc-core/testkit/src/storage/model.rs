//! Random operations on a backend, compared with what must come of them.

use std::{collections::BTreeMap, io::Cursor};

use cocalc_core::{
    ids::{ProjectId, SnapshotName, TreePath, VolumeUuid},
    storage::{
        ChangeKind, CloneOptions, CopyOptions, Error, Hold, Place, SendHeader, SendOptions, Storage,
        VolumeOptions,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use super::{
    Harness, Host, Tree,
    promises::name,
    truth::{End, Line, Reasons, Truth},
};

const PROJECTS: usize = 2;
const NAMES: usize = 4;
/// What a project writes.
const FILES: [&str; 4] = ["home/f0", "home/f1", "home/d/f2", "home/d/e/f3"];
/// What is copied, and where to. Some are files at times and directories at
/// others.
const PLACES: [&str; 8] = ["home/f0", "home/d", "home/d/f2", "home/d/e", "home/x", "home/x/y", "home", ""];
/// How many streams are kept, to be received later.
const STREAMS: usize = 3;
/// The unit of limits: more than a script writes.
const LIMIT_UNIT: u64 = 64 << 20;

/// One operation, with small numbers for the project, the snapshot's name and
/// the file, so that they often meet.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "each is the call of that name")]
pub enum Op {
    Create { host: Host, project: usize, limit: Option<u8> },
    Delete { host: Host, project: usize },
    Write { host: Host, project: usize, file: usize, content: u8 },
    Remove { host: Host, project: usize, file: usize },
    Snapshot { host: Host, project: usize, name: usize },
    DeleteSnapshot { host: Host, project: usize, name: usize },
    Restore { host: Host, project: usize, name: usize, former: usize },
    SetAside { host: Host, project: usize, name: usize },
    Clone { host: Host, source: usize, name: usize, target: usize, same_owner: bool, limit: Option<u8> },
    SetLimit { host: Host, project: usize, limit: Option<u8> },
    Hold { host: Host, project: usize, name: usize },
    Release { hold: usize },
    ChangedSince { host: Host, project: usize, name: usize },
    Footprint { host: Host, project: usize, snapshot: Option<usize> },
    Diff { host: Host, project: usize, from: usize, to: Option<usize>, page: usize },
    Copy { host: Host, from: Spot, to: Spot, replace: bool, same_owner: bool },
    Transfer { from: Host, project: usize, name: usize, base: Option<usize> },
    Send { host: Host, project: usize, name: usize, base: Option<usize> },
    Receive { host: Host, stream: usize, cut: Option<u8> },
}

/// A [`Place`], by small numbers.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "as in a place")]
pub struct Spot {
    pub project: usize,
    pub snapshot: Option<usize>,
    pub path: usize,
}

impl Spot {
    fn end(&self) -> End<'static> {
        End { project: self.project, snapshot: self.snapshot, path: PLACES[self.path] }
    }

    fn place(&self, projects: &[ProjectId; PROJECTS]) -> Place {
        Place {
            project: projects[self.project],
            snapshot: self.snapshot.map(numbered),
            path: PLACES[self.path].parse().unwrap(),
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    use proptest::option::{of, weighted};
    let host = || prop_oneof![3 => Just(Host::First), 1 => Just(Host::Second)];
    let project = || 0..PROJECTS;
    let name = || 0..NAMES;
    let limit = || weighted(0.3, 0..4_u8);
    let spot =
        |frozen| {
            (project(), weighted(frozen, name()), 0..PLACES.len())
                .prop_map(|(project, snapshot, path)| Spot { project, snapshot, path })
        };
    prop_oneof![
        3 => (host(), project(), limit()).prop_map(|(host, project, limit)| Op::Create { host, project, limit }),
        1 => (host(), project()).prop_map(|(host, project)| Op::Delete { host, project }),
        6 => (host(), project(), 0..FILES.len(), any::<u8>())
            .prop_map(|(host, project, file, content)| Op::Write { host, project, file, content }),
        1 => (host(), project(), 0..FILES.len())
            .prop_map(|(host, project, file)| Op::Remove { host, project, file }),
        4 => (host(), project(), name()).prop_map(|(host, project, name)| Op::Snapshot { host, project, name }),
        2 => (host(), project(), name())
            .prop_map(|(host, project, name)| Op::DeleteSnapshot { host, project, name }),
        2 => (host(), project(), name(), name())
            .prop_map(|(host, project, name, former)| Op::Restore { host, project, name, former }),
        1 => (host(), project(), name()).prop_map(|(host, project, name)| Op::SetAside { host, project, name }),
        1 => (host(), project(), name(), project(), any::<bool>(), limit()).prop_map(
            |(host, source, name, target, same_owner, limit)| {
                Op::Clone { host, source, name, target, same_owner, limit }
            }
        ),
        1 => (host(), project(), limit()).prop_map(|(host, project, limit)| Op::SetLimit { host, project, limit }),
        2 => (host(), project(), name()).prop_map(|(host, project, name)| Op::Hold { host, project, name }),
        2 => (0..8_usize).prop_map(|hold| Op::Release { hold }),
        2 => (host(), project(), name())
            .prop_map(|(host, project, name)| Op::ChangedSince { host, project, name }),
        1 => (host(), project(), of(name()))
            .prop_map(|(host, project, snapshot)| Op::Footprint { host, project, snapshot }),
        3 => (host(), project(), name(), of(name()), 1..4_usize)
            .prop_map(|(host, project, from, to, page)| Op::Diff { host, project, from, to, page }),
        5 => (host(), spot(0.3), spot(0.05), any::<bool>(), any::<bool>())
            .prop_map(|(host, from, to, replace, same_owner)| Op::Copy { host, from, to, replace, same_owner }),
        3 => (host(), project(), name(), of(name()))
            .prop_map(|(from, project, name, base)| Op::Transfer { from, project, name, base }),
        2 => (host(), project(), name(), of(name()))
            .prop_map(|(host, project, name, base)| Op::Send { host, project, name, base }),
        2 => (host(), 0..STREAMS, weighted(0.3, any::<u8>()))
            .prop_map(|(host, stream, cut)| Op::Receive { host, stream, cut }),
    ]
}

/// Scripts of up to `length` operations.
pub fn scripts(length: usize) -> impl Strategy<Value = Vec<Op>> {
    vec(op(), 1..length.max(2))
}

/// Scripts that once showed a difference, and some that are long, each with
/// what it is. Whoever finds another adds what the failure printed to
/// `regressions.txt`.
///
/// # Panics
///
/// If one of them cannot be read.
pub fn regressions() -> Vec<(String, Vec<Op>)> {
    let mut found = Vec::new();
    let mut about = String::new();
    for line in include_str!("regressions.txt").lines() {
        if let Some(text) = line.strip_prefix('#') {
            about = text.trim().to_owned();
        } else if let Some(numbers) = line.strip_prefix("seed ") {
            let (seed, length) = numbers.split_once(' ').expect("a seed and a length");
            found.push((about.clone(), long(seed.parse().unwrap(), length.parse().unwrap())));
        } else if !line.trim().is_empty() {
            let script = serde_json::from_str(line);
            found.push((about.clone(), script.unwrap_or_else(|error| panic!("{error}: {line}"))));
        }
    }
    found
}

/// A script of `length` operations, always the same for a seed as long as the
/// operations are.
fn long(seed: u64, length: usize) -> Vec<Op> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
    vec(op(), length).new_tree(&mut runner).expect("nothing is filtered").current()
}

/// What matters of an outcome to a caller.
fn outcome<T>(result: Result<T, Error>) -> Result<T, &'static str> {
    result.map_err(|error| match error {
        Error::NotFound { .. } => "not found",
        Error::NoSnapshot { .. } => "no snapshot",
        Error::AlreadyExists { .. } => "already exists",
        Error::BadStream { .. } => "bad stream",
        Error::NoSpace { .. } => "no space",
        Error::InUse { .. } => "in use",
        Error::Path { .. } => "path",
        Error::Unsupported { .. } => "unsupported",
        error => panic!("{}", cocalc_core::chain(&error)),
    })
}

fn numbered(number: usize) -> SnapshotName {
    name(&format!("n{number}"))
}

fn content(content: u8) -> Vec<u8> {
    // The length varies too, across what a file system stores inline.
    vec![content; usize::from(content) * 40]
}

fn bytes(limit: Option<u8>) -> Option<u64> {
    limit.map(|units| LIMIT_UNIT * (1 + u64::from(units)))
}

/// Runs a script on fresh projects of `harness`, and panics where a call
/// answers, or leaves, something else than the contract says. Deletes what it
/// made.
pub async fn agrees_with_model(harness: &dyn Harness, script: &[Op]) {
    let mut run = Run {
        harness,
        projects: std::array::from_fn(|_| ProjectId::random()),
        truth: Truth::default(),
        holds: Vec::new(),
        streams: Vec::new(),
        known: Known::default(),
    };
    for (step, op) in script.iter().enumerate() {
        let told = run.step(op).await;
        let wrong = match told {
            Ok(()) => run.compare().await,
            wrong => wrong,
        };
        if let Err(wrong) = wrong {
            let script = serde_json::to_string(&script[..=step]).unwrap();
            panic!("step {step}, {op:?}: {wrong}\nthe script: {script}");
        }
    }
    drop(run.holds);
    for host in [Host::First, Host::Second] {
        for project in run.projects {
            harness.store(host).delete(project).await.unwrap();
        }
    }
}

/// The ids of the backend that were seen, each for one of the truth's.
#[derive(Default)]
struct Known {
    by_number: BTreeMap<(&'static str, u64), VolumeUuid>,
    by_uuid: BTreeMap<(&'static str, VolumeUuid), u64>,
}

impl Known {
    /// Says what is wrong if either was seen with another.
    fn same(&mut self, what: &'static str, number: u64, uuid: VolumeUuid) -> Result<(), String> {
        let seen = *self.by_number.entry((what, number)).or_insert(uuid);
        let was = *self.by_uuid.entry((what, uuid)).or_insert(number);
        if seen != uuid {
            return Err(format!("the {what} has changed, from {seen} to {uuid}"));
        }
        if was != number {
            return Err(format!("two have the same {what}, {uuid}"));
        }
        Ok(())
    }
}

struct Run<'a> {
    harness: &'a dyn Harness,
    projects: [ProjectId; PROJECTS],
    truth: Truth,
    holds: Vec<Hold>,
    streams: Vec<(SendHeader, Vec<u8>)>,
    known: Known,
}

/// What was to be said, and what was.
fn agree<T, U>(expected: &Result<T, Reasons>, got: &Result<U, &'static str>) -> Result<(), String> {
    match (expected, got) {
        (Ok(_), Ok(_)) => Ok(()),
        (Err(reasons), Err(why)) if reasons.contains(why) => Ok(()),
        (Ok(_), Err(why)) => Err(format!("refused, {why:?}, and nothing is in the way")),
        (Err(reasons), Ok(_)) => Err(format!("done, and it must be refused: {reasons:?}")),
        (Err(reasons), Err(why)) => Err(format!("refused, {why:?}, which must be one of {reasons:?}")),
    }
}

impl Run<'_> {
    /// Does one thing on both sides.
    async fn step(&mut self, op: &Op) -> Result<(), String> {
        let projects = self.projects;
        let store = |host| self.harness.store(host);
        match *op {
            Op::Create { host, project, limit } => {
                let options = VolumeOptions { limit_bytes: bytes(limit) };
                let got = outcome(store(host).create(projects[project], &options).await);
                agree(&self.truth.create(host, project, bytes(limit)), &got)
            }
            Op::Delete { host, project } => {
                let got = outcome(store(host).delete(projects[project]).await);
                agree(&self.truth.delete(host, project), &got)
            }
            Op::Write { host, project, file, content: byte } => {
                let (file, content) = (FILES[file], content(byte));
                let got = self.harness.write(host, projects[project], file, &content).await.is_ok();
                let expected = self.truth.write(host, project, file, &content);
                if got == expected { Ok(()) } else { Err(format!("written: {got}, not {expected}")) }
            }
            Op::Remove { host, project, file } => {
                let got = self.harness.remove(host, projects[project], FILES[file]).await.is_ok();
                let expected = self.truth.remove(host, project, FILES[file]);
                if got == expected { Ok(()) } else { Err(format!("removed: {got}, not {expected}")) }
            }
            Op::Snapshot { host, project, name } => {
                let got = outcome(store(host).snapshot(projects[project], &numbered(name)).await);
                agree(&self.truth.snapshot(host, project, name), &got)
            }
            Op::DeleteSnapshot { host, project, name } => {
                let got = outcome(store(host).delete_snapshot(projects[project], &numbered(name)).await);
                agree(&self.truth.delete_snapshot(host, project, name), &got)
            }
            Op::Restore { host, project, name, former } => {
                let got = store(host).restore(projects[project], &numbered(name), &numbered(former)).await;
                agree(&self.truth.restore(host, project, name, former), &outcome(got))
            }
            Op::SetAside { host, project, name } => {
                let got = outcome(store(host).set_aside(projects[project], &numbered(name)).await);
                agree(&self.truth.set_aside(host, project, name), &got)
            }
            Op::Clone { host, source, name, target, same_owner, limit } => {
                let volume = VolumeOptions { limit_bytes: bytes(limit) };
                let options = CloneOptions { volume, same_owner };
                let (from, to) = (projects[source], projects[target]);
                let got = outcome(store(host).clone_volume(from, &numbered(name), to, &options).await);
                agree(&self.truth.clone_volume(host, source, name, target, bytes(limit)), &got)
            }
            Op::SetLimit { host, project, limit } => {
                let store = store(host);
                let got = outcome(store.set_limit(projects[project], bytes(limit)).await);
                if !store.capabilities().quotas {
                    return if got == Err("unsupported") { Ok(()) } else { Err(format!("{got:?}")) };
                }
                agree(&self.truth.set_limit(host, project, bytes(limit)), &got)
            }
            Op::Hold { host, project, name } => {
                let got = outcome(store(host).hold(projects[project], &numbered(name)).await);
                agree(&self.truth.hold(host, project, name), &got)?;
                self.holds.extend(got);
                Ok(())
            }
            Op::Release { hold } => {
                if let Some(at) = self.truth.release(hold) {
                    drop(self.holds.remove(at));
                }
                Ok(())
            }
            Op::ChangedSince { host, project, name } => {
                let store = store(host);
                let got = outcome(store.changed_since(projects[project], &numbered(name)).await);
                let expected = self.truth.changed_since(host, project, name);
                agree(&expected, &got)?;
                match (expected, got) {
                    (Ok(Some(true)), Ok(false)) => Err("a change was not noticed".to_owned()),
                    (Ok(Some(false)), Ok(true)) if store.capabilities().detects_no_change => {
                        Err("there is no change".to_owned())
                    }
                    _ => Ok(()),
                }
            }
            Op::Footprint { host, project, snapshot } => {
                let name = snapshot.map(numbered);
                let got = outcome(store(host).footprint(projects[project], name.as_ref()).await);
                if got.is_err_and(|why| why == "unsupported") {
                    return Ok(());
                }
                let expected = self.truth.entries(host, project, snapshot);
                agree(&expected, &got)?;
                match (expected, got) {
                    (Ok(expected), Ok(got)) if got.entries != expected => {
                        Err(format!("{} entries, not {expected}", got.entries))
                    }
                    (_, Ok(got)) if got.exclusive_bytes > got.total_bytes => Err(format!("{got:?}")),
                    _ => Ok(()),
                }
            }
            Op::Diff { host, project, from, to, page } => {
                let expected = self.truth.diff(host, project, from, to);
                let (from, to) = (numbered(from), to.map(numbered));
                let got = pages(&*store(host), projects[project], &from, to.as_ref(), page).await?;
                if got == Err("unsupported") {
                    return Ok(());
                }
                agree(&expected, &got)?;
                match (expected, got) {
                    (Ok(expected), Ok(got)) if expected != got => {
                        Err(format!("told {got:?}, not {expected:?}"))
                    }
                    _ => Ok(()),
                }
            }
            Op::Copy { host, ref from, ref to, replace, same_owner } => {
                let options = CopyOptions { same_owner, replace };
                let places = (from.place(&projects), to.place(&projects));
                let got = outcome(store(host).copy(&places.0, &places.1, &options).await);
                if got.is_err_and(|why| why == "unsupported") {
                    return Ok(());
                }
                let expected = self.truth.copy(host, from.end(), to.end(), replace);
                agree(&expected, &got)?;
                match (expected, got) {
                    (Ok(expected), Ok(got)) if (got.entries, got.bytes) != expected => {
                        Err(format!("copied {got:?}, not {expected:?}"))
                    }
                    (_, Ok(got)) if got.shared_bytes > 0 && from.project != to.project && !same_owner => {
                        Err(format!("another owner's bytes are shared: {got:?}"))
                    }
                    _ => Ok(()),
                }
            }
            Op::Transfer { from, project, name, base } => {
                let options = SendOptions::since(base.map(numbered).as_ref());
                let got = match store(from).send(projects[project], &numbered(name), &options).await {
                    Ok(sent) => outcome(store(from.other()).receive(&sent.header, sent.reader).await),
                    Err(error) => outcome(Err(error)),
                };
                agree(&self.truth.transfer(from, project, name, base), &got)
            }
            Op::Send { host, project, name, base } => {
                let options = SendOptions::since(base.map(numbered).as_ref());
                let got = outcome(store(host).send(projects[project], &numbered(name), &options).await);
                agree(&self.truth.send(host, project, name, base, STREAMS), &got)?;
                let Ok(mut sent) = got else { return Ok(()) };
                let mut stream = Vec::new();
                let read = sent.reader.read_to_end(&mut stream).await;
                read.map_err(|error| format!("the sender failed: {error}"))?;
                if self.streams.len() == STREAMS {
                    self.streams.remove(0);
                }
                self.streams.push((sent.header, stream));
                Ok(())
            }
            Op::Receive { host, stream, cut } => {
                let Some(at) = self.truth.kept(stream) else { return Ok(()) };
                let (header, stream) = &self.streams[at];
                // At least one byte is missing.
                let length =
                    cut.map_or(stream.len(), |cut| stream.len().saturating_sub(1) * usize::from(cut) / 255);
                let reader = Box::pin(Cursor::new(stream[..length].to_vec()));
                let got = outcome(store(host).receive(header, reader).await);
                agree(&self.truth.receive(host, at, cut.is_some()), &got)
            }
        }
    }

    /// Looks at all that can be seen.
    async fn compare(&mut self) -> Result<(), String> {
        for host in [Host::First, Host::Second] {
            let store = self.harness.store(host);
            let mut listed = store.list().await.unwrap();
            listed.retain(|volume| self.projects.contains(&volume.project));
            for number in 0..PROJECTS {
                let project = self.projects[number];
                let wrong = |what: String| format!("project {number} on {host:?}: {what}");
                let truth = self.truth.project(host, number);
                let found: Vec<_> = listed.iter().filter(|volume| volume.project == project).collect();
                let live = truth.and_then(|truth| truth.live.as_ref());
                match (live, &found[..]) {
                    (None, []) => {}
                    (Some(live), [volume]) => {
                        self.known.same("uuid of a volume", live.id, volume.uuid).map_err(wrong)?;
                        let files = self.harness.live(host, project).await.unwrap();
                        same(&files, &live.nodes.files()).map_err(wrong)?;
                    }
                    (live, found) => {
                        return Err(wrong(format!("live: {}, listed: {found:?}", live.is_some())));
                    }
                }
                let snapshots = store.snapshots(project).await.unwrap();
                let names: Vec<_> = snapshots.iter().map(|snapshot| snapshot.name.clone()).collect();
                let frozen = truth.map(|truth| truth.snapshots.as_slice()).unwrap_or_default();
                let expected: Vec<_> = frozen.iter().map(|frozen| numbered(frozen.name)).collect();
                if names != expected {
                    return Err(wrong(format!("the snapshots are {names:?}, not {expected:?}")));
                }
                for (snapshot, frozen) in snapshots.iter().zip(frozen) {
                    let wrong = |what| wrong(format!("snapshot {}: {what}", snapshot.name));
                    self.known.same("uuid of a snapshot", frozen.id, snapshot.uuid).map_err(wrong)?;
                    self.known.same("origin", frozen.origin, snapshot.origin).map_err(wrong)?;
                    let files = self.harness.frozen(host, project, &snapshot.name).await.unwrap();
                    same(&files, &frozen.nodes.files()).map_err(wrong)?;
                }
                let usage = outcome(store.usage(project).await);
                let limit = truth.and_then(|truth| truth.limit).filter(|_| store.capabilities().quotas);
                match (truth, usage) {
                    (None, Err("not found")) => {}
                    (Some(_), Ok(usage)) if usage.limit_bytes == limit => {}
                    // Only what is live can be walked.
                    (Some(_), Err("not found")) if live.is_none() && !store.capabilities().quotas => {}
                    (_, usage) => {
                        let there = truth.is_some();
                        return Err(wrong(format!("there: {there}, limit: {limit:?}; usage: {usage:?}")));
                    }
                }
            }
        }
        Ok(())
    }
}

fn same(files: &Tree, expected: &Tree) -> Result<(), String> {
    fn short(files: &Tree) -> Vec<String> {
        let words = |content: &Vec<u8>| match content.first() {
            Some(first) if content.iter().all(|byte| byte == first) => format!("{} x {first}", content.len()),
            _ => format!("{} bytes", content.len()),
        };
        files.iter().map(|(path, content)| format!("{path}: {}", words(content))).collect()
    }
    if files == expected {
        return Ok(());
    }
    Err(format!("the files are {:?}, not {:?}", short(files), short(expected)))
}

/// A whole difference, page by page. Owners, modes and times are nobody's
/// promise here.
async fn pages(
    store: &dyn Storage,
    project: ProjectId,
    from: &SnapshotName,
    to: Option<&SnapshotName>,
    page: usize,
) -> Result<Result<Vec<Line>, &'static str>, String> {
    let (mut lines, mut after): (Vec<Line>, Option<TreePath>) = (Vec::new(), None);
    loop {
        let got = match outcome(store.diff(project, from, to, after.as_ref(), page).await) {
            Ok(got) => got,
            Err(why) => return Ok(Err(why)),
        };
        if got.changes.len() > page || (got.more && got.changes.len() < page) {
            return Err(format!("a page of {page}: {got:?}"));
        }
        after = got.changes.last().map(|change| change.path.clone());
        let told = got.changes.into_iter().filter(|change| change.kind != ChangeKind::Metadata);
        lines.extend(told.map(|change| (change.path.to_string(), change.kind, change.node, change.bytes)));
        if !got.more {
            return Ok(Ok(lines));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regressions_are_read_and_long_ones_stay_the_same() {
        assert!(regressions().iter().all(|(about, script)| !about.is_empty() && !script.is_empty()));
        assert_eq!(long(7, 50), long(7, 50));
        assert_ne!(long(7, 50), long(8, 50));
        assert_eq!(long(7, 50).len(), 50);
    }

    #[test]
    fn every_operation_has_a_text() {
        for op in long(1, 400) {
            let text = serde_json::to_string(&op).unwrap();
            assert_eq!(serde_json::from_str::<Op>(&text).unwrap(), op, "{text}");
        }
    }
}
