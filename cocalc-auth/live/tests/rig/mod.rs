//! A small master on an in-memory bus, and a host that is connected to it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    unreachable_pub,
    reason = "each test binary uses a part; a test fails by panicking"
)]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{
    mint::{NewToken, SigningRing},
    store::{AclStore, MemoryStore},
    stream::{AccountState, Entry, Frame, ProjectAcl},
    token::Algorithm,
};
use cocalc_auth_live::{DriverConfig, Knowledge, PeerHandler, StreamDriver, TokenAuth};
use cocalc_core::{
    auth::{Auth, Context, Credential, Denial, Principal, Secret, Tier},
    bus::{Bus, Payload},
    clock::{Clock, SystemClock},
    connector::Peer,
    control::{
        Keepalive, KeepaliveReply, PeerReply, PeerRequest, Register, Registered, Settings, api_subject,
        keepalive_subject, stream_subject,
    },
    ids::{AccountId, Epoch, HostId, KeyId, ProjectId, Role, Scope, SessionId, Timestamp},
    memory::bus::MemoryBus,
};

pub const ISSUER: &str = "http://master.test";

pub fn account(n: u8) -> AccountId {
    AccountId::from_bytes([n; 16])
}

pub fn project(n: u8) -> ProjectId {
    ProjectId::from_bytes([n; 16])
}

pub fn host() -> HostId {
    HostId::from_bytes([7; 16])
}

pub fn acl(n: u8, version: u64, members: &[u8]) -> ProjectAcl {
    ProjectAcl {
        project: project(n),
        version,
        epoch: Epoch::FIRST,
        members: members.iter().map(|n| (account(*n), Role::Collaborator)).collect(),
        keys: vec![],
        grace_ms: None,
        proxy_ssh: false,
        authorized_keys: false,
        viewable_ports: Vec::new(),
    }
}

pub fn state(n: u8) -> AccountState {
    let key = cocalc_auth::stream::SshKey {
        id: KeyId::from_bytes([n; 16]),
        account: account(n),
        key: format!("ssh-ed25519 KEY{n}"),
        options: String::new(),
    };
    AccountState {
        account: account(n),
        session_epoch: 0,
        ended_logins: vec![],
        banned: false,
        keys: vec![key],
    }
}

/// What the master knows, and does when asked.
pub struct Truth {
    pub ring: SigningRing,
    pub projects: BTreeMap<ProjectId, ProjectAcl>,
    /// Projects that are sent only when they are fetched.
    pub hidden: BTreeMap<ProjectId, ProjectAcl>,
    pub accounts: Vec<AccountState>,
    pub settings: Settings,
    pub stream: u64,
    pub seq: u64,
    pub registered: bool,
    pub silent: bool,
    pub registrations: usize,
    pub fetches: usize,
    pub syncs: Vec<Option<(u64, u64)>>,
    pub acknowledged: Option<(u64, u64)>,
}

#[derive(Clone)]
pub struct Master {
    pub truth: Arc<Mutex<Truth>>,
    bus: Arc<dyn Bus>,
    peer: Peer,
}

impl Master {
    pub fn lock(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().unwrap()
    }

    pub async fn start(bus: &MemoryBus, settings: Settings) -> Self {
        let peer = Peer::Host(host());
        let truth = Truth {
            ring: SigningRing::generate(Algorithm::EdDsa, Timestamp::now()).unwrap(),
            projects: [(project(1), acl(1, 1, &[1, 2]))].into(),
            hidden: BTreeMap::new(),
            accounts: vec![state(1), state(2)],
            settings,
            stream: 1,
            seq: 0,
            registered: false,
            silent: false,
            registrations: 0,
            fetches: 0,
            syncs: vec![],
            acknowledged: None,
        };
        let master = Self {
            truth: Arc::new(Mutex::new(truth)),
            bus: Arc::new(bus.client("master", |_, _| true)),
            peer,
        };
        for subject in [api_subject(peer), keepalive_subject(peer)] {
            let mut requests = master.bus.subscribe(&subject, None).await.unwrap();
            let master = master.clone();
            tokio::spawn(async move {
                while let Some(message) = requests.next().await {
                    if master.lock().silent {
                        continue;
                    }
                    let reply = if message.subject.ends_with(".keepalive") {
                        message.payload.parse::<Keepalive>().unwrap();
                        Payload::json(&master.keepalive()).unwrap()
                    } else {
                        Payload::json(&master.api(message.payload.parse().unwrap()).await).unwrap()
                    };
                    let _ = master.bus.publish(&message.reply.unwrap(), reply).await;
                }
            });
        }
        master
    }

    fn keepalive(&self) -> KeepaliveReply {
        let truth = self.lock();
        KeepaliveReply {
            lease_ms: if truth.registered { truth.settings.lease_ms } else { 0 },
            position: (truth.stream, truth.seq),
            now: Timestamp::now(),
        }
    }

    async fn api(&self, request: PeerRequest) -> PeerReply {
        match request {
            PeerRequest::Register(_) => {
                let mut truth = self.lock();
                truth.registered = true;
                truth.registrations += 1;
                return PeerReply::Registered(Registered {
                    issuer: ISSUER.to_owned(),
                    settings: truth.settings,
                    owners: vec![],
                    now: Timestamp::now(),
                    backups: None,
                });
            }
            PeerRequest::Sync { position } => {
                let entries = {
                    let mut truth = self.lock();
                    truth.syncs.push(position);
                    if position == Some((truth.stream, truth.seq)) {
                        return PeerReply::Done;
                    }
                    let ring = Entry::KeyRing(truth.ring.public());
                    let accounts = truth.accounts.iter().cloned().map(Entry::Account);
                    let projects = truth.projects.values().cloned().map(Entry::Project);
                    let whole = [Entry::Reset, ring].into_iter().chain(accounts).chain(projects);
                    whole.chain([Entry::Live]).collect::<Vec<_>>()
                };
                for entry in entries {
                    self.send(entry).await;
                }
            }
            PeerRequest::Acknowledge { stream, seq } => self.lock().acknowledged = Some((stream, seq)),
            PeerRequest::FetchProject { project } => {
                let found = {
                    let mut truth = self.lock();
                    truth.fetches += 1;
                    truth.hidden.get(&project).cloned()
                };
                match found {
                    Some(acl) => self.send(Entry::Project(acl)).await,
                    None => return PeerReply::Error { message: "no such project".to_owned() },
                }
            }
            other => panic!("unexpected {other:?}"),
        }
        PeerReply::Done
    }

    pub async fn send(&self, entry: Entry) {
        let frame = {
            let mut truth = self.lock();
            truth.seq += 1;
            Frame { stream: truth.stream, seq: truth.seq, entry }
        };
        let payload = Payload::json(&frame).unwrap();
        let _ = self.bus.publish(&stream_subject(self.peer), payload).await;
    }

    pub fn token(&self, change: impl FnOnce(NewToken) -> NewToken) -> Credential {
        let new = NewToken::new(ISSUER, host(), account(1), project(1), Epoch::FIRST)
            .scopes([Scope::Http, Scope::Ws, Scope::Ssh])
            .acl(1);
        let minted = self.lock().ring.mint(&change(new), Timestamp::now()).unwrap();
        Credential::Token(Secret::new(minted.token))
    }
}

struct Handler {
    entries: Arc<Mutex<Vec<Entry>>>,
}

#[async_trait]
impl PeerHandler for Handler {
    async fn register(&self) -> Register {
        Register {
            name: "alpha".parse().unwrap(),
            session: SessionId::from_bytes([1; 16]),
            boot_id: "boot".to_owned(),
            address: Default::default(),
            ssh_host_keys: vec![],
            capabilities: None,
            held: vec![],
        }
    }

    fn registered(&self, _: &Registered) {}

    fn entry(&self, entry: &Entry) {
        self.entries.lock().unwrap().push(entry.clone());
    }
}

pub struct Rig {
    pub bus: MemoryBus,
    pub master: Master,
    pub store: Arc<dyn AclStore>,
    pub knowledge: Arc<Knowledge>,
    pub driver: Option<StreamDriver>,
    pub auth: Arc<TokenAuth>,
    pub entries: Arc<Mutex<Vec<Entry>>>,
}

/// Long enough that no test comes near it by itself.
pub fn relaxed() -> Settings {
    Settings { keepalive_ms: 200, lease_ms: 60_000, grace_ms: 600_000 }
}

pub fn held(asked: ProjectId) -> Option<Epoch> {
    // Projects from 100 are another host's.
    (asked < project(100)).then_some(Epoch::FIRST)
}

impl Rig {
    pub async fn new(settings: Settings) -> Self {
        let bus = MemoryBus::new();
        let master = Master::start(&bus, settings).await;
        let mut rig = Self::offline(bus, master, Arc::new(MemoryStore::default()), Arc::new(SystemClock));
        rig.connect();
        rig.wait_for(Tier::Fresh).await;
        rig
    }

    /// A host that was not connected yet in this life.
    pub fn offline(bus: MemoryBus, master: Master, store: Arc<dyn AclStore>, clock: Arc<dyn Clock>) -> Self {
        let knowledge = Knowledge::open_in_boot(store.clone(), clock, None, "boot".to_owned()).unwrap();
        let auth = Arc::new(TokenAuth::new(knowledge.clone(), host(), Arc::new(held), None));
        Self { bus, master, store, knowledge, driver: None, auth, entries: Arc::default() }
    }

    pub fn connect(&mut self) {
        let client = || -> Arc<dyn Bus> { Arc::new(self.bus.client("host", |_, _| true)) };
        let config = DriverConfig {
            peer: Peer::Host(host()),
            session: SessionId::from_bytes([1; 16]),
            bus: client(),
            keepalive: client(),
            handler: Arc::new(Handler { entries: self.entries.clone() }),
            audit: None,
        };
        self.driver = Some(StreamDriver::start(self.knowledge.clone(), config));
    }

    pub async fn wait_for(&self, tier: Tier) {
        let mut seen = self.knowledge.tier();
        let wait = seen.wait_for(|now| *now == tier);
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the tier is not reached").unwrap();
    }

    pub async fn verify(&self, credential: &Credential) -> Result<Principal, Denial> {
        self.auth.verify(credential, &Context { project: project(1), source: None }).await
    }

    /// Until `done` holds, within a deadline.
    pub async fn until(&self, what: &str, done: impl Fn() -> bool) {
        for _ in 0..6000 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what} did not happen");
    }
}
