//! What the contract says must come of a script: the simplest thing that
//! could, of which nothing is shared with any backend.

use std::collections::{BTreeMap, BTreeSet};

use cocalc_core::storage::{ChangeKind, NodeKind};

use super::{Host, Tree};

/// Why a call must be refused, in the words of [`super::model`]. Where several
/// are true the contract does not say which is told.
pub(super) type Reasons = BTreeSet<&'static str>;

/// One line of a difference.
pub(super) type Line = (String, ChangeKind, NodeKind, u64);

/// What is at each path; `None` is a directory. The root is not among them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Nodes(BTreeMap<String, Option<Vec<u8>>>);

impl Default for Nodes {
    /// What a new volume has.
    fn default() -> Self {
        Self(["home", "system"].into_iter().map(|path| (path.to_owned(), None)).collect())
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// What is left of `path` below `root`, with its slash; empty for `root`.
fn below<'a>(path: &'a str, root: &str) -> Option<&'a str> {
    if root.is_empty() {
        return Some(path);
    }
    path.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Nodes {
    fn is_directory(&self, path: &str) -> bool {
        path.is_empty() || matches!(self.0.get(path), Some(None))
    }

    fn exists(&self, path: &str) -> bool {
        path.is_empty() || self.0.contains_key(path)
    }

    /// The directories on the way to `path`, outermost first.
    fn way(path: &str) -> impl Iterator<Item = &str> {
        path.match_indices('/').map(|(at, _)| &path[..at])
    }

    /// Whether a file can be written there, with the directories it needs.
    fn write(&mut self, path: &str, content: &[u8]) -> bool {
        let blocked = Self::way(path).any(|on_it| matches!(self.0.get(on_it), Some(Some(_))));
        if blocked || self.is_directory(path) {
            return false;
        }
        for on_it in Self::way(path) {
            self.0.insert(on_it.to_owned(), None);
        }
        self.0.insert(path.to_owned(), Some(content.to_vec()));
        true
    }

    fn remove_file(&mut self, path: &str) -> bool {
        let is_file = matches!(self.0.get(path), Some(Some(_)));
        if is_file {
            self.0.remove(path);
        }
        is_file
    }

    /// `root` and what is below it, by the rest of the path.
    fn part(&self, root: &str) -> BTreeMap<String, Option<Vec<u8>>> {
        let mut part: BTreeMap<_, _> = self
            .0
            .iter()
            .filter_map(|(path, node)| Some((below(path, root)?.to_owned(), node.clone())))
            .collect();
        if root.is_empty() {
            part = part.into_iter().map(|(path, node)| (format!("/{path}"), node)).collect();
            part.insert(String::new(), None);
        }
        part
    }

    fn replace(&mut self, root: &str, part: BTreeMap<String, Option<Vec<u8>>>) {
        self.0.retain(|path, _| below(path, root).is_none());
        self.0.extend(part.into_iter().map(|(rest, node)| (format!("{root}{rest}"), node)));
    }

    pub(super) fn files(&self) -> Tree {
        self.0.iter().filter_map(|(path, node)| Some((path.clone(), node.clone()?))).collect()
    }

    pub(super) fn entries(&self) -> u64 {
        self.0.len() as u64
    }

    /// What is different in `new`: every path whose directory both have, and
    /// of which not both are the same.
    pub(super) fn diff(&self, new: &Self) -> Vec<Line> {
        let mut paths: Vec<&String> = self.0.keys().chain(new.0.keys()).collect();
        paths.sort_by(|a, b| a.split('/').cmp(b.split('/')));
        paths.dedup();
        let size = |node: &Option<Vec<u8>>| node.as_ref().map_or(0, |content| content.len() as u64);
        let kind = |node: &Option<Vec<u8>>| match node {
            Some(_) => NodeKind::File,
            None => NodeKind::Directory,
        };
        let mut lines = Vec::new();
        for path in paths {
            let within = parent(path);
            if !(self.is_directory(within) && new.is_directory(within)) {
                continue;
            }
            let (change, shown) = match (self.0.get(path), new.0.get(path)) {
                (Some(was), Some(is)) if was == is => continue,
                (Some(_), Some(is)) => (ChangeKind::Modified, is),
                (None, Some(is)) => (ChangeKind::Added, is),
                (Some(was), None) => (ChangeKind::Removed, was),
                (None, None) => continue,
            };
            lines.push((path.clone(), change, kind(shown), size(shown)));
        }
        lines
    }
}

/// A live volume.
#[derive(Clone, Debug)]
pub(super) struct Live {
    /// Stands for its uuid.
    pub(super) id: u64,
    pub(super) nodes: Nodes,
    /// How often somebody may have written.
    writes: u64,
    /// The snapshot that was restored, and `former`.
    restored: Option<(u64, usize)>,
}

/// A snapshot.
#[derive(Clone, Debug)]
pub(super) struct Frozen {
    pub(super) name: usize,
    /// Stands for its uuid.
    pub(super) id: u64,
    /// Stands for its origin.
    pub(super) origin: u64,
    pub(super) nodes: Nodes,
    /// The live volume it was taken of, and how often that was written then.
    taken_of: Option<(u64, u64)>,
}

/// A project on one host; there is one while it has anything.
#[derive(Clone, Debug, Default)]
pub(super) struct Project {
    pub(super) live: Option<Live>,
    /// Oldest first.
    pub(super) snapshots: Vec<Frozen>,
    pub(super) limit: Option<u64>,
}

impl Project {
    pub(super) fn find(&self, name: usize) -> Option<&Frozen> {
        self.snapshots.iter().find(|frozen| frozen.name == name)
    }
}

/// A stream that was sent.
#[derive(Clone, Debug)]
struct Stream {
    project: usize,
    name: usize,
    origin: u64,
    base: Option<(usize, u64)>,
    nodes: Nodes,
}

/// One end of a copy, by numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct End<'a> {
    pub(super) project: usize,
    pub(super) snapshot: Option<usize>,
    pub(super) path: &'a str,
}

/// All projects on both hosts, the holds, and the streams that were kept.
#[derive(Clone, Debug, Default)]
pub(super) struct Truth {
    hosts: [BTreeMap<usize, Project>; 2],
    ids: u64,
    holds: Vec<(Host, usize, usize)>,
    streams: Vec<Stream>,
}

fn because<const N: usize>(reasons: [(bool, &'static str); N]) -> Result<(), Reasons> {
    let reasons: Reasons = reasons.into_iter().filter(|(is, _)| *is).map(|(_, why)| why).collect();
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}

impl Truth {
    pub(super) fn project(&self, host: Host, project: usize) -> Option<&Project> {
        self.hosts[host as usize].get(&project)
    }

    fn live(&self, host: Host, project: usize) -> Option<&Live> {
        self.project(host, project)?.live.as_ref()
    }

    fn live_mut(&mut self, host: Host, project: usize) -> Option<&mut Live> {
        self.hosts[host as usize].get_mut(&project)?.live.as_mut()
    }

    fn frozen(&self, host: Host, project: usize, name: usize) -> Option<&Frozen> {
        self.project(host, project)?.find(name)
    }

    fn entry(&mut self, host: Host, project: usize) -> &mut Project {
        self.hosts[host as usize].entry(project).or_default()
    }

    fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub(super) fn create(&mut self, host: Host, project: usize, limit: Option<u64>) -> Result<(), Reasons> {
        because([(self.live(host, project).is_some(), "already exists")])?;
        self.come_alive(host, project, Nodes::default(), None);
        self.entry(host, project).limit = limit;
        Ok(())
    }

    fn come_alive(&mut self, host: Host, project: usize, nodes: Nodes, restored: Option<(u64, usize)>) {
        let id = self.id();
        self.entry(host, project).live = Some(Live { id, nodes, writes: 0, restored });
    }

    pub(super) fn delete(&mut self, host: Host, project: usize) -> Result<(), Reasons> {
        let held = self.holds.iter().any(|(h, p, _)| (*h, *p) == (host, project));
        because([(held, "in use")])?;
        self.hosts[host as usize].remove(&project);
        Ok(())
    }

    pub(super) fn write(&mut self, host: Host, project: usize, path: &str, content: &[u8]) -> bool {
        self.live_mut(host, project).is_some_and(|live| {
            live.writes += 1;
            live.nodes.write(path, content)
        })
    }

    pub(super) fn remove(&mut self, host: Host, project: usize, path: &str) -> bool {
        self.live_mut(host, project).is_some_and(|live| {
            live.writes += 1;
            live.nodes.remove_file(path)
        })
    }

    pub(super) fn snapshot(&mut self, host: Host, project: usize, name: usize) -> Result<(), Reasons> {
        if self.frozen(host, project, name).is_some() {
            return Ok(());
        }
        because([(self.live(host, project).is_none(), "not found")])?;
        self.freeze(host, project, name);
        Ok(())
    }

    fn freeze(&mut self, host: Host, project: usize, name: usize) {
        let id = self.id();
        if let Some(live) = self.live(host, project).cloned() {
            let taken_of = Some((live.id, live.writes));
            let frozen = Frozen { name, id, origin: id, nodes: live.nodes, taken_of };
            self.entry(host, project).snapshots.push(frozen);
        }
    }

    pub(super) fn delete_snapshot(&mut self, host: Host, project: usize, name: usize) -> Result<(), Reasons> {
        because([(self.holds.contains(&(host, project, name)), "in use")])?;
        if let Some(entry) = self.hosts[host as usize].get_mut(&project) {
            entry.snapshots.retain(|frozen| frozen.name != name);
            if entry.snapshots.is_empty() && entry.live.is_none() {
                self.hosts[host as usize].remove(&project);
            }
        }
        Ok(())
    }

    pub(super) fn restore(
        &mut self,
        host: Host,
        project: usize,
        name: usize,
        former: usize,
    ) -> Result<(), Reasons> {
        let found = self.frozen(host, project, name).map(|frozen| (frozen.id, frozen.nodes.clone()));
        let live = self.live(host, project);
        let this = found.as_ref().map(|(id, _)| (*id, former));
        if this.is_some() && live.is_some_and(|live| live.restored == this) {
            return Ok(());
        }
        let taken = live.is_some() && self.frozen(host, project, former).is_some();
        because([(found.is_none(), "no snapshot"), (taken, "already exists")])?;
        if live.is_some() {
            self.freeze(host, project, former);
        }
        if let Some((_, nodes)) = found {
            self.come_alive(host, project, nodes, this);
        }
        Ok(())
    }

    pub(super) fn set_aside(&mut self, host: Host, project: usize, name: usize) -> Result<(), Reasons> {
        let (live, kept) = (self.live(host, project).is_some(), self.frozen(host, project, name).is_some());
        because([(live && kept, "already exists"), (!live && !kept, "not found")])?;
        if live {
            self.freeze(host, project, name);
            self.entry(host, project).live = None;
        }
        Ok(())
    }

    pub(super) fn clone_volume(
        &mut self,
        host: Host,
        source: usize,
        name: usize,
        target: usize,
        limit: Option<u64>,
    ) -> Result<(), Reasons> {
        let found = self.frozen(host, source, name).map(|frozen| frozen.nodes.clone());
        because([(found.is_none(), "no snapshot"), (self.live(host, target).is_some(), "already exists")])?;
        self.come_alive(host, target, found.unwrap_or_default(), None);
        self.entry(host, target).limit = limit;
        Ok(())
    }

    pub(super) fn set_limit(
        &mut self,
        host: Host,
        project: usize,
        limit: Option<u64>,
    ) -> Result<(), Reasons> {
        because([(self.project(host, project).is_none(), "not found")])?;
        self.entry(host, project).limit = limit;
        Ok(())
    }

    pub(super) fn hold(&mut self, host: Host, project: usize, name: usize) -> Result<(), Reasons> {
        because([(self.frozen(host, project, name).is_none(), "no snapshot")])?;
        self.holds.push((host, project, name));
        Ok(())
    }

    /// Which of the holds ends, if there is any.
    pub(super) fn release(&mut self, number: usize) -> Option<usize> {
        let at = number.checked_rem(self.holds.len())?;
        self.holds.remove(at);
        Some(at)
    }

    /// What must be said: yes, no, or either.
    pub(super) fn changed_since(
        &self,
        host: Host,
        project: usize,
        name: usize,
    ) -> Result<Option<bool>, Reasons> {
        let (live, frozen) = (self.live(host, project), self.frozen(host, project, name));
        because([(live.is_none(), "not found"), (frozen.is_none(), "no snapshot")])?;
        let (Some(live), Some(frozen)) = (live, frozen) else { return Ok(None) };
        Ok(if live.nodes != frozen.nodes {
            Some(true)
        } else if frozen.taken_of == Some((live.id, live.writes)) {
            Some(false)
        } else {
            None
        })
    }

    /// The state that a call looks at.
    fn nodes(&self, host: Host, project: usize, snapshot: Option<usize>) -> Result<&Nodes, Reasons> {
        let unknown = self.project(host, project).is_none();
        match snapshot {
            None => {
                let live = self.live(host, project).map(|live| &live.nodes);
                live.ok_or_else(|| Reasons::from(["not found"]))
            }
            Some(name) => self.frozen(host, project, name).map(|frozen| &frozen.nodes).ok_or_else(|| {
                let mut reasons = Reasons::from(["no snapshot"]);
                if unknown {
                    reasons.insert("not found");
                }
                reasons
            }),
        }
    }

    pub(super) fn entries(
        &self,
        host: Host,
        project: usize,
        snapshot: Option<usize>,
    ) -> Result<u64, Reasons> {
        Ok(self.nodes(host, project, snapshot)?.entries())
    }

    pub(super) fn diff(
        &self,
        host: Host,
        project: usize,
        from: usize,
        to: Option<usize>,
    ) -> Result<Vec<Line>, Reasons> {
        let (old, new) = (self.nodes(host, project, Some(from)), self.nodes(host, project, to));
        match (old, new) {
            (Ok(old), Ok(new)) => Ok(old.diff(new)),
            (old, new) => Err(old.err().into_iter().chain(new.err()).flatten().collect()),
        }
    }

    /// How many names and bytes are copied.
    pub(super) fn copy(
        &mut self,
        host: Host,
        from: End<'_>,
        to: End<'_>,
        replace: bool,
    ) -> Result<(u64, u64), Reasons> {
        let mut reasons = Reasons::new();
        let mut part = BTreeMap::new();
        match self.nodes(host, from.project, from.snapshot) {
            Err(why) => reasons.extend(why),
            Ok(nodes) if !nodes.exists(from.path) => drop(reasons.insert("path")),
            Ok(nodes) => part = nodes.part(from.path),
        }
        let itself =
            from.snapshot.is_none() && from.project == to.project && below(to.path, from.path).is_some();
        if to.snapshot.is_some() || to.path.is_empty() || itself {
            reasons.insert("path");
        }
        if let Some(live) = self.live_mut(host, to.project) {
            if !live.nodes.is_directory(parent(to.path)) {
                reasons.insert("path");
            }
            if live.nodes.exists(to.path) && !replace {
                reasons.insert("already exists");
            }
            // Also by one that is refused: it may have tried.
            live.writes += 1;
        } else {
            reasons.insert("not found");
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let bytes = part.values().flatten().map(|content| content.len() as u64).sum();
        let entries = part.len() as u64;
        if let Some(live) = self.live_mut(host, to.project) {
            live.nodes.replace(to.path, part);
        }
        Ok((entries, bytes))
    }

    fn stream(
        &self,
        host: Host,
        project: usize,
        name: usize,
        base: Option<usize>,
    ) -> Result<Stream, Reasons> {
        let found = self.frozen(host, project, name);
        let based = base.map(|base| self.frozen(host, project, base));
        because([(found.is_none() || matches!(based, Some(None)), "no snapshot")])?;
        let found = found.ok_or_else(Reasons::new)?;
        let base = based.flatten().map(|base| (base.name, base.origin));
        Ok(Stream { project, name, origin: found.origin, base, nodes: found.nodes.clone() })
    }

    pub(super) fn transfer(
        &mut self,
        from: Host,
        project: usize,
        name: usize,
        base: Option<usize>,
    ) -> Result<(), Reasons> {
        let stream = self.stream(from, project, name, base)?;
        self.take(from.other(), stream, false)
    }

    /// Keeps a stream, at most `most` of them.
    pub(super) fn send(
        &mut self,
        host: Host,
        project: usize,
        name: usize,
        base: Option<usize>,
        most: usize,
    ) -> Result<(), Reasons> {
        let stream = self.stream(host, project, name, base)?;
        if self.streams.len() == most {
            self.streams.remove(0);
        }
        self.streams.push(stream);
        Ok(())
    }

    /// Which of the streams is meant, if there is any.
    pub(super) fn kept(&self, number: usize) -> Option<usize> {
        number.checked_rem(self.streams.len())
    }

    pub(super) fn receive(&mut self, host: Host, at: usize, is_cut: bool) -> Result<(), Reasons> {
        let stream = self.streams[at].clone();
        self.take(host, stream, is_cut)
    }

    fn take(&mut self, host: Host, stream: Stream, is_cut: bool) -> Result<(), Reasons> {
        let there = self.frozen(host, stream.project, stream.name).map(|frozen| frozen.origin);
        if there == Some(stream.origin) {
            return Ok(());
        }
        let base = stream.base.map(|(name, origin)| {
            (self.frozen(host, stream.project, name).map(|frozen| frozen.origin), origin)
        });
        because([
            (there.is_some(), "already exists"),
            (matches!(base, Some((None, _))), "no snapshot"),
            (matches!(base, Some((Some(there), meant)) if there != meant), "bad stream"),
            (is_cut, "bad stream"),
        ])?;
        let id = self.id();
        let Stream { project, name, origin, nodes, .. } = stream;
        let frozen = Frozen { name, id, origin, nodes, taken_of: None };
        self.entry(host, project).snapshots.push(frozen);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copied_root_has_its_slashes() {
        let mut nodes = Nodes::default();
        assert!(nodes.write("home/a", b"1") && !nodes.write("home/a/b", b"2") && !nodes.write("home", b"3"));
        let part = nodes.part("");
        nodes.replace("home/copy", part);
        assert!(nodes.exists("home/copy/home/a") && nodes.is_directory("home/copy/system"));
        let inner = nodes.part("home/copy/home");
        nodes.replace("home", inner);
        assert_eq!(nodes.files().into_keys().collect::<Vec<_>>(), ["home/a"]);
    }

    #[test]
    fn what_is_in_an_added_directory_is_not_told() {
        let (old, mut new) = (Nodes::default(), Nodes::default());
        new.write("home/d/e/f", b"12");
        new.write("home/d.x", b"1");
        let told: Vec<_> = old.diff(&new).into_iter().map(|(path, ..)| path).collect();
        assert_eq!(told, ["home/d", "home/d.x"], "by components");
    }
}
