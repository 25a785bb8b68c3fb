//! A host on the stream of a master: what is allowed, and when it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

mod rig;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cocalc_auth::{
    mint::NewToken,
    session::{SessionHash, SessionRecord},
    store::{AclStore, EndSessions, MemoryStore, Save, Saved, StoreError},
    stream::{AccountState, Entry, ProjectAcl},
    token::{TokenId, Usage},
};
use cocalc_auth_live::ProxyCheck;
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Denial, Secret, Tier, Via},
    clock::SystemClock,
    control::Settings,
    ids::{Action, Epoch, HostId, ProjectId, ProxyId, Scope, Timestamp},
    memory::{bus::MemoryBus, clock::ManualClock},
};
use rig::{Master, Rig, account, acl, host, project, relaxed, state};

const HTTP: Action = Action::Use(Scope::Http);

async fn ends(admission: &Admission) -> Denial {
    tokio::time::timeout(Duration::from_secs(60), admission.revoked()).await.expect("it was not ended")
}

fn is_open(admission: &Admission) -> bool {
    use futures_util::FutureExt;
    admission.revoked().now_or_never().is_none()
}

async fn admit(rig: &Rig, credential: &Credential) -> Admission {
    let principal = rig.verify(credential).await.unwrap();
    rig.auth.admit(&principal, project(1), HTTP).await.unwrap()
}

#[tokio::test]
async fn a_revocation_ends_what_it_concerns_and_is_acknowledged() {
    let rig = Rig::new(relaxed()).await;
    let of_1 = admit(&rig, &rig.master.token(|new| new)).await;
    let of_2 = rig.master.token(|_| {
        NewToken::new(rig::ISSUER, host(), account(2), project(1), Epoch::FIRST).scopes([Scope::Http])
    });
    let admitted_2 = admit(&rig, &of_2).await;
    rig.master.send(Entry::Project(acl(1, 2, &[1]))).await;
    assert_eq!(ends(&admitted_2).await, Denial::Forbidden("not a member of the project".to_owned()));
    assert!(is_open(&of_1));
    // Not acknowledged before the connection is really gone.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let last = rig.master.lock().seq;
    assert!(rig.master.lock().acknowledged < Some((1, last)));
    drop(admitted_2);
    rig.until("the acknowledgement", || rig.master.lock().acknowledged == Some((1, last))).await;
    assert_eq!(rig.knowledge.connections(), 1);
    let principal = rig.verify(&of_2).await.unwrap();
    let decision = rig.auth.authorize(&principal, project(1), HTTP).await;
    assert!(matches!(decision.outcome, Err(Denial::Forbidden(_))) && decision.tier == Tier::Fresh);
}

#[tokio::test]
async fn each_credential_that_must_not_pass() {
    let rig = Rig::new(relaxed()).await;
    let token = |change: fn(NewToken) -> NewToken| rig.master.token(change);
    let elsewhere = |host, project_| {
        let new = NewToken::new(rig::ISSUER, host, account(1), project_, Epoch::FIRST).scopes([Scope::Http]);
        rig.master.token(|_| new)
    };
    let code = |denial: Denial| denial.public();
    let good = token(|new| new);
    assert!(rig.verify(&good).await.is_ok());
    let Credential::Token(secret) = &good else { panic!() };
    let mut tampered = secret.expose().to_owned();
    tampered.replace_range(200..201, if &tampered[200..201] == "A" { "B" } else { "A" });
    for bad in [
        elsewhere(HostId::from_bytes([9; 16]), project(1)),
        elsewhere(host(), project(2)),
        Credential::Token(Secret::new(tampered)),
        Credential::Token(Secret::new("")),
        Credential::Session(Secret::new("x")),
        Credential::SshKey("ssh-ed25519 UNKNOWN".to_owned()),
        Credential::AttestedSshKey { key: "ssh-ed25519 KEY1".to_owned(), proxy: "x".to_owned() },
    ] {
        assert_eq!(code(rig.verify(&bad).await.unwrap_err()), (403, "access_denied"), "{bad:?}");
    }
    // Authentic, and over: the only thing that is said.
    let issued = Timestamp::from_secs(Timestamp::now().secs() - 100);
    let old = NewToken::new(rig::ISSUER, host(), account(1), project(1), Epoch::FIRST).scopes([Scope::Http]);
    let old = rig.master.lock().ring.mint(&old, issued).unwrap().token;
    let denial = rig.verify(&Credential::Token(Secret::new(old))).await.unwrap_err();
    assert_eq!(code(denial), (401, "token_expired"));

    // Verified, and yet not enough.
    let other_epoch =
        NewToken::new(rig::ISSUER, host(), account(1), project(1), Epoch::FIRST.next()).scopes([Scope::Http]);
    let stranger =
        NewToken::new(rig::ISSUER, host(), account(3), project(1), Epoch::FIRST).scopes([Scope::Http]);
    let signed_out = NewToken::new(rig::ISSUER, host(), account(1), project(1), Epoch::FIRST)
        .scopes([Scope::Http])
        .session_epoch(0);
    rig.master.send(Entry::Account(AccountState { session_epoch: 1, ..state(1) })).await;
    rig.until("the sign-out", || rig.knowledge.with(|acl| acl.session_epoch(account(1))) == Some(1)).await;
    for new in [other_epoch, stranger, signed_out] {
        let principal = rig.verify(&rig.master.token(|_| new)).await.unwrap();
        let denial = rig.auth.admit(&principal, project(1), HTTP).await.unwrap_err();
        assert_eq!(code(denial), (403, "access_denied"), "{principal:?}");
    }
    let principal =
        rig.verify(&rig.master.token(|new| new.session_epoch(1).scopes([Scope::Ssh]))).await.unwrap();
    assert!(rig.auth.admit(&principal, project(1), HTTP).await.is_err(), "a scope it does not have");
    assert!(rig.auth.admit(&principal, project(2), Action::Use(Scope::Ssh)).await.is_err());
    assert!(rig.auth.admit(&principal, project(1), Action::Use(Scope::Ssh)).await.is_ok());
}

#[tokio::test]
async fn a_one_use_token_opens_one_session() {
    let rig = Rig::new(relaxed()).await;
    let token = rig.master.token(|new| new.usage(Usage::Once));
    let principal = rig.verify(&token).await.unwrap();
    assert!(matches!(rig.auth.admit(&principal, project(1), HTTP).await, Err(Denial::Forbidden(_))));
    let cookie = rig.auth.open_session(&principal, project(1)).await.unwrap();
    assert_eq!(rig.auth.open_session(&principal, project(1)).await.unwrap_err(), Denial::Used);

    let session = Credential::Session(cookie.clone());
    let by_session = rig.verify(&session).await.unwrap();
    assert_eq!((by_session.account, by_session.epoch), (account(1), None));
    assert!(matches!(by_session.via, Via::Session { .. }));
    let elsewhere = Context { project: project(2), source: None };
    assert!(rig.auth.verify(&session, &elsewhere).await.is_err());
    assert!(rig.auth.open_session(&by_session, project(1)).await.is_err(), "a session opens no other");

    let admission = admit(&rig, &session).await;
    rig.knowledge.end_session(SessionHash::of_cookie(cookie.expose()).unwrap()).unwrap();
    assert_eq!(ends(&admission).await, Denial::Forbidden("the session was ended".to_owned()));
    assert!(rig.verify(&session).await.is_err());
    // A `multi` token opens as many as are asked for.
    let principal = rig.verify(&rig.master.token(|new| new)).await.unwrap();
    for _ in 0..2 {
        rig.auth.open_session(&principal, project(1)).await.unwrap();
    }
}

#[tokio::test]
async fn a_withdrawn_key_ends_sessions_and_connections() {
    let rig = Rig::new(relaxed()).await;
    let token = rig.master.token(|new| new);
    let admission = admit(&rig, &token).await;
    let principal = rig.verify(&token).await.unwrap();
    let cookie = Credential::Session(rig.auth.open_session(&principal, project(1)).await.unwrap());
    let ring = {
        let mut truth = rig.master.lock();
        let kid = truth.ring.current_kid().to_owned();
        truth.ring.withdraw(&kid, Timestamp::now()).unwrap();
        truth.ring.public()
    };
    rig.master.send(Entry::KeyRing(ring)).await;
    ends(&admission).await;
    drop(admission);
    let last = rig.master.lock().seq;
    rig.until("the acknowledgement", || rig.master.lock().acknowledged == Some((1, last))).await;
    assert!(rig.verify(&token).await.is_err());
    assert!(rig.verify(&cookie).await.is_err());
    assert!(rig.verify(&rig.master.token(|new| new)).await.is_ok());
}

#[tokio::test]
async fn tiers_pass_without_the_master_and_come_back_with_it() {
    let settings = Settings { keepalive_ms: 100, lease_ms: 1_000, grace_ms: 1_000 };
    let rig = Rig::new(settings).await;
    let admission = admit(&rig, &rig.master.token(|new| new)).await;
    rig.master.lock().silent = true;
    rig.wait_for(Tier::Grace).await;
    assert!(is_open(&admission), "within the grace nothing breaks");
    let principal = rig.verify(&rig.master.token(|new| new)).await.unwrap();
    let decision = rig.auth.authorize(&principal, project(1), HTTP).await;
    assert_eq!((decision.outcome, decision.tier), (Ok(()), Tier::Grace));
    assert_eq!(ends(&admission).await, Denial::Stale);
    rig.wait_for(Tier::Expired).await;
    let decision = rig.auth.authorize(&principal, project(1), HTTP).await;
    assert_eq!(decision.outcome, Err(Denial::Stale));
    rig.master.lock().silent = false;
    rig.wait_for(Tier::Fresh).await;
    assert!(is_open(&admit(&rig, &rig.master.token(|new| new)).await));
}

#[tokio::test]
async fn one_fetch_serves_all_who_wait() {
    let rig = Rig::new(relaxed()).await;
    rig.master.lock().hidden.insert(project(2), acl(2, 3, &[1]));
    let key = Credential::SshKey("ssh-ed25519 KEY1".to_owned());
    let ask = |n| {
        let (auth, key) = (rig.auth.clone(), key.clone());
        tokio::spawn(async move { auth.verify(&key, &Context { project: project(n), source: None }).await })
    };
    let asked: Vec<_> = (0..20).map(|_| ask(2)).collect();
    for one in asked {
        assert_eq!(one.await.unwrap().unwrap().account, account(1));
    }
    assert_eq!(rig.master.lock().fetches, 1);
    // What the master does not know is not asked for again and again.
    let before = rig.master.lock().fetches;
    for _ in 0..3 {
        assert!(ask(3).await.unwrap().is_err());
    }
    assert_eq!(rig.master.lock().fetches, before + 1);
    // What this host does not hold is not asked for at all.
    assert!(matches!(ask(200).await.unwrap(), Err(Denial::NotHere(_))));
    assert_eq!(rig.master.lock().fetches, before + 1);
    // A token that demands a newer ACL fetches it.
    rig.master.lock().hidden.insert(project(1), acl(1, 9, &[1]));
    let principal = rig.verify(&rig.master.token(|new| new.acl(9))).await.unwrap();
    assert_eq!(rig.auth.authorize(&principal, project(1), HTTP).await.outcome, Ok(()));
    let principal = rig.verify(&rig.master.token(|new| new.acl(10))).await.unwrap();
    assert!(rig.auth.authorize(&principal, project(1), HTTP).await.outcome.is_err());
}

#[tokio::test]
async fn a_new_life_of_the_master_is_followed() {
    let rig = Rig::new(relaxed()).await;
    let stays = admit(&rig, &rig.master.token(|new| new)).await;
    let of_2 = rig.master.token(|_| {
        NewToken::new(rig::ISSUER, host(), account(2), project(1), Epoch::FIRST).scopes([Scope::Http])
    });
    let goes = admit(&rig, &of_2).await;
    {
        let mut truth = rig.master.lock();
        (truth.stream, truth.seq, truth.registered) = (2, 0, false);
        truth.projects.insert(project(1), acl(1, 2, &[1]));
    }
    ends(&goes).await;
    assert!(is_open(&stays));
    assert_eq!(rig.master.lock().registrations, 2);
    rig.until("the new stream", || rig.knowledge.position().is_some_and(|at| at.stream == 2)).await;
}

#[tokio::test]
async fn a_missed_frame_is_asked_for() {
    let rig = Rig::new(relaxed()).await;
    // Lost on the way; the keepalive betrays it although nothing follows.
    rig.master.lock().seq += 1;
    rig.master.lock().projects.insert(project(1), acl(1, 2, &[2]));
    let principal = rig.verify(&rig.master.token(|new| new)).await.unwrap();
    rig.until("the resync", || {
        rig.knowledge.with(|acl| acl.project(project(1)).map(|acl| acl.version)) == Some(2)
    })
    .await;
    assert!(rig.auth.authorize(&principal, project(1), HTTP).await.outcome.is_err());
}

#[tokio::test]
async fn a_restart_keeps_the_lease_while_the_master_is_away() {
    let rig = Rig::new(relaxed()).await;
    let token = rig.master.token(|new| new);
    rig.until("the saved lease", || {
        let saved = rig.store.load().unwrap();
        saved.standing.is_some_and(|text| text.contains("\"lease_ms\":["))
    })
    .await;
    rig.master.lock().silent = true;
    let again = Rig::offline(rig.bus.clone(), rig.master.clone(), rig.store.clone(), Arc::new(SystemClock));
    assert!(is_open(&admit(&again, &token).await));
    assert_eq!(again.knowledge.tier_of(project(1)), Tier::Fresh);
}

#[tokio::test]
async fn a_restored_store_is_noticed_by_the_mark() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let rig = Rig::new(relaxed()).await;
    let position = rig.knowledge.position().unwrap();
    std::fs::write(&mark, format!("{} {}\n", position.stream, position.seq + 1)).unwrap();
    let open = |mark| {
        let clock = Arc::new(SystemClock);
        cocalc_auth_live::Knowledge::open_in_boot(rig.store.clone(), clock, mark, "boot".to_owned()).unwrap()
    };
    rig.until("the saved lease", || rig.store.load().unwrap().standing.is_some()).await;
    assert_eq!(*open(Some(mark.clone())).tier().borrow(), Tier::Expired);
    std::fs::write(&mark, format!("{} {}\n", position.stream, position.seq)).unwrap();
    assert_eq!(*open(Some(mark)).tier().borrow(), Tier::Fresh);
}

#[tokio::test]
async fn one_use_tokens_from_before_the_boot_are_not_believed() {
    let bus = MemoryBus::new();
    let master = Master::start(&bus, relaxed()).await;
    // 1,000 s after boot, by this clock.
    let clock = ManualClock::new(Timestamp::now());
    let store = Arc::new(cocalc_auth::store::MemoryStore::default());
    let mut rig = Rig::offline(bus, master, store, Arc::new(clock.clone()));
    rig.connect();
    rig.wait_for(Tier::Fresh).await;
    let once = rig.master.token(|new| new.usage(Usage::Once).ttl(Duration::from_secs(300)));
    assert!(rig.verify(&once).await.is_ok());
    rig.until("the saved lease", || rig.store.load().unwrap().standing.is_some()).await;
    drop(rig.driver.take());

    // The same machine, a moment after it came up again.
    let saved = rig.store.load().unwrap();
    let standing = saved.standing.unwrap();
    rig.store.save_standing(&standing.replace("\"boot\"", "\"an earlier boot\"")).unwrap();
    #[derive(Debug)]
    struct JustBooted;
    impl cocalc_core::clock::Clock for JustBooted {
        fn wall(&self) -> Timestamp {
            Timestamp::now()
        }

        fn boot(&self) -> Duration {
            Duration::from_secs(3)
        }
    }
    let rebooted = Rig::offline(rig.bus.clone(), rig.master.clone(), rig.store.clone(), Arc::new(JustBooted));
    assert_eq!(rebooted.verify(&once).await.unwrap_err(), Denial::Used);
    let multi = rig.master.token(|new| new);
    assert!(rebooted.verify(&multi).await.is_ok());
    assert_eq!(*rebooted.knowledge.tier().borrow(), Tier::Expired, "a reboot voids the lease");
}

#[tokio::test]
async fn a_wall_clock_that_is_far_off_refuses_tokens_and_a_jump_does_not_matter_to_leases() {
    let bus = MemoryBus::new();
    let master = Master::start(&bus, relaxed()).await;
    let clock = ManualClock::new(Timestamp::now());
    let store = Arc::new(cocalc_auth::store::MemoryStore::default());
    let mut rig = Rig::offline(bus, master, store, Arc::new(clock.clone()));
    rig.connect();
    rig.wait_for(Tier::Fresh).await;
    let token = rig.master.token(|new| new);
    assert!(rig.verify(&token).await.is_ok());
    clock.jump(Timestamp::now().plus(Duration::from_secs(20)));
    assert!(rig.verify(&token).await.is_ok(), "master time is what counts");
    clock.jump(Timestamp::now().plus(Duration::from_secs(40)));
    assert_eq!(rig.verify(&token).await.unwrap_err(), Denial::Stale);
    assert_eq!(rig.knowledge.tier_of(project(1)), Tier::Fresh);
}

/// Fails to save for as long as it is told to.
#[derive(Debug, Default)]
struct FullDisk {
    memory: MemoryStore,
    full: AtomicBool,
}

impl AclStore for FullDisk {
    fn load(&self) -> Result<Saved, StoreError> {
        self.memory.load()
    }

    fn save(&self, save: &Save) -> Result<(), StoreError> {
        if self.full.load(Ordering::SeqCst) {
            return Err(StoreError { operation: "save", source: "no space left".into() });
        }
        self.memory.save(save)
    }

    fn save_standing(&self, standing: &str) -> Result<(), StoreError> {
        self.memory.save_standing(standing)
    }

    fn insert_used(&self, id: &TokenId, expires: Timestamp) -> Result<bool, StoreError> {
        self.memory.insert_used(id, expires)
    }

    fn forget_used(&self, now: Timestamp) -> Result<usize, StoreError> {
        self.memory.forget_used(now)
    }

    fn insert_session(&self, hash: &SessionHash, session: &SessionRecord) -> Result<(), StoreError> {
        self.memory.insert_session(hash, session)
    }

    fn session(&self, hash: &SessionHash) -> Result<Option<SessionRecord>, StoreError> {
        self.memory.session(hash)
    }

    fn sessions_of(&self, project: ProjectId) -> Result<Vec<(SessionHash, SessionRecord)>, StoreError> {
        self.memory.sessions_of(project)
    }

    fn end_sessions(&self, which: &EndSessions) -> Result<usize, StoreError> {
        self.memory.end_sessions(which)
    }
}

#[tokio::test]
async fn what_cannot_be_saved_closes_but_is_not_acknowledged() {
    let bus = MemoryBus::new();
    let master = Master::start(&bus, relaxed()).await;
    let store = Arc::new(FullDisk::default());
    let mut rig = Rig::offline(bus, master, store.clone(), Arc::new(SystemClock));
    rig.connect();
    rig.wait_for(Tier::Fresh).await;
    let last = rig.master.lock().seq;
    rig.until("the first acknowledgement", || rig.master.lock().acknowledged == Some((1, last))).await;
    let admission = admit(&rig, &rig.master.token(|new| new)).await;

    store.full.store(true, Ordering::SeqCst);
    rig.master.lock().projects.insert(project(1), acl(1, 2, &[2]));
    rig.master.send(Entry::Project(acl(1, 2, &[2]))).await;
    ends(&admission).await;
    drop(admission);
    let syncs = rig.master.lock().syncs.len();
    rig.until("another try", || rig.master.lock().syncs.len() > syncs).await;
    assert_eq!(rig.master.lock().acknowledged, Some((1, last)));

    store.full.store(false, Ordering::SeqCst);
    rig.until("the acknowledgement", || rig.master.lock().acknowledged > Some((1, last))).await;
    let saved = store.load().unwrap();
    assert!(saved.entries.contains(&Entry::Project(acl(1, 2, &[2]))));
}

#[tokio::test]
async fn dropping_the_driver_ends_its_tasks() {
    let mut rig = Rig::new(relaxed()).await;
    let weak = Arc::downgrade(&rig.entries);
    rig.driver = None;
    let Rig { entries, .. } = rig;
    drop(entries);
    for _ in 0..500 {
        if weak.upgrade().is_none() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a task still holds the daemon's handler");
}

#[tokio::test]
async fn a_proxy_checks_the_token_and_leaves_the_rest_to_the_host() {
    let settings = Settings { keepalive_ms: 100, lease_ms: 1_000, grace_ms: 0 };
    let rig = Rig::new(settings).await;
    let check = ProxyCheck::new(rig.knowledge.clone());
    let elsewhere = HostId::from_bytes([9; 16]);
    let stranger = NewToken::new(rig::ISSUER, elsewhere, account(9), project(1), Epoch::FIRST);
    let Credential::Token(token) = rig.master.token(|_| stranger.scopes([Scope::Http]).usage(Usage::Once))
    else {
        panic!()
    };
    // For another host, of somebody unknown, and once: again and again.
    for _ in 0..2 {
        let claims = check.token(token.expose(), project(1)).unwrap();
        assert_eq!((claims.aud.0, claims.sub), (elsewhere, account(9)));
    }
    assert!(matches!(check.token(token.expose(), project(2)), Err(Denial::BadCredential(_))));
    assert!(matches!(check.token("a.b.c", project(1)), Err(Denial::BadCredential(_))));
    rig.master.lock().silent = true;
    rig.wait_for(Tier::Expired).await;
    assert_eq!(check.token(token.expose(), project(1)).unwrap_err(), Denial::Stale);
}

#[tokio::test]
async fn an_enrolled_proxy_attests_where_it_is_allowed() {
    let rig = Rig::new(relaxed()).await;
    let proxy = ProxyId::from_bytes([5; 16]);
    let attested =
        Credential::AttestedSshKey { key: "ssh-ed25519 KEY1".to_owned(), proxy: proxy.to_string() };
    rig.master.send(Entry::Proxy { proxy, identity: Some("key".to_owned()) }).await;
    let allowed = |version, proxy_ssh| Entry::Project(ProjectAcl { proxy_ssh, ..acl(1, version, &[1]) });
    let version = || rig.knowledge.with(|acl| acl.project(project(1)).map(|acl| acl.version));
    for (at, proxy_ssh) in [(2, false), (3, true)] {
        rig.master.send(allowed(at, proxy_ssh)).await;
        rig.until("the change", || version() == Some(at)).await;
        assert_eq!(rig.verify(&attested).await.is_ok(), proxy_ssh);
    }
    let ssh = Action::Use(Scope::Ssh);
    let principal = rig.verify(&attested).await.unwrap();
    let admission = rig.auth.admit(&principal, project(1), ssh).await.unwrap();
    assert!(rig.auth.admit(&principal, project(1), HTTP).await.is_err(), "a key opens SSH only");
    // The key is taken off the account's list.
    rig.master.send(Entry::Account(AccountState { keys: vec![], ..state(1) })).await;
    assert_eq!(ends(&admission).await, Denial::Forbidden("the key was removed".to_owned()));
    rig.master.send(Entry::Account(state(1))).await;
    let listed = || rig.knowledge.with(|acl| acl.find_key(project(1), "ssh-ed25519 KEY1").unwrap().is_some());
    rig.until("the key", listed).await;
    // What it let in ends with it, and nothing else.
    let own = rig.verify(&Credential::SshKey("ssh-ed25519 KEY1".to_owned())).await.unwrap();
    let own = rig.auth.admit(&own, project(1), ssh).await.unwrap();
    let withdrawn = Denial::Forbidden("this proxy may not attest for the project".to_owned());
    let admission = rig.auth.admit(&principal, project(1), ssh).await.unwrap();
    rig.master.send(Entry::Proxy { proxy, identity: None }).await;
    assert_eq!(ends(&admission).await, withdrawn);
    assert_eq!(rig.verify(&attested).await.unwrap_err(), withdrawn);
    rig.master.send(Entry::Proxy { proxy, identity: Some("key".to_owned()) }).await;
    rig.until("the proxy", || rig.knowledge.with(|acl| acl.attesting_proxy(project(1), proxy).is_some()))
        .await;
    let admission = rig.auth.admit(&principal, project(1), ssh).await.unwrap();
    rig.master.send(allowed(4, false)).await;
    assert_eq!(ends(&admission).await, withdrawn, "the owner lets proxies no more");
    assert!(is_open(&own));
}

#[tokio::test]
async fn who_holds_a_key_of_a_project_that_left_is_known_but_opens_nothing() {
    let rig = Rig::new(relaxed()).await;
    // Another host has it; what was cached has not been withdrawn yet.
    let left = project(200);
    let known = || rig.knowledge.with(|acl| acl.project(left).is_some());
    rig.master.send(Entry::Project(acl(200, 1, &[1]))).await;
    rig.until("the project", known).await;
    let context = Context { project: left, source: None };
    let key = |n: u8| format!("ssh-ed25519 KEY{n}");
    let verify = async |credential| rig.auth.verify(&credential, &context).await;
    let principal = verify(Credential::SshKey(key(1))).await.unwrap();
    assert_eq!(principal.account, account(1));
    let ssh = Action::Use(Scope::Ssh);
    let outcome = rig.auth.authorize(&principal, left, ssh).await.outcome;
    assert!(matches!(outcome, Err(Denial::NotHere(_))), "{outcome:?}");
    assert!(matches!(rig.auth.admit(&principal, left, ssh).await, Err(Denial::NotHere(_))));
    // No member, and a proxy that may not attest as far as is known here.
    let proxy = ProxyId::from_bytes([5; 16]).to_string();
    for other in [Credential::SshKey(key(2)), Credential::AttestedSshKey { key: key(1), proxy }] {
        assert!(matches!(verify(other).await, Err(Denial::NotHere(_))));
    }
    rig.master.send(Entry::ProjectGone { project: left }).await;
    rig.until("the withdrawal", || !known()).await;
    assert!(matches!(verify(Credential::SshKey(key(1))).await, Err(Denial::NotHere(_))));
    assert_eq!(rig.master.lock().fetches, 0);
}

#[tokio::test]
async fn sessions_move_with_their_project() {
    let (from, to) = (Rig::new(relaxed()).await, Rig::new(relaxed()).await);
    let principal = from.verify(&from.master.token(|new| new)).await.unwrap();
    let cookie = Credential::Session(from.auth.open_session(&principal, project(1)).await.unwrap());
    let sessions = from.knowledge.project_sessions(project(1)).unwrap();
    assert_eq!(sessions.len(), 1);
    assert!(to.verify(&cookie).await.is_err());
    to.knowledge.adopt_sessions(project(2), &sessions).unwrap();
    assert!(to.verify(&cookie).await.is_err(), "sessions of another project than the one that moves");
    to.knowledge.adopt_sessions(project(1), &sessions).unwrap();
    assert_eq!(to.verify(&cookie).await.unwrap().account, account(1));
    let admission = admit(&from, &cookie).await;
    from.knowledge.close_project(project(1));
    assert!(matches!(ends(&admission).await, Denial::NotHere(_)));
    assert_eq!(from.knowledge.end_project_sessions(project(1)).unwrap(), 1);
    assert!(from.verify(&cookie).await.is_err());
}
