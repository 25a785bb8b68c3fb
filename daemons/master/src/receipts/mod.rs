//! Receipts of revocations: issued with the change, kept in the database, and
//! settled as holders acknowledge or run out of lease and grace.
//!
//! A receipt outlives this process. A position in a stream does not: the
//! streams of the next process have another epoch, and every peer gets its
//! whole state on them first, with the change in it. Whoever acknowledges
//! anything there has therefore applied it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cocalc_auth::receipt::{Holding, Place};
use cocalc_core::connector::Peer;
use cocalc_ids::{AccountId, ProjectId, ReceiptId, Timestamp};
use cocalc_sqlite::master::{self as store, Settled, StoredHolder, StoredReceipt};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use utoipa::ToSchema;

use crate::{
    bus::{peers::Peers, streams::Target},
    shared::Shared,
};

/// Receipts that are not settled. Past it changes go on and have no receipt.
const OPEN_MAX: usize = 10_000;
/// How long the tending task sleeps at most.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Who has applied a revocation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Receipt {
    /// Its name: `GET /receipts/{id}` shows it again, and waits.
    id: String,
    /// What was changed, for instance `collaborator.remove`.
    change: String,
    /// Of what.
    subject: String,
    /// Whether it is in force everywhere: no peer is `pending`.
    complete: bool,
    /// Everybody who held what was revoked.
    peers: Vec<PeerReceipt>,
}

/// What became of a revocation at one host or proxy.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct PeerReceipt {
    /// `host:<id>` or `proxy:<id>`.
    peer: String,
    outcome: ReceiptOutcome,
    /// How long it took, or has taken so far, in milliseconds.
    millis: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ReceiptOutcome {
    /// It has applied it, and closed the connections concerned.
    Acknowledged,
    /// It is cut off, and its lease and grace have run out: it admits nobody.
    Expired,
    /// Neither yet.
    Pending,
}

impl From<Option<Settled>> for ReceiptOutcome {
    fn from(settled: Option<Settled>) -> Self {
        match settled {
            Some(Settled::Acknowledged) => Self::Acknowledged,
            Some(Settled::Expired) => Self::Expired,
            None => Self::Pending,
        }
    }
}

/// A change whose effect everywhere is to be shown.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) account: AccountId,
    /// For instance `collaborator.remove`.
    pub(crate) what: &'static str,
    pub(crate) subject: String,
    /// The project whose grace is known at its host from then on, and the
    /// version of its ACL that says so.
    pub(crate) grace: Option<(ProjectId, u64)>,
}

/// The receipts that are open.
#[derive(Debug, Default)]
pub(crate) struct Receipts {
    inner: Mutex<Inner>,
    /// Something is to be settled sooner.
    sooner: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    open: BTreeMap<ReceiptId, Open>,
    by_peer: BTreeMap<Peer, BTreeSet<ReceiptId>>,
}

#[derive(Debug)]
struct Open {
    holding: Holding<Peer>,
    created: Timestamp,
    grace: Option<(ProjectId, u64)>,
    /// Outcomes that are being written down: until they are, it is not complete
    /// for anybody who reads it.
    writing: usize,
    /// Turns true when it is complete, and the database says so.
    done: watch::Sender<bool>,
}

/// What was settled just now.
type News = Vec<(ReceiptId, Peer, Settled, Timestamp)>;

impl Receipts {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are not settled everywhere.
    pub(crate) fn open(&self) -> usize {
        self.lock().open.len()
    }

    /// Goes on with the receipts of an earlier process: whoever acknowledges
    /// anything of the streams of `epoch` has had the whole state.
    pub(crate) fn resume(&self, receipts: Vec<StoredReceipt>, epoch: u64, peers: &Peers) {
        for receipt in receipts {
            let holders = receipt.holders.iter();
            let targets = holders.map(|holder| (holder.peer, (epoch, 1), holder.hold_ms)).collect();
            let settled = receipt.holders.iter().filter_map(|holder| Some((holder.peer, holder.settled?.0)));
            self.track(receipt.id, receipt.created, targets, settled.collect(), None, peers);
        }
    }

    fn track(
        &self,
        id: ReceiptId,
        created: Timestamp,
        targets: Vec<(Peer, Place, u64)>,
        settled: Vec<(Peer, Settled)>,
        grace: Option<(ProjectId, u64)>,
        peers: &Peers,
    ) {
        let mut holding = Holding::default();
        let mut inner = self.lock();
        for (peer, after, hold_ms) in targets {
            holding.add(peer, after, Duration::from_millis(hold_ms), peers.heard(peer));
            inner.by_peer.entry(peer).or_default().insert(id);
        }
        for (peer, settled) in settled {
            holding.settled_before(peer, settled);
        }
        let done = watch::Sender::new(false);
        inner.open.insert(id, Open { holding, created, grace, writing: 0, done });
        drop(inner);
        self.sooner.notify_one();
    }

    fn of_peer(
        &self,
        peer: Peer,
        now: Timestamp,
        mut change: impl FnMut(&mut Holding<Peer>) -> Option<Settled>,
    ) -> News {
        let mut inner = self.lock();
        let Inner { open, by_peer } = &mut *inner;
        let mut news = Vec::new();
        for id in by_peer.get(&peer).into_iter().flatten() {
            if let Some(receipt) = open.get_mut(id)
                && let Some(settled) = change(&mut receipt.holding)
            {
                receipt.writing += 1;
                news.push((*id, peer, settled, now));
            }
        }
        news
    }

    fn expire(&self, boot: Duration, now: Timestamp) -> (News, Option<Duration>) {
        let mut inner = self.lock();
        let mut news = Vec::new();
        let mut next: Option<Duration> = None;
        for (id, receipt) in &mut inner.open {
            let gone = receipt.holding.expire(boot);
            receipt.writing += gone.len();
            news.extend(gone.into_iter().map(|peer| (*id, peer, Settled::Expired, now)));
            next = receipt.holding.next().into_iter().chain(next).min();
        }
        (news, next)
    }

    /// Takes what is complete from the open ones, after `written` outcomes of
    /// each were written down.
    fn completed(&self, ids: impl Iterator<Item = (ReceiptId, usize)>) -> Vec<Open> {
        let mut inner = self.lock();
        let mut completed = Vec::new();
        for (id, written) in ids {
            let is_complete = inner.open.get_mut(&id).is_some_and(|receipt| {
                receipt.writing = receipt.writing.saturating_sub(written);
                receipt.writing == 0 && receipt.holding.is_complete()
            });
            if is_complete && let Some(receipt) = inner.open.remove(&id) {
                for (peer, _) in receipt.holding.holders() {
                    if let Some(ids) = inner.by_peer.get_mut(&peer) {
                        ids.remove(&id);
                        if ids.is_empty() {
                            inner.by_peer.remove(&peer);
                        }
                    }
                }
                completed.push(receipt);
            }
        }
        completed
    }

    fn done(&self, id: ReceiptId) -> Option<watch::Receiver<bool>> {
        self.lock().open.get(&id).map(|receipt| receipt.done.subscribe())
    }
}

impl Shared {
    /// Keeps a receipt of a change that `targets` must apply. None when there
    /// are too many open ones: a revocation is never held up by its receipt.
    pub(crate) async fn issue(
        &self,
        change: Change,
        targets: Vec<Target>,
    ) -> store::Result<Option<ReceiptId>> {
        if self.receipts.open() >= OPEN_MAX {
            tracing::warn!(change = change.what, "too many revocations are not settled; this has no receipt");
            return Ok(None);
        }
        let (id, created) = (ReceiptId::random(), self.now());
        let lease = self.settings.lease_ms;
        let holders = targets.iter().map(|target| StoredHolder {
            peer: target.peer,
            hold_ms: lease.saturating_add(target.grace_ms),
            settled: None,
        });
        let row = StoredReceipt {
            id,
            account: change.account,
            change: change.what.to_owned(),
            subject: change.subject,
            created,
            holders: holders.collect(),
        };
        self.db(move |store| store.add_receipt(&row)).await?;
        let places = targets
            .iter()
            .map(|target| {
                (target.peer, (self.streams.epoch(), target.seq), lease.saturating_add(target.grace_ms))
            })
            .collect();
        self.receipts.track(id, created, places, Vec::new(), change.grace, &self.peers);
        // They may have acknowledged it before it was tracked.
        for target in targets {
            let place = self.streams.applied(target.peer);
            self.acknowledged(target.peer, place).await?;
        }
        self.settle(Vec::new(), Some(id)).await?;
        Ok(Some(id))
    }

    /// A peer has applied everything up to `place`.
    pub(crate) async fn acknowledged(&self, peer: Peer, place: Place) -> store::Result<()> {
        let news = self.receipts.of_peer(peer, self.now(), |holding| {
            holding.acknowledged(peer, place).then_some(Settled::Acknowledged)
        });
        self.settle(news, None).await
    }

    /// A peer may hold a lease that begins now.
    pub(crate) fn heard(&self, peer: Peer) {
        let now = self.clock.boot();
        self.receipts.of_peer(peer, self.now(), |holding| {
            holding.heard(peer, now);
            None
        });
    }

    /// Writes what was settled down, and then tells who waits.
    async fn settle(&self, news: News, and: Option<ReceiptId>) -> store::Result<()> {
        if news.is_empty() && and.is_none() {
            return Ok(());
        }
        let mut ids: BTreeMap<ReceiptId, usize> = and.into_iter().map(|id| (id, 0)).collect();
        for (id, ..) in &news {
            *ids.entry(*id).or_default() += 1;
        }
        let created: BTreeMap<ReceiptId, Timestamp> = {
            let inner = self.receipts.lock();
            ids.keys().filter_map(|id| Some((*id, inner.open.get(id)?.created))).collect()
        };
        self.db(move |store| {
            for (id, peer, settled, at) in news {
                let took = created.get(&id).map_or(Duration::ZERO, |created| at.since(*created));
                let millis = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                store.settle_receipt(id, peer, settled, millis)?;
            }
            Ok(())
        })
        .await?;
        for receipt in self.receipts.completed(ids.into_iter()) {
            if let Some((project, version)) = receipt.grace {
                self.db(move |store| store.grace_is_known(project, version)).await?;
            }
            receipt.done.send_replace(true);
        }
        Ok(())
    }

    /// The receipt as it is now, or when it is complete, after `limit` at most.
    pub(crate) async fn receipt(
        &self,
        id: ReceiptId,
        limit: Duration,
    ) -> store::Result<(AccountId, Receipt)> {
        if let Some(mut done) = self.receipts.done(id) {
            // Whatever ended the wait, what is shown is what is so.
            let _ = tokio::time::timeout(limit, done.wait_for(|done| *done)).await;
        }
        let stored = self.db(move |store| store.receipt(id)).await?;
        let now = self.now();
        let view = |holder: &StoredHolder| PeerReceipt {
            peer: crate::bus::streams::peer_name(holder.peer),
            outcome: holder.settled.map(|(settled, _)| settled).into(),
            millis: holder.settled.map_or_else(
                || u64::try_from(now.since(stored.created).as_millis()).unwrap_or(u64::MAX),
                |(_, millis)| millis,
            ),
        };
        let peers = stored.holders.iter().map(view).collect();
        let complete = stored.holders.iter().all(|holder| holder.settled.is_some());
        let receipt = Receipt {
            id: id.to_string(),
            change: stored.change.clone(),
            subject: stored.subject.clone(),
            complete,
            peers,
        };
        Ok((stored.account, receipt))
    }
}

/// Settles those whose lease and grace run out.
pub(crate) async fn tend(shared: Arc<Shared>) {
    loop {
        let (news, next) = shared.receipts.expire(shared.clock.boot(), shared.now());
        if let Err(error) = shared.settle(news, None).await {
            tracing::error!(error = %cocalc_core::chain(&error), "a receipt could not be written");
        }
        let wait = next.map_or(LOOK_AGAIN, |next| next.saturating_sub(shared.clock.boot())).min(LOOK_AGAIN);
        let _ =
            tokio::time::timeout(wait.max(Duration::from_millis(5)), shared.receipts.sooner.notified()).await;
    }
}
