//! Answers what hosts and proxies ask.

use std::{sync::Arc, time::Duration};

use cocalc_auth::audit::Head;
use cocalc_auth_ssh::HostRequest;
use cocalc_core::{
    bus::{Message, Payload},
    connector::Peer,
    control::{
        FRAME_BYTES_MAX, Keepalive, KeepaliveReply, PeerReply, PeerRequest, Register, Registered,
        api_subject, subject_peer,
    },
    router::{Reach, Route},
    subject::is_subject,
};
use cocalc_ids::{Epoch, HostId, OperationId, ProjectId};
use cocalc_sqlite::master::{self as store, Job, ProjectState, Registration};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    gate::bus_name,
    streams::{host_state, peer_name, peer_state},
};
use crate::shared::Shared;

/// How long an idle project's processes may take to end.
const IDLE_GRACE_MS: u64 = 10_000;
/// Requests of peers that are answered at once; more wait in the queue.
const REQUESTS_MAX: usize = 256;

/// Answers `master.….api` and `….keepalive`, until the future is dropped.
///
/// Each kind has its own subscription and its own places, so that leases are
/// renewed whatever else is going on.
pub(crate) async fn serve(shared: Arc<Shared>) {
    tokio::join!(serve_kind(shared.clone(), "api"), serve_kind(shared, "keepalive"));
}

async fn serve_kind(shared: Arc<Shared>, kind: &'static str) {
    // Dropped with this future, and with it the answers under way.
    let mut tasks = JoinSet::new();
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        match shared.bus.subscribe(&format!("master.*.*.{kind}"), None).await {
            Ok(mut subscription) => {
                while let Some(message) = subscription.next().await {
                    let Ok(place) = places.clone().acquire_owned().await else { return };
                    let shared = shared.clone();
                    tasks.spawn(async move {
                        answer(&shared, message).await;
                        drop(place);
                    });
                    while tasks.try_join_next().is_some() {}
                }
                tracing::warn!(kind, "the subscription to peers ended; subscribing again");
            }
            Err(error) => {
                tracing::error!(kind, error = %cocalc_core::chain(&error), "cannot hear peers");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn answer(shared: &Arc<Shared>, message: Message) {
    // The bus let nobody but this peer publish here.
    let (Some(peer), Some(reply)) = (subject_peer(&message.subject), message.reply) else { return };
    // The answer goes out with the master's rights, which are all.
    if !is_inbox_of(peer, &reply) {
        tracing::warn!(?peer, %reply, "a peer's request whose answer would go elsewhere is passed over");
        return;
    }
    let payload = if message.subject == api_subject(peer) {
        let answer = match message.payload.parse::<PeerRequest>() {
            Ok(request) if message.payload.data.len() <= FRAME_BYTES_MAX => {
                respond(shared, peer, request).await.unwrap_or_else(|error| {
                    tracing::warn!(?peer, error = %cocalc_core::chain(&error), "a peer's request failed");
                    PeerReply::Error { message: "the master could not do it".to_owned() }
                })
            }
            Ok(_) => PeerReply::Error { message: "the request is too large".to_owned() },
            Err(error) => PeerReply::Error { message: format!("the request is not readable: {error}") },
        };
        Payload::json(&answer)
    } else {
        let Ok(keepalive) = message.payload.parse::<Keepalive>() else { return };
        Payload::json(&renew(shared, peer, keepalive).await)
    };
    match payload {
        Ok(payload) => {
            if let Err(error) = shared.bus.publish(&reply, payload).await {
                tracing::debug!(?peer, error = %cocalc_core::chain(&error), "an answer was not delivered");
            }
        }
        Err(error) => tracing::error!(%error, "an answer cannot be written"),
    }
}

/// Whether `subject` is of an inbox of the peer.
fn is_inbox_of(peer: Peer, subject: &str) -> bool {
    let own = subject.strip_prefix("_INBOX.").and_then(|rest| rest.strip_prefix(&bus_name(peer)));
    own.is_some_and(|rest| rest.starts_with('.')) && is_subject(subject)
}

async fn acknowledge(shared: &Shared, peer: Peer, epoch: u64, seq: u64) {
    if shared.streams.acknowledge(peer, epoch, seq).await
        && let Err(error) = shared.acknowledged(peer, (epoch, seq)).await
    {
        tracing::error!(?peer, error = %cocalc_core::chain(&error), "a receipt could not be written");
    }
}

async fn renew(shared: &Shared, peer: Peer, keepalive: Keepalive) -> KeepaliveReply {
    let known = shared.peers.renew(peer, keepalive.session, shared.clock.boot());
    if known {
        shared.heard(peer);
    }
    if let (true, Some((epoch, seq))) = (known, keepalive.position) {
        acknowledge(shared, peer, epoch, seq).await;
    }
    KeepaliveReply {
        lease_ms: if known { shared.settings.lease_ms } else { 0 },
        position: shared.streams.position(peer).await,
        now: shared.now(),
    }
}

async fn respond(shared: &Arc<Shared>, peer: Peer, request: PeerRequest) -> store::Result<PeerReply> {
    let its_last = matches!(request, PeerRequest::Acknowledge { .. });
    if shared.peers.is_withdrawn(peer) && !its_last && is_withdrawn(shared, peer).await? {
        return Ok(PeerReply::Error { message: "this host or proxy was withdrawn".to_owned() });
    }
    // It hears who owns what it holds, and nothing else.
    let of_fenced = matches!(request, PeerRequest::Register(_) | PeerRequest::AuditHead { .. });
    if shared.peers.is_fenced(peer) && !its_last && !of_fenced {
        let message = "an operator has fenced this host: it gets no lease until `cocalc host unfence`";
        return Ok(PeerReply::Error { message: message.to_owned() });
    }
    match request {
        PeerRequest::Register(register) => return register_peer(shared, peer, *register).await,
        PeerRequest::Sync { position } => {
            let task = shared.clone();
            let read = move |store: &store::Store| match peer {
                Peer::Host(host) => host_state(store, &task, host),
                Peer::Proxy(_) => peer_state(store, &task),
            };
            shared.streams.sync(peer, position, read).await?;
        }
        PeerRequest::Acknowledge { stream, seq } => acknowledge(shared, peer, stream, seq).await,
        PeerRequest::FetchProject { project } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            shared.tell_of_project(host, project).await?;
        }
        PeerRequest::Route { project } => {
            return Ok(PeerReply::Route { route: route(shared, project).await? });
        }
        PeerRequest::Alias { alias } => {
            let project = shared.db(move |store| store.project_of_alias(&alias)).await?;
            return Ok(PeerReply::Alias { project });
        }
        PeerRequest::Changed(report) => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            shared.db(move |store| store.observe(host, &report)).await?;
        }
        PeerRequest::Space { free_bytes } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            shared.db(move |store| store.set_free_bytes(host, free_bytes)).await?;
        }
        PeerRequest::Images { images } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            let digests = images.iter().map(|image| image.digest).collect();
            shared.db(move |store| store.set_images(host, digests)).await?;
            shared.images.heard(host, images);
        }
        PeerRequest::Sending { move_id, name, bytes, estimated_bytes, bytes_per_sec } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            shared.operations.heard_of_stream(host, move_id, name, [bytes, estimated_bytes, bytes_per_sec]);
        }
        PeerRequest::BackupAccess(request) => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            return shared.open_repository(host, request).await;
        }
        PeerRequest::BackupStatus(status) => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            shared.db(move |store| store.set_backup_status(host, &status)).await?;
        }
        PeerRequest::Wake { project, epoch } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            return wake(shared, host, project, epoch).await;
        }
        PeerRequest::Idle { project, epoch } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            return stop_idle(shared, host, project, epoch).await;
        }
        PeerRequest::Secrets { project, epoch } => {
            let Peer::Host(host) = peer else { return Ok(hosts_only()) };
            return shared.secrets_for(host, project, epoch).await;
        }
        PeerRequest::CertifySshHostKeys => return certify(shared, peer).await,
        PeerRequest::AuditHead { count, head, time, signature } => {
            let head = Head { count, hash: head, time };
            return keep_audit_head(shared, peer, head, signature).await;
        }
    }
    Ok(PeerReply::Done)
}

/// Keeps the head of a peer's audit chain, if it is signed with the key that the
/// peer has now.
async fn keep_audit_head(
    shared: &Shared,
    peer: Peer,
    head: Head,
    signature: String,
) -> store::Result<PeerReply> {
    let refused = |message: &str| Ok(PeerReply::Error { message: message.to_owned() });
    if head.hash.len() != 64 || !head.hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return refused("the head is not SHA-256");
    }
    let identity = shared
        .db(move |store| match peer {
            Peer::Host(id) => Ok(store.host(id)?.address.identity),
            Peer::Proxy(id) => Ok(store.proxy(id)?.address.identity),
        })
        .await?;
    let name = peer_name(peer);
    if !identity.parse().is_ok_and(|key| head.is_signed(&name, &key, &signature)) {
        tracing::warn!(?peer, "an audit head that is not signed with the peer's key is passed over");
        return refused("the head is not signed with the identity key");
    }
    let Head { count, hash, time } = head;
    let row = store::AuditHead { count, hash, time, received: shared.now(), identity, signature };
    if shared.db(move |store| store.keep_audit_head(&name, &row)).await? {
        return Ok(PeerReply::Done);
    }
    tracing::error!(
        ?peer,
        count,
        "a peer's audit chain contradicts what it was: it was cut, or written anew"
    );
    refused("the chain was longer, or another, before")
}

/// Certifies the SSH host keys that a peer registered, for the name by which
/// users reach it.
async fn certify(shared: &Shared, peer: Peer) -> store::Result<PeerReply> {
    let (keys, ssh) = shared
        .db(move |store| {
            Ok(match peer {
                Peer::Host(id) => store.host(id).map(|host| (host.ssh_host_keys, host.address.ssh))?,
                Peer::Proxy(id) => store.proxy(id).map(|proxy| (proxy.ssh_host_keys, proxy.address.ssh))?,
            })
        })
        .await?;
    let refused = |message: String| Ok(PeerReply::Error { message });
    let Some(name) = host_name(&ssh) else {
        return refused(format!("{ssh:?} is not host:port: its SSH host keys cannot be certified"));
    };
    let request = |key| HostRequest { key, id: bus_name(peer), names: vec![name.clone()] };
    let requests: Vec<_> = keys.into_iter().map(request).collect();
    let now = shared.now();
    match shared.ssh_ca.sign_hosts(&requests, now) {
        Ok((signed, version)) => {
            let ends = signed.iter().map(|one| one.expires).min();
            Ok(PeerReply::SshCertificates {
                life_secs: ends.map_or(0, |ends| ends.since(now).as_secs()),
                certificates: signed.into_iter().map(|one| one.text).collect(),
                version,
            })
        }
        Err(error) => refused(format!("the SSH host keys were not certified: {error}")),
    }
}

/// The name in `name:port`, as SSH clients compare it.
fn host_name(address: &str) -> Option<String> {
    let (name, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    let name = name.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    // A comma or star would be a pattern for somebody.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    (!name.is_empty() && name.len() <= 255 && name.bytes().all(plain)).then_some(name)
}

/// What the database says, which knows of another key that it was given.
async fn is_withdrawn(shared: &Shared, peer: Peer) -> store::Result<bool> {
    let withdrawn = shared.db(move |store| match peer {
        Peer::Host(id) => Ok(store.host(id)?.withdrawn),
        Peer::Proxy(id) => Ok(store.proxy(id)?.withdrawn),
    });
    Ok(withdrawn.await?.is_some())
}

fn hosts_only() -> PeerReply {
    PeerReply::Error { message: "only hosts may ask that".to_owned() }
}

fn peer_bytes(peer: Peer) -> [u8; 16] {
    match peer {
        Peer::Host(id) => *id.as_bytes(),
        Peer::Proxy(id) => *id.as_bytes(),
    }
}

async fn register_peer(shared: &Arc<Shared>, peer: Peer, register: Register) -> store::Result<PeerReply> {
    let (now, register) = (shared.now(), Arc::new(register));
    let row = register.clone();
    let before = shared.addresses().await?;
    shared
        .db(move |store| {
            let registration = Registration {
                session: row.session,
                boot_id: &row.boot_id,
                address: &row.address,
                ssh_host_keys: &row.ssh_host_keys,
                capabilities: row.capabilities.as_ref(),
            };
            store.register(peer_bytes(peer), &registration, now)
        })
        .await?;
    // What is held: whoever owns it now says so, and the host's word on the
    // state counts where it is the owner.
    let row = register.clone();
    let fenced = shared.peers.is_fenced(peer);
    let owners = shared
        .db(move |store| {
            let mut owners = Vec::new();
            for held in &row.held {
                let project = held.report.project;
                if let Some((host, epoch, _)) = store.ownership(project)? {
                    owners.push((project, host, epoch));
                }
                // Of one that is fenced nothing is believed.
                if let Peer::Host(host) = peer
                    && !fenced
                {
                    store.observe(host, &held.report)?;
                }
            }
            Ok(owners)
        })
        .await?;
    if fenced {
        tracing::warn!(?peer, "a host that is fenced is there, and gets no lease");
        return Ok(registered(shared, owners));
    }
    shared.peers.registered(peer, register.session, shared.clock.boot());
    shared.heard(peer);
    tracing::info!(?peer, name = %register.name, session = %register.session, "registered");
    if let Peer::Host(host) = peer {
        shared.tidy(host);
        shared.tell_untold(host);
        let moved = before.get(&host).is_none_or(|address| {
            address.url != register.address.url
                || address.domain != register.address.domain
                || address.ssh != register.address.ssh
                || address.peer != register.address.peer
        });
        if moved {
            shared.announce_host(host).await?;
        }
    }
    Ok(registered(shared, owners))
}

/// The answer to a registration.
fn registered(shared: &Shared, owners: Vec<(ProjectId, HostId, Epoch)>) -> PeerReply {
    PeerReply::Registered(Registered {
        issuer: shared.issuer.clone(),
        settings: shared.settings,
        owners,
        now: shared.now(),
        backups: shared.backups.as_ref().map(|backups| backups.policy()),
    })
}

async fn route(shared: &Shared, project: ProjectId) -> store::Result<Option<Route>> {
    shared
        .db(move |store| match store.ownership(project)? {
            Some((host, epoch, false)) => {
                let found = store.host(host)?;
                if found.is_out() {
                    return Ok(None);
                }
                Ok(Some(Route { project, host, epoch, how: Reach::Remote(found.address) }))
            }
            _ => Ok(None),
        })
        .await
}

/// Somebody asked for a stopped project. The host has authorized them.
async fn wake(
    shared: &Arc<Shared>,
    host: HostId,
    project: ProjectId,
    epoch: Epoch,
) -> store::Result<PeerReply> {
    let refused = |message: &str| Ok(PeerReply::Error { message: message.to_owned() });
    let found = match shared.db(move |store| store.project(project)).await {
        Ok(found) if found.host == host && found.epoch == epoch => found,
        Ok(_) | Err(store::Error::NotFound { .. }) => return refused("the project is not on this host"),
        Err(error) => return Err(error),
    };
    let owner = found.owner;
    let allowed = [ProjectState::Stopped, ProjectState::Failed];
    match shared.begin(OperationId::random(), project, owner, Job::Start, &allowed).await {
        // Joined: it is on its way, or up.
        Err(store::Error::WrongState { state: ProjectState::Unknown }) => {
            refused("it is not known whether the project runs")
        }
        Ok(_) | Err(store::Error::WrongState { .. }) => Ok(PeerReply::Done),
        Err(store::Error::Busy { operation }) => {
            match shared.db(move |store| store.operation(operation)).await?.job {
                Job::Create | Job::Start => Ok(PeerReply::Done),
                job => refused(&format!("the project is busy: {}", job.kind())),
            }
        }
        Err(error) => Err(error),
    }
}

/// Stops a project that its host has found idle, in its users' presence or not.
/// The fence keeps that from cutting off anything exclusive.
async fn stop_idle(
    shared: &Arc<Shared>,
    host: cocalc_ids::HostId,
    project: ProjectId,
    epoch: Epoch,
) -> store::Result<PeerReply> {
    let refused = |message: &str| Ok(PeerReply::Error { message: message.to_owned() });
    let found = match shared.db(move |store| store.project(project)).await {
        Ok(found) if found.host == host && found.epoch == epoch => found,
        Ok(_) | Err(store::Error::NotFound { .. }) => return refused("the project is not on this host"),
        Err(error) => return Err(error),
    };
    // Somebody may have asked for it a moment ago.
    if found.config.idle.keep_until.is_some_and(|until| until > shared.now()) {
        return refused("somebody wants it to run");
    }
    let job = Job::Stop { grace_ms: IDLE_GRACE_MS };
    match shared.begin(OperationId::random(), project, found.owner, job, &[ProjectState::Running]).await {
        Ok(_) => Ok(PeerReply::Done),
        Err(store::Error::Busy { operation }) => {
            let job = shared.db(move |store| store.operation(operation)).await?.job;
            refused(&format!("the project is busy: {}", job.kind()))
        }
        Err(store::Error::WrongState { state }) => refused(&format!("the project is {state}")),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_keys_are_certified_for_plain_names() {
        assert_eq!(host_name("Alpha.example:2222").as_deref(), Some("alpha.example"));
        assert_eq!(host_name("[2001:db8::1]:22").as_deref(), Some("2001:db8::1"));
        for bad in ["", "alpha", ":22", "*:22", "a,b:22", "a b:22", "alpha:ssh"] {
            assert_eq!(host_name(bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_go_to_who_asked() {
        let (me, other) = (Peer::Host(HostId::random()), Peer::Host(HostId::random()));
        let own = format!("_INBOX.{}", bus_name(me));
        for (subject, expected) in [
            (format!("{own}.a.b"), true),
            (format!("_INBOX.{}.a", bus_name(other)), false),
            (cocalc_core::control::stream_subject(other), false),
            (cocalc_core::control::stream_subject(me), false),
            (format!("{own}0.a"), false),
            (format!("{own}.*"), false),
            (own, false),
        ] {
            assert_eq!(is_inbox_of(me, &subject), expected, "{subject}");
        }
    }
}
