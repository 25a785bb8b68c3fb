//! Which connections live on, by account, project and attesting proxy, so that a change finds
//! exactly those that it may concern.

use std::collections::{BTreeMap, BTreeSet};

use cocalc_ids::{AccountId, ProjectId, ProxyId};

use super::Ask;

/// Names a registered connection for as long as the process lives.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ConnectionId(u64);

#[derive(Debug, Default)]
pub(super) struct Connections {
    last: u64,
    asks: BTreeMap<ConnectionId, Ask>,
    by_account: BTreeMap<AccountId, BTreeSet<ConnectionId>>,
    by_project: BTreeMap<ProjectId, BTreeSet<ConnectionId>>,
    by_proxy: BTreeMap<ProxyId, BTreeSet<ConnectionId>>,
}

impl Connections {
    pub(super) fn insert(&mut self, ask: Ask) -> ConnectionId {
        self.last += 1;
        let id = ConnectionId(self.last);
        self.by_account.entry(ask.account).or_default().insert(id);
        self.by_project.entry(ask.project).or_default().insert(id);
        if let Some(proxy) = ask.proof.proxy() {
            self.by_proxy.entry(proxy).or_default().insert(id);
        }
        self.asks.insert(id, ask);
        id
    }

    pub(super) fn remove(&mut self, id: ConnectionId) {
        let Some(ask) = self.asks.remove(&id) else { return };
        forget(&mut self.by_account, ask.account, id);
        forget(&mut self.by_project, ask.project, id);
        if let Some(proxy) = ask.proof.proxy() {
            forget(&mut self.by_proxy, proxy, id);
        }
    }

    pub(super) fn ask(&self, id: ConnectionId) -> Option<&Ask> {
        self.asks.get(&id)
    }

    pub(super) fn of_account(&self, account: AccountId) -> Vec<ConnectionId> {
        self.by_account.get(&account).into_iter().flatten().copied().collect()
    }

    pub(super) fn of_project(&self, project: ProjectId) -> Vec<ConnectionId> {
        self.by_project.get(&project).into_iter().flatten().copied().collect()
    }

    pub(super) fn of_proxy(&self, proxy: ProxyId) -> Vec<ConnectionId> {
        self.by_proxy.get(&proxy).into_iter().flatten().copied().collect()
    }

    pub(super) fn projects(&self) -> Vec<ProjectId> {
        self.by_project.keys().copied().collect()
    }

    pub(super) fn which(&self, which: impl Fn(&Ask) -> bool) -> Vec<ConnectionId> {
        self.asks.iter().filter(|(_, ask)| which(ask)).map(|(id, _)| *id).collect()
    }

    /// Removes and returns those for which `which` holds.
    pub(super) fn take_if(&mut self, which: impl Fn(&Ask) -> bool) -> Vec<ConnectionId> {
        let ids = self.which(which);
        for id in &ids {
            self.remove(*id);
        }
        ids
    }

    pub(super) fn len(&self) -> usize {
        self.asks.len()
    }
}

fn forget<K: Ord>(index: &mut BTreeMap<K, BTreeSet<ConnectionId>>, key: K, id: ConnectionId) {
    if let Some(ids) = index.get_mut(&key) {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(&key);
        }
    }
}
