//! Decisions per second as a host makes them for each request: credential,
//! limits, ACL, grant, audit. One thread, in this process, against the bare
//! signature check and against what the `jsonwebtoken` crate verifies.

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    identity::Identity,
    limit::Quota,
    mint::{NewToken, SigningRing},
    store::MemoryStore,
    stream::{AccountState, Entry, Frame, ProjectAcl, PublicRing},
    token::{Algorithm, Claims, Usage},
};
use cocalc_auth_live::{
    AuditLog, AuditReport, AuthLimits, DriverConfig, Knowledge, LimitedAuth, PeerHandler, StreamDriver,
    TokenAuth,
};
use cocalc_core::{
    auth::{Auth, Context, Credential, Secret},
    bus::{Bus, Payload},
    clock::SystemClock,
    connector::Peer,
    control::{
        KeepaliveReply, PeerReply, PeerRequest, Register, Registered, Settings, api_subject,
        keepalive_subject, stream_subject,
    },
    memory::bus::MemoryBus,
};
use cocalc_ids::{AccountId, Action, Epoch, HostId, ProjectId, Role, Scope, SessionId, Timestamp};
use ed25519_dalek::{Signature, VerifyingKey};

use crate::{
    Effort, Result,
    table::{Better, Table, quantile},
};

const ISSUER: &str = "https://master.example";
/// Of one side before it is the other's turn.
const BATCH: u32 = 50;
/// How long the host may take to hear what it has to know.
const READY_LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn measure(effort: Effort, table: &mut Table) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (host, project, account) = (HostId::random(), ProjectId::random(), AccountId::random());
    let ring = SigningRing::generate(Algorithm::EdDsa, Timestamp::now())?;
    let new = |usage| {
        NewToken::new(ISSUER, host, account, project, Epoch::FIRST)
            .scopes([Scope::Http])
            .acl(1)
            .usage(usage)
            .ttl(Duration::from_secs(300))
    };
    let folder = tempfile::tempdir()?;
    let decides = |audit: Option<AuditLog>| {
        let world = World { host, project, account, ring: ring.public() };
        runtime.block_on(world.start(audit))
    };
    let silent = decides(None)?;
    let log = AuditLog::open(folder.path())?;
    let audited = decides(Some(log.clone()))?;

    let mint = |usage| -> Result<String> { Ok(ring.mint(&new(usage), Timestamp::now())?.token) };
    let peers = Peers::new(&ring, &mint(Usage::Multi)?)?;
    let unit = ("decisions/s", Better::More);
    for (what, decides, usage) in [
        // What is shown once is not remembered: its signature is checked each time.
        ("decision, signature checked, no audit", &silent, Usage::Once),
        ("decision, token known, no audit", &silent, Usage::Multi),
        ("decision, token known, audit", &audited, Usage::Multi),
    ] {
        let (mut ours, mut bare, mut others) = (Vec::new(), Vec::new(), Vec::new());
        let mut took = Vec::new();
        for _ in 0..effort.runs {
            // It lives five minutes, a run some seconds.
            let credential = Credential::Token(Secret::new(mint(usage)?));
            let limit = Duration::from_millis(u64::from(effort.seconds) * 500);
            let mut spent = [Duration::ZERO; 3];
            let mut count = 0.0;
            // By turns in short batches: what else the machine does hits all.
            while spent.iter().sum::<Duration>() < limit {
                spent[0] += runtime.block_on(async {
                    let begun = Instant::now();
                    for _ in 0..BATCH {
                        let at = Instant::now();
                        decides.decide(&credential, project).await?;
                        took.push(at.elapsed().as_secs_f64() * 1e6);
                    }
                    Ok::<_, crate::Error>(begun.elapsed())
                })?;
                spent[1] += peers.batch(|peers| peers.is_signed())?;
                spent[2] += peers.batch(|peers| peers.decodes())?;
                count += f64::from(BATCH);
            }
            for (samples, spent) in [&mut ours, &mut bare, &mut others].into_iter().zip(spent) {
                samples.push(count / spent.as_secs_f64());
            }
        }
        table.add(what, "ed25519-dalek verify_strict", unit, &ours, &bare);
        table.add(what, "jsonwebtoken decode", unit, &ours, &others);
        table.note(format!(
            "{what}: p50 {:.2} µs, p99 {:.2} µs of {} decisions",
            quantile(&took, 0.5),
            quantile(&took, 0.99),
            took.len()
        ));
    }
    log.flush();
    table.note(format!(
        "audit lines written: {} (a sample of what was allowed), dropped: {}",
        log.head().0,
        log.lost()
    ));
    Ok(())
}

/// What ours is compared with.
struct Peers {
    token: String,
    signature: Signature,
    signed: usize,
    key: VerifyingKey,
    decoding: jsonwebtoken::DecodingKey,
    validation: jsonwebtoken::Validation,
}

impl Peers {
    fn new(ring: &SigningRing, token: &str) -> Result<Self> {
        let public = ring.public();
        let current = public.keys.iter().find(|key| key.kid == ring.current_kid());
        let key = &current.ok_or("a ring without its current key")?.key;
        let bytes: [u8; 32] = URL_SAFE_NO_PAD.decode(key)?.try_into().map_err(|_| "a key of a wrong size")?;
        let (signed, signature) = token.rsplit_once('.').ok_or("a token without a signature")?;
        let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.validate_aud = false;
        Ok(Self {
            token: token.to_owned(),
            signature: Signature::from_slice(&URL_SAFE_NO_PAD.decode(signature)?)?,
            signed: signed.len(),
            key: VerifyingKey::from_bytes(&bytes)?,
            decoding: jsonwebtoken::DecodingKey::from_ed_components(key)?,
            validation,
        })
    }

    fn is_signed(&self) -> bool {
        let message = black_box(&self.token.as_bytes()[..self.signed]);
        self.key.verify_strict(message, &self.signature).is_ok()
    }

    fn decodes(&self) -> bool {
        jsonwebtoken::decode::<Claims>(black_box(&self.token), &self.decoding, &self.validation).is_ok()
    }

    fn batch(&self, once: impl Fn(&Self) -> bool) -> Result<Duration> {
        let begun = Instant::now();
        for _ in 0..BATCH {
            if !once(self) {
                return Err("a good token was refused".into());
            }
        }
        Ok(begun.elapsed())
    }
}

/// A host's decisions, with a stream that keeps them current.
struct Decides {
    auth: LimitedAuth,
    _driver: StreamDriver,
}

impl Decides {
    async fn decide(&self, credential: &Credential, project: ProjectId) -> Result<()> {
        let context = Context { project, source: Some([192, 0, 2, 1].into()) };
        let principal = self.auth.verify(credential, &context).await?;
        let action = Action::App { scope: Scope::Http, port: 80 };
        self.auth.authorize(&principal, project, action).await.outcome?;
        Ok(())
    }
}

/// A master with one project, and the host that has it.
struct World {
    host: HostId,
    project: ProjectId,
    account: AccountId,
    ring: PublicRing,
}

impl World {
    async fn start(self, audit: Option<AuditLog>) -> Result<Decides> {
        let (host, held) = (self.host, self.project);
        let bus = MemoryBus::new();
        let client = |name: &str| -> Arc<dyn Bus> { Arc::new(bus.client(name, |_, _| true)) };
        let peer = Peer::Host(host);
        let knowledge = Knowledge::open(Arc::new(MemoryStore::default()), Arc::new(SystemClock), None)?;
        let grants = move |project| (project == held).then_some(Epoch::FIRST);
        let auth = TokenAuth::new(knowledge.clone(), host, Arc::new(grants), audit.clone());
        // Counted as on a host, and more than can come.
        let plenty = Quota::per_second(1_000_000_000, 1_000_000_000);
        let limits = AuthLimits { source: plenty, account: plenty, project: plenty, host: plenty };
        let auth = LimitedAuth::new(Arc::new(auth), Arc::new(SystemClock), limits);
        let master = client("master");
        let mut requests = [
            master.subscribe(&api_subject(peer), None).await?,
            master.subscribe(&keepalive_subject(peer), None).await?,
        ];
        let state = self.state();
        tokio::spawn(async move {
            let [api, keepalive] = &mut requests;
            loop {
                let message = tokio::select! {
                    message = api.next() => message,
                    message = keepalive.next() => message,
                };
                let Some(message) = message else { return };
                let answer = match message.payload.parse::<PeerRequest>() {
                    Err(_) => Payload::json(&renewed(state.len())),
                    Ok(PeerRequest::Register(_)) => Payload::json(&PeerReply::Registered(Registered {
                        issuer: ISSUER.to_owned(),
                        settings: settings(),
                        owners: Vec::new(),
                        now: Timestamp::now(),
                        backups: None,
                    })),
                    Ok(PeerRequest::Sync { .. }) => {
                        for (seq, entry) in (1..).zip(state.clone()) {
                            let frame = Payload::json(&Frame { stream: 1, seq, entry });
                            if let Ok(frame) = frame {
                                let _ = master.publish(&stream_subject(peer), frame).await;
                            }
                        }
                        Payload::json(&PeerReply::Done)
                    }
                    Ok(_) => Payload::json(&PeerReply::Done),
                };
                if let (Some(to), Ok(answer)) = (message.reply, answer) {
                    let _ = master.publish(&to, answer).await;
                }
            }
        });
        let report = |log| -> Result<AuditReport> {
            Ok(AuditReport { log, identity: Arc::new(Identity::generate()?) })
        };
        let driver = StreamDriver::start(
            knowledge,
            DriverConfig {
                peer,
                session: SessionId::random(),
                bus: client("host"),
                keepalive: client("host"),
                handler: Arc::new(Handler),
                audit: audit.map(report).transpose()?,
            },
        );
        let mut connected = driver.connected();
        tokio::time::timeout(READY_LIMIT, connected.wait_for(|connected| *connected)).await??;
        Ok(Decides { auth, _driver: driver })
    }

    fn state(&self) -> Vec<Entry> {
        let acl = ProjectAcl {
            project: self.project,
            version: 1,
            epoch: Epoch::FIRST,
            members: vec![(self.account, Role::Collaborator)],
            keys: Vec::new(),
            grace_ms: None,
            proxy_ssh: false,
            authorized_keys: false,
            viewable_ports: Vec::new(),
        };
        let account = AccountState {
            account: self.account,
            session_epoch: 0,
            ended_logins: Vec::new(),
            banned: false,
            keys: Vec::new(),
        };
        let ring = Entry::KeyRing(self.ring.clone());
        vec![Entry::Reset, ring, Entry::Account(account), Entry::Project(acl), Entry::Live]
    }
}

fn settings() -> Settings {
    Settings { keepalive_ms: 1_000, lease_ms: 600_000, grace_ms: 600_000 }
}

fn renewed(frames: usize) -> KeepaliveReply {
    let seq = u64::try_from(frames).unwrap_or(u64::MAX);
    KeepaliveReply { lease_ms: settings().lease_ms, position: (1, seq), now: Timestamp::now() }
}

struct Handler;

#[async_trait]
impl PeerHandler for Handler {
    async fn register(&self) -> Register {
        Register {
            name: "bench".parse().unwrap_or_else(|_| unreachable!("it is a host's name")),
            session: SessionId::random(),
            boot_id: String::new(),
            address: Default::default(),
            ssh_host_keys: Vec::new(),
            capabilities: None,
            held: Vec::new(),
        }
    }

    fn registered(&self, _: &Registered) {}

    fn entry(&self, _: &Entry) {}
}
