use std::collections::BTreeSet;

use cocalc_ids::HostId;

use super::*;
use crate::{
    identity::Identity,
    store::{AclStore, MemoryStore},
    stream::{RingKey, SshKey},
    token::LoginTag,
};

const SECOND: Duration = Duration::from_secs(1);
const GRACE: Duration = Duration::from_secs(900);
const LEASE: Duration = Duration::from_secs(30);
/// A boot time to begin with.
const START: Duration = Duration::from_secs(1000);

fn account(n: u8) -> AccountId {
    AccountId::from_bytes([n; 16])
}

fn project(n: u8) -> ProjectId {
    ProjectId::from_bytes([n; 16])
}

fn key(n: u8, of: u8) -> SshKey {
    SshKey {
        id: KeyId::from_bytes([n; 16]),
        account: account(of),
        key: format!("ssh-ed25519 KEY{n}"),
        options: String::new(),
    }
}

fn acl(n: u8, version: u64, members: &[(u8, Role)]) -> ProjectAcl {
    ProjectAcl {
        project: project(n),
        version,
        epoch: Epoch::FIRST,
        members: members.iter().map(|(n, role)| (account(*n), *role)).collect(),
        keys: vec![],
        grace_ms: None,
        proxy_ssh: false,
        authorized_keys: false,
        viewable_ports: Vec::new(),
    }
}

fn state(n: u8, session_epoch: u64) -> AccountState {
    AccountState { account: account(n), session_epoch, ended_logins: vec![], banned: false, keys: vec![] }
}

fn ring(version: u64, withdrawn: &[&str]) -> PublicRing {
    let key = Identity::from_seed(&[1; 32]).public_key().to_string();
    PublicRing {
        version,
        keys: vec![RingKey { kid: "a".to_owned(), key, alg: "EdDSA".to_owned() }],
        withdrawn: withdrawn.iter().map(|kid| (*kid).to_owned()).collect(),
    }
}

fn ask(account_: u8, project_: u8) -> Ask {
    Ask {
        account: account(account_),
        project: project(project_),
        action: Action::Use(Scope::Http),
        epoch: Some(Epoch::FIRST),
        session_epoch: Some(0),
        login: None,
        acl: 0,
        proof: Proof::Token,
    }
}

/// Sends entries to a cache, in order.
struct Sender {
    at: Position,
}

impl Sender {
    fn send(&mut self, cache: &mut AclCache, entry: Entry) -> Applied {
        self.at.seq += 1;
        cache.apply(&Frame { stream: self.at.stream, seq: self.at.seq, entry })
    }
}

const FIRST: Position = Position { stream: 5, seq: 0 };

/// A cache that is live and leased: project 1 with owner 1 and collaborator 2.
fn live() -> (AclCache, Sender) {
    let mut cache = AclCache::new(GRACE);
    let mut sender = Sender { at: FIRST };
    assert_eq!(cache.begin_sync(), None);
    for entry in [
        Entry::Reset,
        Entry::KeyRing(ring(1, &[])),
        Entry::Account(state(1, 0)),
        Entry::Account(state(2, 0)),
        Entry::Project(acl(1, 1, &[(1, Role::Owner), (2, Role::Collaborator)])),
        Entry::Live,
    ] {
        assert!(sender.send(&mut cache, entry).accepted);
    }
    assert!(!cache.renewed(START, LEASE, None, sender.at));
    (cache, sender)
}

fn outcome(cache: &AclCache, ask: &Ask, now: Duration) -> Result<(), Refusal> {
    cache.decide(ask, Some(Epoch::FIRST), now).outcome
}

#[test]
fn nothing_is_allowed_before_the_whole_state_and_a_lease() {
    let mut cache = AclCache::new(GRACE);
    let mut sender = Sender { at: FIRST };
    sender.send(&mut cache, Entry::Reset);
    sender.send(&mut cache, Entry::Account(state(1, 0)));
    sender.send(&mut cache, Entry::Project(acl(1, 1, &[(1, Role::Owner)])));
    assert!(cache.renewed(START, LEASE, None, Position { seq: 4, ..FIRST }));
    assert_eq!(outcome(&cache, &ask(1, 1), START), Err(Refusal::Stale));
    // The lease that was granted meanwhile counts as soon as all is applied.
    sender.send(&mut cache, Entry::Live);
    assert_eq!(outcome(&cache, &ask(1, 1), START), Ok(()));
    assert_eq!(cache.decide(&ask(1, 1), Some(Epoch::FIRST), START + SECOND).staleness, Some(SECOND));
}

#[test]
fn each_reason_to_refuse() {
    let (mut cache, mut sender) = live();
    let now = START;
    assert_eq!(cache.decide(&ask(1, 1), None, now).outcome, Err(Refusal::NotHeld));
    let next = Some(Epoch::FIRST.next());
    assert_eq!(cache.decide(&ask(1, 1), next, now).outcome, Err(Refusal::OtherEpoch));
    assert_eq!(outcome(&cache, &ask(1, 2), now), Err(Refusal::Unknown));
    assert_eq!(outcome(&cache, &Ask { acl: 2, ..ask(1, 1) }, now), Err(Refusal::TooOld));
    assert_eq!(outcome(&cache, &ask(3, 1), now), Err(Refusal::NotAMember));
    let later_login = Ask { session_epoch: Some(1), ..ask(1, 1) };
    assert_eq!(outcome(&cache, &later_login, now), Err(Refusal::TooOld));
    let administer = |n| Ask { action: Action::Administer, ..ask(n, 1) };
    assert_eq!(outcome(&cache, &administer(1), now), Ok(()));
    assert_eq!(outcome(&cache, &administer(2), now), Err(Refusal::Role));
    sender.send(&mut cache, Entry::Account(state(1, 1)));
    assert_eq!(outcome(&cache, &ask(1, 1), now), Err(Refusal::SignedOut));
    assert_eq!(outcome(&cache, &later_login, now), Ok(()));
    sender.send(&mut cache, Entry::Account(AccountState { banned: true, ..state(1, 1) }));
    assert_eq!(outcome(&cache, &later_login, now), Err(Refusal::Banned));
    let removed = Ask { proof: Proof::Key(KeyId::from_bytes([1; 16])), session_epoch: None, ..ask(2, 1) };
    assert_eq!(outcome(&cache, &removed, now), Err(Refusal::KeyRemoved));
}

#[test]
fn tiers_follow_lease_and_grace() {
    let (mut cache, mut sender) = live();
    let strict = ProjectAcl { grace_ms: Some(0), ..acl(2, 1, &[(1, Role::Owner)]) };
    sender.send(&mut cache, Entry::Project(strict));
    let lenient = ProjectAcl { grace_ms: Some(3_600_000), ..acl(3, 1, &[(1, Role::Owner)]) };
    sender.send(&mut cache, Entry::Project(lenient));
    let tiers = |now| [1, 2, 3].map(|n| cache.tier_of(project(n), now));
    let end = START + LEASE;
    assert_eq!(tiers(end - Duration::from_nanos(1)), [Tier::Fresh; 3]);
    assert_eq!(tiers(end), [Tier::Grace, Tier::Expired, Tier::Grace]);
    assert_eq!(tiers(end + GRACE), [Tier::Expired, Tier::Expired, Tier::Grace]);
    assert_eq!(tiers(end + SECOND * 3600), [Tier::Expired; 3]);
    // In grace what is cached goes on, nothing administrative.
    assert_eq!(outcome(&cache, &ask(1, 1), end), Ok(()));
    assert_eq!(outcome(&cache, &ask(1, 2), end), Err(Refusal::Stale));
    let administer = Ask { action: Action::Administer, ..ask(1, 1) };
    assert_eq!(outcome(&cache, &administer, end), Err(Refusal::Stale));
    assert_eq!(outcome(&cache, &ask(1, 1), end + GRACE), Err(Refusal::Stale));
}

#[test]
fn time_alone_closes_what_has_expired_and_nothing_else() {
    let (mut cache, mut sender) = live();
    let strict = ProjectAcl { grace_ms: Some(0), ..acl(2, 1, &[(1, Role::Owner)]) };
    sender.send(&mut cache, Entry::Project(strict));
    let (_, first) = cache.admit(&ask(1, 1), Some(Epoch::FIRST), START);
    let (_, second) = cache.admit(&ask(1, 2), Some(Epoch::FIRST), START);
    let end = START + LEASE;
    assert_eq!(cache.next_change(START), Some(end));
    assert_eq!(cache.expire(end - SECOND), []);
    assert_eq!(cache.expire(end), [(second.unwrap(), Refusal::Stale)]);
    assert_eq!(cache.next_change(end), Some(end + GRACE));
    assert_eq!(cache.expire(end + GRACE), [(first.unwrap(), Refusal::Stale)]);
    assert_eq!(cache.next_change(end + GRACE), None);
    assert_eq!(cache.connections(), 0);
}

#[test]
fn a_change_closes_exactly_what_it_concerns() {
    let (mut cache, mut sender) = live();
    sender.send(&mut cache, Entry::Project(acl(2, 1, &[(1, Role::Owner), (2, Role::Collaborator)])));
    let mut admit = |ask: &Ask| {
        let (verdict, id) = cache.admit(ask, Some(Epoch::FIRST), START);
        assert_eq!(verdict.outcome, Ok(()));
        id.unwrap()
    };
    let ids: Vec<_> = [(1, 1), (2, 1), (1, 2), (2, 2)].map(|(a, p)| admit(&ask(a, p))).into();
    // A collaborator removed from one project.
    let applied = sender.send(&mut cache, Entry::Project(acl(1, 2, &[(1, Role::Owner)])));
    assert_eq!(applied.close, [(ids[1], Refusal::NotAMember)]);
    // Signed out everywhere.
    let applied = sender.send(&mut cache, Entry::Account(state(2, 1)));
    assert_eq!(applied.close, [(ids[3], Refusal::SignedOut)]);
    // A project that has left.
    let applied = sender.send(&mut cache, Entry::ProjectGone { project: project(2) });
    assert_eq!(applied.close, [(ids[2], Refusal::Left)]);
    // What has not changed stays.
    assert_eq!(sender.send(&mut cache, Entry::Account(state(1, 0))).close, []);
    assert_eq!(cache.connections(), 1);
    let applied = sender.send(&mut cache, Entry::Account(AccountState { banned: true, ..state(1, 0) }));
    assert_eq!(applied.close, [(ids[0], Refusal::Banned)]);
    assert!(cache.connections() == 0 && cache.connections.projects().is_empty());
}

#[test]
fn a_withdrawn_key_ends_what_its_tokens_opened_and_a_retired_one_nothing() {
    let (mut cache, mut sender) = live();
    let with_key = AccountState { keys: vec![key(7, 1)], ..state(1, 0) };
    sender.send(&mut cache, Entry::Account(with_key));
    let session = SessionHash::from_bytes([1; 32]);
    let asks = [
        ask(1, 1),
        Ask { proof: Proof::Session(session), ..ask(1, 1) },
        Ask { proof: Proof::Key(KeyId::from_bytes([7; 16])), session_epoch: None, ..ask(1, 1) },
    ];
    let ids = asks.map(|ask| cache.admit(&ask, Some(Epoch::FIRST), START).1.unwrap());
    let retired = PublicRing { keys: vec![], ..ring(2, &[]) };
    let applied = sender.send(&mut cache, Entry::KeyRing(retired));
    assert_eq!((applied.close, applied.end_sessions), (vec![], false));
    let applied = sender.send(&mut cache, Entry::KeyRing(ring(3, &["x"])));
    assert_eq!(applied.close, [(ids[0], Refusal::KeyWithdrawn), (ids[1], Refusal::KeyWithdrawn)]);
    assert!(applied.end_sessions);
    let applied = sender.send(&mut cache, Entry::KeyRing(ring(4, &["x"])));
    assert!(!applied.end_sessions, "once is enough");
    let applied = sender.send(&mut cache, Entry::Account(state(1, 0)));
    assert_eq!(applied.close, [(ids[2], Refusal::KeyRemoved)]);
}

#[test]
fn ssh_keys_are_found_for_members_only() {
    let (mut cache, mut sender) = live();
    let foreign = key(8, 1);
    for entry in [
        Entry::Account(AccountState { keys: vec![key(1, 1)], ..state(1, 0) }),
        // Not a member, and a list that claims to act as somebody else.
        Entry::Account(AccountState { keys: vec![key(3, 3)], ..state(3, 0) }),
        Entry::Account(AccountState { keys: vec![foreign], ..state(2, 0) }),
        Entry::Project(ProjectAcl {
            keys: vec![key(2, 2)],
            ..acl(1, 2, &[(1, Role::Owner), (2, Role::Collaborator)])
        }),
    ] {
        sender.send(&mut cache, entry);
    }
    let find = |text: &str| cache.find_key(project(1), text).unwrap();
    assert_eq!(find("ssh-ed25519 KEY1"), Some((account(1), KeyId::from_bytes([1; 16]))));
    assert_eq!(find("ssh-ed25519 KEY2"), Some((account(2), KeyId::from_bytes([2; 16]))));
    for other in ["ssh-ed25519 KEY3", "ssh-ed25519 KEY8", "ssh-ed25519 KEY", "KEY1", ""] {
        assert_eq!(find(other), None, "{other}");
    }
    assert_eq!(cache.find_key(project(2), "ssh-ed25519 KEY1"), Err(Refusal::Unknown));
}

#[test]
fn who_lists_the_key_of_somebody_else_does_not_shut_them_out() {
    let (mut cache, mut sender) = live();
    let text = "ssh-ed25519 SHARED";
    // Key ids are those of the accounts, or 10 more in the project's own list.
    let shared = |id, of| SshKey { key: text.to_owned(), ..key(id, of) };
    let listing = |of| AccountState { keys: vec![shared(of, of)], ..state(of, 0) };
    let roles = [(1, Role::Viewer), (2, Role::Collaborator), (3, Role::Owner), (4, Role::Owner)];
    let found = |cache: &AclCache| cache.find_key(project(1), text).unwrap();
    let key_of = |id: u8, of: u8| Some((account(of), KeyId::from_bytes([id; 16])));
    sender.send(&mut cache, Entry::Project(acl(1, 2, &roles)));

    sender.send(&mut cache, Entry::Account(listing(1)));
    assert_eq!(found(&cache), None, "a viewer has no shell");
    for (of, counts) in [(2, 2), (4, 4), (3, 3)] {
        sender.send(&mut cache, Entry::Account(listing(of)));
        assert_eq!(found(&cache), key_of(counts, counts));
    }
    let ssh = Ask {
        action: Action::Use(Scope::Ssh),
        session_epoch: None,
        proof: Proof::Key(KeyId::from_bytes([3; 16])),
        ..ask(3, 1)
    };
    assert_eq!(outcome(&cache, &ssh, START), Ok(()));
    sender.send(&mut cache, Entry::Account(AccountState { banned: true, ..listing(3) }));
    assert_eq!(found(&cache), key_of(4, 4));

    // The project's own list comes first, if its account may.
    let keys = vec![shared(11, 1), shared(13, 3), shared(19, 9)];
    sender.send(&mut cache, Entry::Project(ProjectAcl { keys: keys.clone(), ..acl(1, 3, &roles) }));
    assert_eq!(found(&cache), key_of(4, 4));
    let keys = [keys, vec![shared(12, 2), shared(10, 2)]].concat();
    sender.send(&mut cache, Entry::Project(ProjectAcl { keys, ..acl(1, 4, &roles) }));
    assert_eq!(found(&cache), key_of(10, 2));
}

#[test]
fn proxies_attest_only_where_the_owner_lets_them() {
    let (mut cache, mut sender) = live();
    let proxy = ProxyId::from_bytes([1; 16]);
    sender.send(&mut cache, Entry::Proxy { proxy, identity: Some("key".to_owned()) });
    assert_eq!(cache.attesting_proxy(project(1), proxy), None);
    let allowed = ProjectAcl { proxy_ssh: true, ..acl(1, 2, &[]) };
    sender.send(&mut cache, Entry::Project(allowed));
    assert_eq!(cache.attesting_proxy(project(1), proxy), Some("key"));
    sender.send(&mut cache, Entry::Proxy { proxy, identity: None });
    assert_eq!(cache.attesting_proxy(project(1), proxy), None);
}

#[test]
fn what_a_proxy_attested_ends_with_it() {
    let (mut cache, mut sender) = live();
    let (proxy, other) = (ProxyId::from_bytes([1; 16]), ProxyId::from_bytes([2; 16]));
    let listed = key(1, 1);
    let id = listed.id;
    let project_entry = Entry::Project(ProjectAcl { proxy_ssh: true, ..acl(1, 2, &[(1, Role::Owner)]) });
    let account_entry = Entry::Account(AccountState { keys: vec![listed], ..state(1, 0) });
    let enrolled = |proxy| Entry::Proxy { proxy, identity: Some("key".to_owned()) };
    let whole = [account_entry, project_entry, enrolled(proxy), enrolled(other)];
    for entry in whole.clone() {
        sender.send(&mut cache, entry);
    }
    let ask = |proof| Ask { session_epoch: None, proof, ..ask(1, 1) };
    let by = |cache: &mut AclCache, proof| {
        cache.admit(&ask(proof), Some(Epoch::FIRST), START).1.expect("it is allowed")
    };
    by(&mut cache, Proof::Key(id));
    let first = by(&mut cache, Proof::AttestedKey(id, proxy));
    let second = by(&mut cache, Proof::AttestedKey(id, other));
    let applied = sender.send(&mut cache, Entry::Proxy { proxy, identity: None });
    assert_eq!(applied.close, [(first, Refusal::ProxyWithdrawn)]);
    let refused = outcome(&cache, &ask(Proof::AttestedKey(id, proxy)), START);
    assert_eq!(refused, Err(Refusal::ProxyWithdrawn));
    // A whole new state that does not name the other one.
    let mut closed = Vec::new();
    let named = whole.into_iter().take(2);
    for entry in [Entry::Reset].into_iter().chain(named).chain([Entry::Account(state(2, 0)), Entry::Live]) {
        closed.extend(sender.send(&mut cache, entry).close);
    }
    assert_eq!(closed, [(second, Refusal::ProxyWithdrawn)]);
    assert_eq!(cache.connections(), 1);
}

#[test]
fn a_certificate_ends_with_its_authority_its_login_and_its_proxy() {
    let (mut cache, mut sender) = live();
    let proxy = ProxyId::from_bytes([1; 16]);
    let authorities = |version, withdrawn: &[&str]| {
        Entry::SshAuthorities(SshAuthorities {
            version,
            user: vec!["ssh-ed25519 NEW".to_owned()],
            host: Vec::new(),
            withdrawn: withdrawn.iter().map(|key| (*key).to_owned()).collect(),
        })
    };
    for entry in [
        Entry::Account(state(1, 0)),
        Entry::Project(ProjectAcl { proxy_ssh: true, ..acl(1, 2, &[(1, Role::Collaborator)]) }),
        Entry::Proxy { proxy, identity: Some("key".to_owned()) },
        authorities(1, &[]),
    ] {
        sender.send(&mut cache, entry);
    }
    let ask = |session_epoch, authority: &str, proxy| Ask {
        session_epoch: Some(session_epoch),
        proof: Proof::Certificate { authority: authority.to_owned(), proxy },
        ..ask(1, 1)
    };
    let mut admit = |ask: &Ask| cache.admit(ask, Some(Epoch::FIRST), START).1.expect("it is allowed");
    let (old, new) = ("ssh-ed25519 OLD", "ssh-ed25519 NEW");
    let of_old = admit(&ask(0, old, None));
    let by_proxy = admit(&ask(0, new, Some(proxy)));
    let of_new = admit(&ask(0, new, None));
    // A withdrawn key of tokens is nothing to certificates.
    let ring = PublicRing { version: 9, withdrawn: vec!["k".to_owned()], ..PublicRing::default() };
    assert_eq!(sender.send(&mut cache, Entry::KeyRing(ring)).close, []);
    // Retired keys end nothing; withdrawn ones end what they opened.
    assert_eq!(sender.send(&mut cache, authorities(2, &[])).close, []);
    assert_eq!(sender.send(&mut cache, authorities(3, &[old])).close, [(of_old, Refusal::KeyWithdrawn)]);
    assert_eq!(outcome(&cache, &ask(0, old, None), START), Err(Refusal::KeyWithdrawn));
    // What is older than what is known changes nothing.
    sender.send(&mut cache, authorities(2, &[]));
    assert_eq!(cache.ssh_authorities().version, 3);
    let withdrawn = sender.send(&mut cache, Entry::Proxy { proxy, identity: None });
    assert_eq!(withdrawn.close, [(by_proxy, Refusal::ProxyWithdrawn)]);
    let signed_out = sender.send(&mut cache, Entry::Account(state(1, 1)));
    assert_eq!(signed_out.close, [(of_new, Refusal::SignedOut)]);
    assert_eq!(outcome(&cache, &ask(2, new, None), START), Err(Refusal::TooOld));
}

#[test]
fn keys_inside_a_project_count_while_its_owner_lets_them() {
    let (mut cache, mut sender) = live();
    let members = [(1, Role::Collaborator), (2, Role::Owner)];
    for n in [1, 2] {
        sender.send(&mut cache, Entry::Account(state(n, 0)));
    }
    sender.send(&mut cache, Entry::Project(acl(1, 2, &members)));
    assert_eq!(cache.inside_keys(project(1)), None);
    let lets = |version| Entry::Project(ProjectAcl { authorized_keys: true, ..acl(1, version, &members) });
    sender.send(&mut cache, lets(3));
    assert_eq!(cache.inside_keys(project(1)), Some(account(2)));
    let ask = |of, action| Ask {
        action,
        session_epoch: None,
        proof: Proof::InsideKey { proxy: None },
        ..ask(of, 1)
    };
    let ssh = Action::Use(Scope::Ssh);
    let (_, id) = cache.admit(&ask(2, ssh), Some(Epoch::FIRST), START);
    // A collaborator's rights, although it is the owner who answers for them.
    assert_eq!(outcome(&cache, &ask(2, Action::Administer), START), Err(Refusal::Role));
    assert_eq!(outcome(&cache, &ask(1, ssh), START), Err(Refusal::InsideKeys));
    let closed = sender.send(&mut cache, Entry::Project(acl(1, 4, &members))).close;
    assert_eq!(closed, [(id.expect("it was allowed"), Refusal::InsideKeys)]);
    assert_eq!(outcome(&cache, &ask(2, ssh), START), Err(Refusal::InsideKeys));
}

#[test]
fn a_gap_asks_once_and_is_mended_by_the_missing_frames() {
    let (mut cache, mut sender) = live();
    let missed = Frame { stream: 5, seq: 7, entry: Entry::Project(acl(1, 2, &[(1, Role::Owner)])) };
    sender.at.seq += 1;
    let later = sender.send(&mut cache, Entry::Account(state(1, 0)));
    assert!(later.need_sync && !later.accepted && !cache.is_live());
    assert!(!sender.send(&mut cache, Entry::Account(state(1, 0))).need_sync, "asked already");
    // A lease that covers what is missing does not count yet.
    assert!(cache.renewed(START + LEASE, LEASE, None, sender.at));
    assert_eq!(cache.tier(START + LEASE), Tier::Grace);
    assert_eq!(cache.begin_sync(), Some(Position { stream: 5, seq: 6 }));
    assert!(cache.apply(&missed).accepted && cache.is_live());
    assert_eq!(cache.tier(START + LEASE), Tier::Grace, "two frames are still missing");
    sender.at.seq = 7;
    sender.send(&mut cache, Entry::Account(state(1, 0)));
    sender.send(&mut cache, Entry::Account(state(1, 0)));
    assert_eq!(cache.tier(START + LEASE), Tier::Fresh);
    // Once more, and late, is harmless.
    let again = cache.apply(&missed);
    assert!(!again.accepted && again.save.is_none());
}

#[test]
fn a_resumed_stream_with_nothing_new_is_whole() {
    let (mut cache, sender) = live();
    assert_eq!(cache.begin_sync(), Some(sender.at));
    assert!(!cache.is_live());
    let later = START + LEASE + SECOND;
    assert!(cache.renewed(later, LEASE, None, Position { seq: sender.at.seq + 1, ..FIRST }));
    assert_eq!(cache.tier(later), Tier::Grace);
    assert!(!cache.renewed(later, LEASE, None, sender.at));
    assert!(cache.is_live());
    assert_eq!(cache.tier(later), Tier::Fresh);
}

#[test]
fn half_a_state_is_not_continued() {
    let (mut cache, _) = live();
    let mut sender = Sender { at: Position { stream: 6, seq: 0 } };
    let early = cache.apply(&Frame { stream: 6, seq: 9, entry: Entry::Live });
    assert!(early.need_sync);
    assert_eq!(cache.begin_sync(), Some(Position { stream: 5, seq: 6 }));
    sender.send(&mut cache, Entry::Reset);
    assert!(sender.send(&mut cache, Entry::Account(state(9, 0))).save.is_none(), "not before it is whole");
    sender.at.seq += 1;
    assert!(sender.send(&mut cache, Entry::Live).need_sync);
    assert_eq!(cache.begin_sync(), None);
    // The old state still decides, as long as its lease lasts.
    assert_eq!(outcome(&cache, &ask(1, 1), START), Ok(()));
}

#[test]
fn a_whole_new_state_forgets_and_closes_what_it_does_not_name() {
    let (mut cache, _) = live();
    let (_, kept) = cache.admit(&ask(1, 1), Some(Epoch::FIRST), START);
    let (_, lost) = cache.admit(&ask(2, 1), Some(Epoch::FIRST), START);
    let mut sender = Sender { at: Position { stream: 6, seq: 0 } };
    let mut closed = vec![];
    for entry in [
        Entry::Reset,
        Entry::KeyRing(ring(1, &[])),
        Entry::Account(state(1, 0)),
        // A lower version than before: the master was restored, and is right.
        Entry::Project(acl(1, 0, &[(1, Role::Owner), (2, Role::Collaborator)])),
    ] {
        closed.extend(sender.send(&mut cache, entry).close);
    }
    assert_eq!(closed, []);
    let applied = sender.send(&mut cache, Entry::Live);
    assert_eq!(applied.close, [(lost.unwrap(), Refusal::Unknown)]);
    let save = applied.save.unwrap();
    assert!(save.clear && save.position == Some(sender.at) && save.entries.len() == 3);
    assert_eq!(cache.project(project(1)).unwrap().version, 0);
    cache.disconnected(kept.unwrap());
    assert_eq!(cache.connections(), 0);
}

#[test]
fn a_lease_survives_the_process_but_not_the_boot() {
    let (cache, _) = live();
    let standing = cache.lease().standing("boot 1", cache.position());
    let saved = Saved {
        position: cache.position(),
        entries: vec![
            Entry::Account(state(1, 0)),
            Entry::Project(acl(1, 1, &[(1, Role::Owner)])),
            Entry::KeyRing(ring(1, &[])),
        ],
        standing: None,
    };
    let restore = |mark, boot: &str| AclCache::restore(&saved, Some(&standing), mark, boot, GRACE);
    let same = restore(cache.position(), "boot 1");
    assert_eq!(outcome(&same, &ask(1, 1), START + SECOND), Ok(()));
    assert_eq!(same.tier(START + LEASE), Tier::Grace);
    assert_eq!(restore(None, "boot 2").tier(START), Tier::Expired);
    assert_eq!(restore(None, "").tier(START), Tier::Expired);
    // An older store, restored in the same boot.
    let mut older = restore(Some(Position { stream: 5, seq: 7 }), "boot 1");
    assert_eq!(outcome(&older, &ask(1, 1), START + SECOND), Err(Refusal::Stale));
    assert_eq!(older.begin_sync(), None, "only a whole state helps");
    let mut sender = Sender { at: Position { stream: 5, seq: 20 } };
    for entry in [Entry::Reset, Entry::Account(state(1, 0)), Entry::Project(acl(1, 3, &[(1, Role::Owner)]))] {
        sender.send(&mut older, entry);
        assert_eq!(outcome(&older, &ask(1, 1), START + SECOND), Err(Refusal::Stale));
    }
    sender.send(&mut older, Entry::Live);
    assert_eq!(outcome(&older, &ask(1, 1), START + SECOND), Ok(()));
    // A standing that is ahead of the store shows the same.
    let behind = Saved { position: Some(FIRST), ..saved };
    let cache = AclCache::restore(&behind, Some(&standing), None, "boot 1", GRACE);
    assert_eq!(cache.tier(START), Tier::Expired);
}

#[test]
fn a_master_that_went_back_in_time_fails_closed() {
    let (mut cache, sender) = live();
    let ours = cache.position();
    // A frame under way when the reply was written is no step back.
    assert!(!cache.renewed(START, LEASE, Some(Position { seq: 5, ..FIRST }), Position { seq: 5, ..FIRST }));
    assert_eq!(cache.tier(START), Tier::Fresh);
    assert!(cache.renewed(START, LEASE, ours, Position { seq: sender.at.seq - 1, ..FIRST }));
    assert_eq!(cache.tier(START), Tier::Expired);
    assert_eq!(cache.begin_sync(), None);
}

#[test]
fn frames_of_an_older_stream_are_ignored() {
    let (mut cache, _) = live();
    let old = Frame { stream: 4, seq: 100, entry: Entry::Reset };
    assert_eq!(cache.apply(&old), Applied::default());
    assert!(cache.is_live());
}

/// A master, a lossy stream, restarts of the host, and time, from a seed.
struct World {
    random: u64,
    now: Duration,
    /// The master's truth, and its log of the present stream.
    projects: BTreeMap<u8, ProjectAcl>,
    accounts: BTreeMap<u8, AccountState>,
    log: Vec<Frame>,
    stream: u64,
    /// When each pair was last allowed, in truth.
    allowed: BTreeMap<(u8, u8), Duration>,
    cache: AclCache,
    store: MemoryStore,
    wire: std::collections::VecDeque<Frame>,
    open: BTreeMap<ConnectionId, (u8, u8)>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            now: START,
            projects: BTreeMap::new(),
            accounts: (0..4).map(|n| (n, state(n, 0))).collect(),
            log: vec![],
            stream: 1,
            allowed: BTreeMap::new(),
            cache: AclCache::new(GRACE),
            store: MemoryStore::default(),
            wire: Default::default(),
            open: BTreeMap::new(),
        };
        for n in 0..3 {
            world.projects.insert(n, acl(n, 1, &[(0, Role::Owner)]));
        }
        world
    }

    fn pick(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % below
    }

    fn small(&mut self, below: u64) -> u8 {
        u8::try_from(self.pick(below)).unwrap()
    }

    fn truly(&self, who: u8, what: u8) -> bool {
        let account_ = &self.accounts[&who];
        let member = |acl: &ProjectAcl| acl.members.iter().any(|(id, _)| *id == account(who));
        self.projects.get(&what).is_some_and(member) && !account_.banned && account_.session_epoch == 0
    }

    fn log(&mut self, entry: Entry) {
        let seq = self.log.last().map_or(0, |frame| frame.seq) + 1;
        let frame = Frame { stream: self.stream, seq, entry };
        self.log.push(frame.clone());
        self.wire.push_back(frame);
    }

    fn master_position(&self) -> Position {
        Position { stream: self.stream, seq: self.log.last().map_or(0, |frame| frame.seq) }
    }

    fn whole_state(&mut self) {
        self.log(Entry::Reset);
        for account in self.accounts.clone().into_values() {
            self.log(Entry::Account(account));
        }
        for acl in self.projects.clone().into_values() {
            self.log(Entry::Project(acl));
        }
        self.log(Entry::Live);
    }

    fn sync(&mut self) {
        self.wire.clear();
        match self.cache.begin_sync() {
            Some(at) if at.stream == self.stream => {
                self.wire.extend(self.log.iter().filter(|frame| frame.seq > at.seq).cloned());
            }
            _ => self.whole_state(),
        }
    }

    fn deliver(&mut self, frame: &Frame) {
        let applied = self.cache.apply(frame);
        for (id, _) in &applied.close {
            assert!(self.open.remove(id).is_some(), "closed what was not open");
        }
        if let Some(save) = applied.save {
            self.store.save(&save).unwrap();
        }
        if applied.need_sync {
            self.sync();
        }
    }

    fn restart(&mut self) {
        let saved = self.store.load().unwrap();
        let standing = self.cache.lease().standing("boot", saved.position);
        self.cache = AclCache::restore(&saved, Some(&standing), saved.position, "boot", GRACE);
        self.open.clear();
        self.wire.clear();
        self.sync();
    }

    fn step(&mut self) {
        match self.pick(16) {
            0 => {
                let n = self.small(3);
                let version = self.projects.get(&n).map_or(1, |acl| acl.version + 1);
                let members: BTreeSet<u8> = (0..self.pick(4)).map(|_| self.small(4)).collect();
                let members: Vec<_> = members.into_iter().map(|n| (n, Role::Collaborator)).collect();
                let grace_ms = [None, Some(0), Some(5_000)][self.pick(3) as usize];
                let acl = ProjectAcl { grace_ms, ..acl(n, version, &members) };
                self.projects.insert(n, acl.clone());
                self.log(Entry::Project(acl));
            }
            1 => {
                let n = self.small(4);
                let banned = self.pick(2) == 0;
                let account = self.accounts.get_mut(&n).unwrap();
                account.banned = banned;
                let account = account.clone();
                self.log(Entry::Account(account));
            }
            2 if self.pick(4) == 0 => {
                let n = self.small(3);
                self.projects.remove(&n);
                self.log(Entry::ProjectGone { project: project(n) });
            }
            3 if self.pick(8) == 0 => {
                self.wire.pop_front();
            }
            4 if self.pick(16) == 0 => {
                self.stream += 1;
                self.log.clear();
                self.wire.clear();
                self.whole_state();
            }
            5 if self.pick(8) == 0 => self.restart(),
            6 | 7 => self.now += Duration::from_millis(self.random % 4000),
            8 => {
                let sent = self.now;
                let position_sent = self.cache.is_live().then(|| self.cache.position()).flatten();
                let position = self.master_position();
                self.now += Duration::from_millis(self.random % 300);
                if self.cache.renewed(sent, LEASE, position_sent, position) && self.pick(3) == 0 {
                    self.sync();
                }
            }
            9 if self.pick(16) == 0 => self.now += LEASE + Duration::from_secs(self.random % 2000),
            10 | 11 => {
                let (who, what) = (self.small(4), self.small(3));
                let (verdict, id) = self.cache.admit(&ask(who, what), Some(Epoch::FIRST), self.now);
                assert_eq!(verdict.outcome.is_ok(), id.is_some());
                self.open.extend(id.map(|id| (id, (who, what))));
            }
            _ => {
                if let Some(frame) = self.wire.pop_front() {
                    self.deliver(&frame);
                    if self.pick(4) == 0 {
                        // Delivered twice.
                        self.deliver(&frame);
                    }
                }
            }
        }
        for (id, _) in self.cache.expire(self.now) {
            assert!(self.open.remove(&id).is_some());
        }
        self.check();
    }

    fn check(&mut self) {
        for who in 0..4 {
            for what in 0..3 {
                if self.truly(who, what) {
                    self.allowed.insert((who, what), self.now);
                }
            }
        }
        let current = self.cache.is_live() && self.cache.position() == Some(self.master_position());
        for who in 0..4 {
            for what in 0..3 {
                let verdict = self.cache.decide(&ask(who, what), Some(Epoch::FIRST), self.now);
                if verdict.outcome.is_ok() {
                    let longest = match verdict.tier {
                        Tier::Fresh => LEASE,
                        Tier::Grace => LEASE + GRACE,
                        Tier::Expired => panic!("allowed although expired"),
                    };
                    let last = self.allowed.get(&(who, what)).expect("never allowed in truth");
                    assert!(self.now - *last <= longest, "allowed for too long after its end");
                }
                if current && verdict.tier == Tier::Fresh {
                    assert_eq!(verdict.outcome.is_ok(), self.truly(who, what), "{who} {what}");
                }
            }
        }
        assert_eq!(self.cache.connections(), self.open.len());
        for (who, what) in self.open.values() {
            let verdict = self.cache.decide(&ask(*who, *what), Some(Epoch::FIRST), self.now);
            assert_eq!(verdict.outcome, Ok(()), "an open connection that would not be admitted");
        }
    }
}

#[test]
fn a_lossy_world_never_allows_for_longer_than_lease_and_grace() {
    let seeds = match std::env::var("COCALC_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("COCALC_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..150,
    };
    let mut allowed = 0;
    for seed in seeds {
        println!("COCALC_SEED={seed}");
        let mut world = World::new(seed);
        world.sync();
        for _ in 0..400 {
            world.step();
        }
        allowed += world.open.len();
        // In the end the stream is whole again, and so is the knowledge.
        world.sync();
        while let Some(frame) = world.wire.pop_front() {
            world.deliver(&frame);
        }
        assert!(!world.cache.renewed(world.now, LEASE, None, world.master_position()));
        assert_eq!(world.cache.tier(world.now), Tier::Fresh);
        world.check();
    }
    assert!(allowed > 0, "a world in which nobody gets in shows nothing");
}

#[test]
fn entries_for_the_daemon_are_kept_by_name() {
    let (mut cache, mut sender) = live();
    let host = HostId::from_bytes([1; 16]);
    let entry = Entry::Host { host, address: serde_json::json!({"url": "http://a"}) };
    let save = sender.send(&mut cache, entry.clone()).save.unwrap();
    assert_eq!(save.entries, BTreeMap::from([(format!("host/{host}"), Some(entry))]));
    let gone = sender.send(&mut cache, Entry::ProjectGone { project: project(1) }).save.unwrap();
    assert_eq!(gone.entries, BTreeMap::from([(format!("project/{}", project(1)), None)]));
    let mut sum = save;
    sum.merge(gone);
    assert_eq!((sum.entries.len(), sum.position), (2, Some(sender.at)));
    sum.merge(Save { clear: true, position: Some(sender.at), ..Save::default() });
    assert!(sum.entries.is_empty() && sum.clear);
}

/// What was opened under one log-in ends with it, and nothing else does.
#[test]
fn a_log_in_ends_alone() {
    let (mut cache, mut sender) = live();
    let tag = |n| LoginTag::of(KeyId::from_bytes([n; 16]));
    let under =
        |n| Ask { login: Some(tag(n)), proof: Proof::Session(SessionHash::from_bytes([n; 32])), ..ask(1, 1) };
    let mut admit = |ask: &Ask| cache.admit(ask, Some(Epoch::FIRST), START).1.expect("it is allowed");
    let (ended, _, _) = (admit(&under(1)), admit(&under(2)), admit(&ask(1, 1)));
    let applied =
        sender.send(&mut cache, Entry::Account(AccountState { ended_logins: vec![tag(1)], ..state(1, 0) }));
    assert_eq!(applied.close, [(ended, Refusal::SignedOut)], "and no other");
    assert_eq!(outcome(&cache, &under(1), START), Err(Refusal::SignedOut));
    let token = Ask { proof: Proof::Token, ..under(1) };
    assert_eq!(outcome(&cache, &token, START), Err(Refusal::SignedOut));
    assert_eq!(outcome(&cache, &under(2), START), Ok(()));
    assert_eq!(cache.connections(), 2);
}
