//! A master over real HTTP, and hosts that do what the test says.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    identity::Identity,
    peer::{PeerId, assert},
    stream::{Entry, Frame},
};
use cocalc_conat::{Client, ClientOptions, Credentials};
use cocalc_core::{
    BoxError,
    backups::{Answer, Backup, BackupKind, Phase, Progress, Restored},
    bus::{Bus, Payload},
    connector::Peer,
    control::{
        BackupsCommand, BackupsOutcome, BackupsReply, BackupsWork, Capabilities, Carried, CommandError,
        ErrorCode, HostCommand, HostReply, Keepalive, KeepaliveReply, MoveCommand, MoveReply, PeerReply,
        PeerRequest, ProjectReport, Register, api_subject, inbox_subject, keepalive_subject, stream_subject,
    },
    router::HostAddress,
    runner::{self, State, Status},
    storage,
};
use cocalc_ids::{Epoch, HostId, ProjectId, SessionId, SnapshotName, Timestamp, VolumeUuid};
use cocalc_master::{BackupsConfig, Config, Master};
use serde_json::{Value, json};
use tokio::task::JoinSet;

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `done` says so.
pub(crate) async fn until<T>(what: &str, done: impl AsyncFnMut() -> Option<T>) -> T {
    until_within(LIMIT, what, done).await
}

pub(crate) async fn until_within<T>(
    limit: Duration,
    what: &str,
    mut done: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = done().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) master: Option<Master>,
    pub(crate) url: String,
    pub(crate) admin: String,
    pub(crate) running: Running,
}

/// Where each project runs. It never runs twice.
#[derive(Clone, Debug, Default)]
pub(crate) struct Running {
    hosts: Arc<Mutex<BTreeMap<ProjectId, HostId>>>,
    twice: Arc<Mutex<Vec<String>>>,
}

impl Running {
    fn set(&self, project: ProjectId, host: HostId, runs: bool) {
        let mut hosts = self.hosts.lock().unwrap();
        match hosts.get(&project) {
            Some(other) if *other != host && runs => {
                self.twice.lock().unwrap().push(format!("{project} on {other} and {host}"));
            }
            Some(other) if *other == host && !runs => {
                hosts.remove(&project);
            }
            None if runs => {
                hosts.insert(project, host);
            }
            _ => {}
        }
    }

    /// Fails if a project ever ran on two hosts, and says where it runs.
    pub(crate) fn once(&self, project: ProjectId) -> Option<HostId> {
        assert_eq!(*self.twice.lock().unwrap(), Vec::<String>::new());
        self.hosts.lock().unwrap().get(&project).copied()
    }
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(None).await
    }

    /// One whose master knows somebody else's accounts, too.
    pub(crate) async fn with(accounts: Option<Arc<dyn cocalc_master::accounts::Accounts>>) -> Self {
        Self::within(tempfile::tempdir().unwrap(), accounts).await
    }

    /// One with backups, of which only the hosts know what is in them.
    pub(crate) async fn with_backups() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("backups")).unwrap();
        Self::within(dir, None).await
    }

    async fn within(
        dir: tempfile::TempDir,
        accounts: Option<Arc<dyn cocalc_master::accounts::Accounts>>,
    ) -> Self {
        let master = Master::start_with(config(dir.path().join("data"), 0), accounts).await.unwrap();
        let url = master.url().to_owned();
        let admin = std::fs::read_to_string(dir.path().join("data/admin-token")).unwrap().trim().to_owned();
        Self { dir, master: Some(master), url, admin, running: Running::default() }
    }

    /// Ends the master as a crash would, and starts another on its data.
    pub(crate) async fn restart(&mut self) {
        let port = self.master.as_ref().unwrap().address().port();
        drop(self.master.take());
        self.start(port).await;
    }

    /// Starts a master on the data.
    pub(crate) async fn start(&mut self, port: u16) {
        let data = self.dir.path().join("data");
        // The lock and the port are free a moment after the old one is gone.
        let master = until("a second start", async || {
            Master::start(config(data.clone(), port)).await.map_err(|error| eprintln!("{error}")).ok()
        });
        self.master = Some(master.await);
    }

    pub(crate) async fn call(&self, method: &str, path: &str, token: &str, body: Value) -> (u16, Value) {
        self.call_with(method, path, token, body, None).await
    }

    pub(crate) async fn call_with(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: Value,
        key: Option<&str>,
    ) -> (u16, Value) {
        let url = match path.strip_prefix("//") {
            Some(path) => format!("{}/{path}", self.url),
            None => format!("{}/api/v1{path}", self.url),
        };
        let mut request = http::Request::builder().method(method).uri(url);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let request = request.body(text).unwrap();
        tokio::task::spawn_blocking(move || {
            let config = ureq::Agent::config_builder()
                .http_status_as_error(false)
                .allow_non_standard_methods(true)
                .timeout_global(Some(LIMIT))
                .build();
            let mut response = ureq::Agent::from(config).run(request).unwrap();
            let text = response.body_mut().read_to_string().unwrap();
            let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
            (response.status().as_u16(), value)
        })
        .await
        .unwrap()
    }

    /// A call of the administrator that must succeed.
    pub(crate) async fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, &self.admin, body).await;
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Another account with a token.
    pub(crate) async fn account(&self, name: &str) -> (String, String) {
        let account = self.ok("POST", "/accounts", json!({ "name": name })).await;
        let id = account["id"].as_str().unwrap().to_owned();
        let token = self.ok("POST", &format!("/accounts/{id}/tokens"), json!({})).await;
        (id, token["token"].as_str().unwrap().to_owned())
    }

    pub(crate) async fn settled(&self, operation: &Value) -> Value {
        let id = operation["operation_id"].as_str().unwrap();
        let seen = self.ok("GET", &format!("/operations/{id}/wait?timeout_secs=15"), Value::Null).await;
        assert_ne!(seen["state"], "running", "{seen}");
        seen
    }

    /// A project that was created.
    pub(crate) async fn project(&self, host: &str) -> String {
        let begun = self.ok("POST", "/projects", json!({ "name": "p", "host": host })).await;
        assert_eq!(self.settled(&begun).await["state"], "done");
        begun["project"]["id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn host(&self, name: &str) -> Host {
        let token = self.ok("POST", "/join-tokens", json!({ "kind": "host" })).await;
        let identity = Arc::new(Identity::generate().unwrap());
        let address = HostAddress {
            url: format!("http://{name}.example"),
            domain: format!("{name}.apps.example"),
            ssh: format!("{name}.example:22"),
            peer: format!("{name}.example:9"),
            identity: identity.public_key().to_string(),
        };
        let body = join(token["token"].as_str().unwrap(), name, &identity, &address);
        let (status, joined) = self.call("POST", "/hosts/join", "", body).await;
        assert_eq!(status, 200, "{joined}");
        assert_eq!(joined["issuer"], self.url);
        let id: HostId = joined["host_id"].as_str().unwrap().parse().unwrap();
        Host::start(id, name, identity, address, &self.url, self.running.clone()).await
    }
}

fn config(data: PathBuf, port: u16) -> Config {
    let place = data.with_file_name("backups");
    let mut config = Config::new(([127, 0, 0, 1], port).into(), data);
    // The master itself looks into no repository here.
    let worker = Some("/bin/false".into());
    config.backups = place.is_dir().then(|| BackupsConfig { worker, ..BackupsConfig::in_directory(place) });
    (config.keepalive_ms, config.lease_ms, config.grace_ms) = (200, 1_000, 500);
    config
}

/// What a daemon sends to join.
pub(crate) fn join(token: &str, name: &str, identity: &Identity, address: &HostAddress) -> Value {
    let HostAddress { url, ssh, peer, .. } = address;
    let key = identity.public_key();
    let message = format!("cocalc-join-2 {token} {name} {key} {url} {ssh} {peer}");
    let proof = URL_SAFE_NO_PAD.encode(identity.sign(message.as_bytes()));
    json!({ "token": token, "name": name, "identity": key.to_string(), "address": address, "proof": proof })
}

/// Signs in as a peer.
#[derive(Debug)]
pub(crate) struct Assertions {
    pub(crate) identity: Arc<Identity>,
    pub(crate) peer: PeerId,
    pub(crate) audience: String,
}

#[async_trait]
impl Credentials for Assertions {
    async fn bearer(&self) -> Result<String, BoxError> {
        Ok(assert(&self.identity, self.peer, &self.audience, Timestamp::now())?)
    }
}

pub(crate) fn client(url: &str, credentials: Assertions) -> Client {
    let options = ClientOptions {
        reconnect_min: Duration::from_millis(50),
        reconnect_max: Duration::from_millis(200),
        ..ClientOptions::default()
    };
    Client::connect(&format!("{}/", url.replacen("http:", "ws:", 1)), Arc::new(credentials), options).unwrap()
}

/// When a host falls silent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fall {
    Before,
    After,
}

/// A move's step, as tests name it.
pub(crate) fn label(step: &MoveCommand) -> &'static str {
    match step {
        MoveCommand::Survey { .. } => "survey",
        MoveCommand::Reserve { .. } => "reserve",
        MoveCommand::Carry { .. } => "carry",
        MoveCommand::Send { name, .. } if name.as_str().ends_with("final") => "send the rest",
        MoveCommand::Send { .. } => "send",
        MoveCommand::Park { .. } => "park",
        MoveCommand::Freeze { .. } => "freeze",
        MoveCommand::Stage { .. } => "stage",
        MoveCommand::Activate { .. } => "activate",
        MoveCommand::Retire { .. } => "retire",
        MoveCommand::Thaw { .. } => "thaw",
        MoveCommand::Discard => "discard",
        MoveCommand::Clean { .. } => "clean",
    }
}

/// A step of other work, as tests name it.
fn label_of(command: &HostCommand) -> &'static str {
    match command {
        HostCommand::Move { step, .. } => label(step),
        HostCommand::Backups { what: BackupsCommand::Work { .. }, .. } => "fetch",
        HostCommand::Backups { what: BackupsCommand::Cancel { .. }, .. } => "cancel",
        HostCommand::Create { .. } => "create",
        HostCommand::Start { .. } => "start",
        HostCommand::Stop { .. } => "stop",
        HostCommand::RestoreSnapshot { .. } => "swap",
        HostCommand::DeleteSnapshot { .. } => "delete a snapshot",
        HostCommand::Configure { .. } => "configure",
        HostCommand::Report { .. } => "report",
        _ => "something else",
    }
}

/// What a scripted host has and does.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// The projects, with the epoch that it was granted, and whether they run.
    pub(crate) projects: BTreeMap<ProjectId, (Epoch, bool)>,
    /// Where projects run, for all hosts.
    running: Running,
    /// Those that a move has frozen, and whether they ran then.
    frozen: BTreeMap<ProjectId, bool>,
    /// The step of a move at which it falls silent, before it does it or after.
    pub(crate) fall: Option<(&'static str, Fall)>,
    /// How many bytes each stream has, and how long it takes.
    pub(crate) streams: Vec<(u64, u64)>,
    /// Every command that came.
    pub(crate) commands: Vec<HostCommand>,
    /// Every frame that came.
    pub(crate) frames: Vec<Frame>,
    /// The snapshots of each project.
    pub(crate) snapshots: BTreeMap<ProjectId, Vec<SnapshotName>>,
    /// The files of the projects, for commands about them.
    pub(crate) files: cocalc_core::memory::storage::MemoryStorage,
    /// What `usage` says to the owner.
    pub(crate) notice: Option<String>,
    /// Answers nothing.
    pub(crate) mute: bool,
    /// Renews no lease.
    pub(crate) away: bool,
    /// Applies frames, but acknowledges nothing.
    pub(crate) silent: bool,
    /// Refuses everything.
    pub(crate) refuse: Option<ErrorCode>,
    /// How long it thinks before it answers.
    pub(crate) slow: Duration,
    /// Backups never get here.
    pub(crate) fetches_for_ever: bool,
    /// Snapshots whose files were put in place, with that for which the state
    /// before was kept.
    pub(crate) swaps: Vec<(ProjectId, SnapshotName, SnapshotName)>,
}

/// A host on the real bus.
pub(crate) struct Host {
    pub(crate) id: HostId,
    pub(crate) script: Arc<Mutex<Script>>,
    pub(crate) client: Client,
    session: Arc<Mutex<SessionId>>,
    _tasks: JoinSet<()>,
}

impl Host {
    async fn start(
        id: HostId,
        name: &str,
        identity: Arc<Identity>,
        address: HostAddress,
        url: &str,
        running: Running,
    ) -> Self {
        let credentials = Assertions { identity, peer: PeerId::Host(id), audience: url.to_owned() };
        let client = client(url, credentials);
        client.ready(LIMIT).await.unwrap();
        let script = Arc::new(Mutex::new(Script { running, ..Script::default() }));
        let register = Register {
            name: name.parse().unwrap(),
            session: SessionId::random(),
            boot_id: "boot".into(),
            address,
            ssh_host_keys: vec!["ssh-ed25519 AAAA".into()],
            capabilities: Some(Capabilities {
                storage: storage::Capabilities {
                    backend: "memory".into(),
                    deltas: true,
                    quotas: false,
                    ..Default::default()
                },
                runner: runner::Capabilities {
                    backend: "script".into(),
                    isolation: true,
                    limits: true,
                    weaknesses: vec![],
                    unenforced: vec![],
                },
                images: vec![],
                sealing_key: None,
                free_bytes: 1 << 40,
            }),
            held: vec![],
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(inbox(client.clone(), id, script.clone()));
        tasks.spawn(stream(client.clone(), id, script.clone()));
        let session = Arc::new(Mutex::new(register.session));
        tasks.spawn(lease(client.clone(), id, register, session.clone(), script.clone()));
        let live = script.clone();
        until("the first state", async || {
            live.lock().unwrap().frames.iter().any(|frame| frame.entry == Entry::Live).then_some(())
        })
        .await;
        Self { id, script, client, session, _tasks: tasks }
    }

    /// The process that it is now.
    pub(crate) fn session(&self) -> SessionId {
        *self.session.lock().unwrap()
    }

    /// Comes as another process.
    pub(crate) fn again(&self) {
        *self.session.lock().unwrap() = SessionId::random();
    }

    /// Comes as another process, and answers.
    pub(crate) fn wake(&self) {
        let mut script = self.script.lock().unwrap();
        (script.mute, script.away) = (false, false);
        drop(script);
        self.again();
    }

    pub(crate) async fn ask(&self, request: &PeerRequest) -> PeerReply {
        ask(&self.client, self.id, request).await.unwrap()
    }
}

pub(crate) async fn ask(client: &Client, id: HostId, request: &PeerRequest) -> Option<PeerReply> {
    let payload = Payload::json(request).unwrap();
    let subject = api_subject(Peer::Host(id));
    client.request(&subject, payload, Duration::from_secs(5)).await.ok()?.payload.parse().ok()
}

/// Registers, asks for the stream, and renews the lease.
async fn lease(
    client: Client,
    id: HostId,
    mut register: Register,
    session: Arc<Mutex<SessionId>>,
    script: Arc<Mutex<Script>>,
) {
    let subject = keepalive_subject(Peer::Host(id));
    loop {
        if script.lock().unwrap().away {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        register.session = *session.lock().unwrap();
        let position = script.lock().unwrap().frames.last().map(|frame| (frame.stream, frame.seq));
        let keepalive = Keepalive { session: register.session, position: None };
        let payload = Payload::json(&keepalive).unwrap();
        let reply = client.request(&subject, payload, Duration::from_millis(500)).await;
        let reply = reply.ok().and_then(|message| message.payload.parse::<KeepaliveReply>().ok());
        match reply {
            Some(reply) if reply.lease_ms == 0 => {
                ask(&client, id, &PeerRequest::Register(Box::new(register.clone()))).await;
                ask(&client, id, &PeerRequest::Sync { position }).await;
                continue;
            }
            Some(reply) if Some(reply.position) != position => {
                ask(&client, id, &PeerRequest::Sync { position }).await;
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn stream(client: Client, id: HostId, script: Arc<Mutex<Script>>) {
    loop {
        let Ok(mut frames) = client.subscribe(&stream_subject(Peer::Host(id)), None).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while let Some(message) = frames.next().await {
            let frame: Frame = message.payload.parse().unwrap();
            let (stream, seq) = (frame.stream, frame.seq);
            let silent = {
                let mut script = script.lock().unwrap();
                // Who asks for what it missed may get it twice.
                let last = script.frames.last().map(|last| (last.stream, last.seq));
                if last < Some((stream, seq)) {
                    script.frames.push(frame);
                }
                script.silent
            };
            if !silent {
                ask(&client, id, &PeerRequest::Acknowledge { stream, seq }).await;
            }
        }
    }
}

async fn inbox(client: Client, id: HostId, script: Arc<Mutex<Script>>) {
    loop {
        let Ok(mut commands) = client.subscribe(&inbox_subject(id), None).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while let Some(message) = commands.next().await {
            let command: HostCommand = message.payload.parse().unwrap();
            let about_files = {
                let mut script = script.lock().unwrap();
                let calm = !script.mute && script.refuse.is_none();
                let mine = calm && is_about_files(&command);
                mine.then(|| {
                    script.commands.push(command.clone());
                    (script.files.clone(), script.notice.clone())
                })
            };
            let answer = match about_files {
                Some((files, notice)) => {
                    let answer = act_on_files(&files, notice, command.clone()).await;
                    if let (HostCommand::Clone { epoch, .. }, HostReply::Project(report)) =
                        (&command, &answer)
                    {
                        script.lock().unwrap().projects.insert(report.project, (*epoch, false));
                    }
                    Some(answer)
                }
                None => script.lock().unwrap().answer(id, command),
            };
            let slow = script.lock().unwrap().slow;
            tokio::time::sleep(slow).await;
            if let Some(answer) = answer {
                let payload = Payload::json(&answer).unwrap();
                let _ = client.publish(&message.reply.unwrap(), payload).await;
            }
        }
    }
}

fn is_about_files(command: &HostCommand) -> bool {
    matches!(
        command,
        HostCommand::Diff { .. }
            | HostCommand::Copy { .. }
            | HostCommand::Clone { .. }
            | HostCommand::RestorePath { .. }
            | HostCommand::Usage { .. }
    )
}

/// What a host does with files, on storage in memory.
async fn act_on_files(
    files: &cocalc_core::memory::storage::MemoryStorage,
    notice: Option<String>,
    command: HostCommand,
) -> HostReply {
    use storage::{CloneOptions, Place, Storage, VolumeOptions};
    let project = command.project();
    let done = match command {
        HostCommand::Diff { from, to, after, max, .. } => files
            .diff(project, &from, to.as_ref(), after.as_ref(), max)
            .await
            .map(|changes| HostReply::Changes { project, changes }),
        HostCommand::Copy { from, to, options, .. } => files
            .copy(&from, &Place::live(project, to), &options)
            .await
            .map(|copied| HostReply::Copied { project, copied }),
        HostCommand::RestorePath { name, path, former, .. } => {
            let options = storage::CopyOptions { same_owner: true, replace: true };
            let from = Place::frozen(project, name, path.clone());
            match files.snapshot(project, &former).await {
                Ok(_) => files
                    .copy(&from, &Place::live(project, path), &options)
                    .await
                    .map(|copied| HostReply::Copied { project, copied }),
                Err(error) => Err(error),
            }
        }
        HostCommand::Clone { epoch, source, name, config, same_owner, .. } => {
            let limit_bytes = config.quota_bytes;
            let options = CloneOptions { volume: VolumeOptions { limit_bytes }, same_owner };
            let name = name.unwrap_or_else(|| "now".parse().unwrap());
            let _ = files.snapshot(source, &name).await;
            files.clone_volume(source, &name, project, &options).await.map(|_| {
                let status =
                    Status { project, epoch: None, state: State::Stopped, started: None, reason: None };
                HostReply::Project(ProjectReport { project, epoch: Some(epoch), status, phases: vec![] })
            })
        }
        HostCommand::Usage { count, .. } => {
            let footprint = if count { files.footprint(project, None).await.ok() } else { None };
            files.usage(project).await.map(|usage| {
                HostReply::Usage(cocalc_core::control::UsageReport {
                    project,
                    usage,
                    plan_bytes: Some(1_000),
                    allowance_bytes: Some(500),
                    policy: Default::default(),
                    notice,
                    footprint,
                })
            })
        }
        _ => unreachable!(),
    };
    done.unwrap_or_else(|error| HostReply::Error(cocalc_core::moves::host::storage_error(error)))
}

impl Script {
    fn report(&self, project: ProjectId) -> ProjectReport {
        let held = self.projects.get(&project).copied();
        let state = if held.is_some_and(|(_, runs)| runs) { State::Running } else { State::Stopped };
        let epoch = held.map(|(epoch, _)| epoch);
        let status = Status { project, epoch, state, started: None, reason: None };
        ProjectReport { project, epoch, status, phases: vec![("mount".into(), 3)] }
    }

    fn list(&self, project: ProjectId) -> HostReply {
        let snapshot = |name: &SnapshotName| storage::Snapshot {
            project,
            name: name.clone(),
            uuid: VolumeUuid::from_bytes([8; 16]),
            created: Timestamp::now(),
            origin: VolumeUuid::from_bytes([7; 16]),
        };
        let names = self.snapshots.get(&project).into_iter().flatten();
        HostReply::Snapshots { project, snapshots: names.map(snapshot).collect() }
    }

    /// The project holds the grant of `epoch` here, and runs or not.
    fn hold(&mut self, host: HostId, project: ProjectId, epoch: Epoch, runs: bool) {
        self.projects.insert(project, (epoch, runs));
        self.running.set(project, host, runs);
    }

    fn answer(&mut self, host: HostId, command: HostCommand) -> Option<HostReply> {
        self.commands.push(command.clone());
        let fall = self.fall.filter(|(at, _)| *at == label_of(&command)).map(|(_, fall)| fall);
        if self.mute || fall == Some(Fall::Before) {
            self.mute = true;
            return None;
        }
        let answer = self.act(host, command);
        self.mute = fall.is_some();
        (!self.mute).then_some(answer)
    }

    fn act(&mut self, host: HostId, command: HostCommand) -> HostReply {
        if let Some(code) = self.refuse {
            return HostReply::Error(CommandError { code, message: "on purpose".into() });
        }
        let project = command.project();
        let stale =
            || HostReply::Error(CommandError { code: ErrorCode::StaleEpoch, message: "stale".into() });
        let held = self.projects.get(&project).map(|(epoch, _)| *epoch);
        match command {
            HostCommand::Create { epoch, .. } => {
                self.projects.entry(project).or_insert((epoch, false));
                HostReply::Project(self.report(project))
            }
            HostCommand::Start { epoch, .. } | HostCommand::Stop { epoch, .. }
                if held != Some(epoch) || self.frozen.contains_key(&project) =>
            {
                stale()
            }
            HostCommand::Start { epoch, .. } => {
                self.hold(host, project, epoch, true);
                HostReply::Project(self.report(project))
            }
            HostCommand::Stop { epoch, .. } => {
                self.hold(host, project, epoch, false);
                HostReply::Project(self.report(project))
            }
            HostCommand::Delete { epoch, .. } => {
                self.running.set(project, host, false);
                self.projects.remove(&project);
                HostReply::Deleted { project, epoch }
            }
            HostCommand::Move { move_id, step, .. } => {
                HostReply::Move { move_id, receipt: self.step(host, project, step) }
            }
            HostCommand::Forget { epoch, .. } => HostReply::Deleted { project, epoch },
            HostCommand::Snapshot { name, .. } => {
                let names = self.snapshots.entry(project).or_default();
                if !names.contains(&name) {
                    names.push(name);
                }
                self.list(project)
            }
            HostCommand::DeleteSnapshot { name, .. } => {
                self.snapshots.entry(project).or_default().retain(|known| *known != name);
                self.list(project)
            }
            HostCommand::Snapshots { .. } => self.list(project),
            HostCommand::RestoreSnapshot { name, former, .. } => {
                if held.is_some_and(|_| self.projects[&project].1) {
                    let message = "it runs".to_owned();
                    return HostReply::Error(CommandError { code: ErrorCode::Busy, message });
                }
                let names = self.snapshots.entry(project).or_default();
                // A repeated one finds what it kept.
                if !names.contains(&former) {
                    if !names.contains(&name) {
                        let message = format!("there is no snapshot {name}");
                        return HostReply::Error(CommandError { code: ErrorCode::NotFound, message });
                    }
                    names.push(former.clone());
                    self.swaps.push((project, name, former));
                }
                HostReply::Project(self.report(project))
            }
            HostCommand::Backups { what, .. } => self.back_up(project, what),
            _ => HostReply::Project(self.report(project)),
        }
    }

    /// What it does about backups, of which each project has one.
    fn back_up(&mut self, project: ProjectId, what: BackupsCommand) -> HostReply {
        let backup = |source| Backup {
            id: "0123456789abcdef".into(),
            project: source,
            host: HostId::from_bytes([1; 16]),
            epoch: Epoch::FIRST,
            kind: BackupKind::Manual,
            taken: Timestamp::from_secs(1_800_000_000),
            bytes: 10,
            added_bytes: 10,
            files: 1,
            files_read: 1,
        };
        let answer = match what {
            BackupsCommand::Ask { .. } => {
                let answer = Answer::Backups { backups: vec![backup(project)], truncated: false };
                BackupsReply::Answered { answer }
            }
            BackupsCommand::Work { operation, .. } if self.fetches_for_ever => {
                let progress = Progress { phase: Phase::Restoring, bytes: 5, total_bytes: Some(10) };
                BackupsReply::Working { operation, progress: Some(progress) }
            }
            BackupsCommand::Work { operation, work: BackupsWork::Fetch { source, name, .. }, .. } => {
                let names = self.snapshots.entry(project).or_default();
                if !names.contains(&name) {
                    names.push(name.clone());
                }
                let snapshot = storage::Snapshot {
                    project,
                    name,
                    uuid: VolumeUuid::from_bytes([8; 16]),
                    created: Timestamp::now(),
                    origin: VolumeUuid::from_bytes([7; 16]),
                };
                let restored = Restored { entries: 1, bytes: 10 };
                let outcome = BackupsOutcome::Fetched { snapshot, restored, backup: backup(source) };
                BackupsReply::Done { operation, outcome }
            }
            BackupsCommand::Cancel { operation } => BackupsReply::Cancelled { operation },
            _ => BackupsReply::Status { status: None },
        };
        HostReply::Backups { project, answer }
    }

    /// The project's own snapshots.
    fn own(&self, project: ProjectId) -> Vec<Carried> {
        let names = self.snapshots.get(&project).cloned().unwrap_or_default();
        let origin = VolumeUuid::from_bytes([8; 16]);
        let own = names.into_iter().filter(|name| !cocalc_core::moves::is_internal(name));
        own.map(|name| Carried { name, origin }).collect()
    }

    fn step(&mut self, host: HostId, project: ProjectId, step: MoveCommand) -> MoveReply {
        let origin = VolumeUuid::from_bytes([7; 16]);
        match step {
            MoveCommand::Survey { .. } => MoveReply::Surveyed { bytes: 1000, snapshots: self.own(project) },
            MoveCommand::Reserve { .. } => MoveReply::Reserved,
            MoveCommand::Carry { snapshot, .. } => {
                let Carried { name, origin } = snapshot;
                MoveReply::Sent { name, origin, bytes: 5, millis: 1, left_out: Vec::new() }
            }
            MoveCommand::Send { name, .. } => {
                let sent = match self.streams.len() {
                    0 => (10, 1),
                    _ => self.streams.remove(0),
                };
                let left_out = vec!["one file that must not change".to_owned()];
                MoveReply::Sent { name, origin, bytes: sent.0, millis: sent.1, left_out }
            }
            MoveCommand::Park { .. } => MoveReply::Parked,
            MoveCommand::Freeze { epoch, name, .. } => {
                let runs = self.projects.get(&project).is_some_and(|(_, runs)| *runs);
                let was_running = *self.frozen.entry(project).or_insert(runs);
                self.hold(host, project, epoch, false);
                let snapshots = self.own(project);
                MoveReply::Frozen { epoch, name, origin, was_running, snapshots }
            }
            MoveCommand::Stage { origin, .. } => MoveReply::Staged { origin },
            MoveCommand::Activate { epoch, start, .. } => {
                // A repeated one finds it running.
                let runs = self.projects.get(&project).is_some_and(|held| *held == (epoch, true));
                self.hold(host, project, epoch, start || runs);
                MoveReply::Activated { epoch, report: self.report(project) }
            }
            MoveCommand::Retire { .. } => {
                self.running.set(project, host, false);
                self.frozen.remove(&project);
                self.projects.remove(&project);
                MoveReply::Retired
            }
            MoveCommand::Thaw { epoch, start, .. } => {
                // What was never frozen goes on.
                let runs = self.projects.get(&project).is_some_and(|(_, runs)| *runs);
                self.frozen.remove(&project);
                self.hold(host, project, epoch, start || runs);
                MoveReply::Thawed { epoch }
            }
            MoveCommand::Discard => MoveReply::Discarded,
            MoveCommand::Clean { .. } => MoveReply::Cleaned,
        }
    }
}
