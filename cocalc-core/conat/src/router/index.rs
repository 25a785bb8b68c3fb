//! Patterns, found by subject.

use std::{
    collections::{BTreeMap, HashMap},
    str::Split,
    sync::Arc,
};

use super::{message::SocketId, random::Random};

/// Who listens to a pattern: groups, and their members.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) pattern: Arc<str>,
    pub(crate) groups: BTreeMap<Arc<str>, Vec<SocketId>>,
}

impl Entry {
    /// One member of `group`, by chance.
    pub(crate) fn pick(&self, group: &str, random: &mut Random) -> Option<SocketId> {
        let members = self.groups.get(group)?;
        members.get(random.below(members.len())).copied()
    }
}

/// A tree of tokens. The maps are only ever asked for one key, never walked,
/// so that nothing depends on their order.
#[derive(Debug, Default)]
pub(crate) struct Index {
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Node>,
    any: Option<Box<Node>>,
    here: Option<Entry>,
    tail: Option<Entry>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.any.is_none() && self.here.is_none() && self.tail.is_none()
    }
}

impl Index {
    /// Adds a member, and returns the shared name of its pattern.
    pub(crate) fn insert(&mut self, pattern: &str, group: &str, socket: SocketId) -> Arc<str> {
        let mut node = &mut self.root;
        let mut slot = Slot::Here;
        for token in pattern.split('.') {
            match token {
                ">" => slot = Slot::Tail,
                "*" => node = node.any.get_or_insert_default(),
                token => node = node.children.entry(token.into()).or_default(),
            }
        }
        let entry = match slot {
            Slot::Here => &mut node.here,
            Slot::Tail => &mut node.tail,
        };
        let entry = entry.get_or_insert_with(|| Entry { pattern: pattern.into(), groups: BTreeMap::new() });
        match entry.groups.get_mut(group) {
            Some(members) => members.push(socket),
            None => {
                entry.groups.insert(group.into(), vec![socket]);
            }
        }
        entry.pattern.clone()
    }

    /// Takes a member out.
    pub(crate) fn remove(&mut self, pattern: &str, group: &str, socket: SocketId) {
        remove(&mut self.root, &mut pattern.split('.'), group, socket);
    }

    /// Calls `found` for each pattern that selects `subject`.
    pub(crate) fn visit<'a>(&'a self, subject: &str, found: &mut dyn FnMut(&'a Entry)) {
        visit(&self.root, Some(subject), found);
    }

    /// The entry of exactly this pattern.
    pub(crate) fn entry(&self, pattern: &str) -> Option<&Entry> {
        let mut node = &self.root;
        for token in pattern.split('.') {
            node = match token {
                ">" => return node.tail.as_ref(),
                "*" => node.any.as_deref()?,
                token => node.children.get(token)?,
            };
        }
        node.here.as_ref()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.root.is_empty()
    }
}

enum Slot {
    Here,
    Tail,
}

/// Each node of the tree is reached at most once, so that the work is bounded
/// by the number of patterns, whatever the wildcards.
fn visit<'a>(node: &'a Node, rest: Option<&str>, found: &mut dyn FnMut(&'a Entry)) {
    let Some(rest) = rest else {
        if let Some(entry) = &node.here {
            found(entry);
        }
        return;
    };
    let (token, rest) = match rest.split_once('.') {
        Some((token, rest)) => (token, Some(rest)),
        None => (rest, None),
    };
    if let Some(child) = node.children.get(token) {
        visit(child, rest, found);
    }
    if let Some(child) = &node.any {
        visit(child, rest, found);
    }
    if let Some(entry) = &node.tail {
        found(entry);
    }
}

fn remove(node: &mut Node, tokens: &mut Split<'_, char>, group: &str, socket: SocketId) {
    match tokens.next() {
        None => take(&mut node.here, group, socket),
        Some(">") => take(&mut node.tail, group, socket),
        Some("*") => {
            if let Some(child) = &mut node.any {
                remove(child, tokens, group, socket);
                if child.is_empty() {
                    node.any = None;
                }
            }
        }
        Some(token) => {
            if let Some(child) = node.children.get_mut(token) {
                remove(child, tokens, group, socket);
                if child.is_empty() {
                    node.children.remove(token);
                }
            }
        }
    }
}

fn take(slot: &mut Option<Entry>, group: &str, socket: SocketId) {
    let Some(entry) = slot else { return };
    if let Some(members) = entry.groups.get_mut(group) {
        if let Some(place) = members.iter().position(|member| *member == socket) {
            members.swap_remove(place);
        }
        if members.is_empty() {
            entry.groups.remove(group);
        }
    }
    if entry.groups.is_empty() {
        *slot = None;
    }
}
