//! SSH certificates: of users for their projects, and the keys that sign them.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_auth_ssh::{
    AuthorityError, KeyInfo, KeyLine, Kind, Ports, Restrictions, SourceList, USER_LIFE, UserRequest,
};
use cocalc_ids::{Action, ProjectId, Scope};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    connect::{Ways, ways},
    input::{Asked, Body, Id},
    problem::{Answer, Problem},
    receipts::Wait,
    view::time,
};
use crate::{receipts::Receipt, shared::Shared};

/// The longest command that a certificate forces.
const COMMAND_BYTES_MAX: usize = 4096;
/// The longest list of addresses in a certificate.
const SOURCES_BYTES_MAX: usize = 2048;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(certify)).routes(routes!(rotate)).routes(routes!(withdraw))
}

/// For everybody: what is in it is public.
pub(super) fn open_routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(show))
}

#[derive(Serialize, ToSchema)]
struct AuthorityKeyView {
    /// `user`: signs users' certificates; `host`: hosts'.
    kind: &'static str,
    /// `current`: signs; `next`: published, and does not sign yet; `former`:
    /// trusted until what it signed has ended.
    state: &'static str,
    /// `SHA256:…`
    fingerprint: String,
    /// `algorithm base64`
    key: String,
    /// When it began to sign, was published, or ceased to sign.
    since: Option<String>,
}

impl From<KeyInfo> for AuthorityKeyView {
    fn from(key: KeyInfo) -> Self {
        let kind = match key.kind {
            Kind::User => "user",
            Kind::Host => "host",
        };
        Self {
            kind,
            state: key.state,
            fingerprint: key.fingerprint,
            key: key.key,
            since: key.since.map(time),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct SshCaView {
    /// Grows with each change.
    version: u64,
    /// The keys that sign users' certificates, as `algorithm base64`.
    user: Vec<String>,
    /// Those that sign certificates of hosts and proxies.
    host: Vec<String>,
    /// What is known of each.
    keys: Vec<AuthorityKeyView>,
    /// Keys that were withdrawn, the latest last.
    withdrawn: Vec<String>,
    /// Lines for a user's `known_hosts`, after which nobody is asked about a
    /// fingerprint. Write the names of the federation's hosts for `*` where
    /// they are known.
    known_hosts: Vec<String>,
    /// Where a change is in force; with `wait`, when it is so everywhere. Only
    /// in the answer to a change.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Receipt>,
}

impl SshCaView {
    fn new(shared: &Shared, receipt: Option<Receipt>) -> Self {
        let (public, keys) = shared.ssh_ca.list();
        let trusted = public.host.iter().map(|key| format!("@cert-authority * {key}"));
        let revoked = public.withdrawn.iter().map(|key| format!("@revoked * {key}"));
        Self {
            version: public.version,
            known_hosts: trusted.chain(revoked).collect(),
            user: public.user,
            host: public.host,
            keys: keys.into_iter().map(Into::into).collect(),
            withdrawn: public.withdrawn,
            receipt,
        }
    }
}

/// Shows the public keys that sign SSH certificates.
#[utoipa::path(get, path = "/ssh-ca", tag = "ssh-ca",
    responses((status = 200, body = SshCaView), (status = "default", body = Problem)))]
async fn show(State(shared): State<Arc<Shared>>) -> Json<SshCaView> {
    Json(SshCaView::new(&shared, None))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewCertificate {
    /// A line of a public key file: `algorithm base64`.
    public_key: String,
    /// How long it lives; 1 to 3600, default 300. What was opened with it may
    /// last longer.
    ttl_secs: Option<u64>,
    /// The addresses and networks from which it is good, with commas between;
    /// default: all.
    source_address: Option<String>,
    /// The only command that it runs; default: any.
    force_command: Option<String>,
    /// Whether it permits terminals; default: yes.
    permit_pty: Option<bool>,
    /// Whether it permits connections to ports of the project; default: yes.
    permit_port_forwarding: Option<bool>,
}

#[derive(Serialize, ToSchema)]
struct CertificateView {
    /// A line of a certificate file: `algorithm base64`.
    certificate: String,
    /// Its name in logs: account, project and number.
    key_id: String,
    /// Its number.
    serial: String,
    expires_at: String,
    #[serde(flatten)]
    ways: Ways,
}

impl NewCertificate {
    fn restrictions(&self) -> Answer<Restrictions> {
        let command = self.force_command.clone();
        let sensible = |command: &String| {
            !command.is_empty() && command.len() <= COMMAND_BYTES_MAX && !command.contains(['\0', '\n', '\r'])
        };
        if !command.as_ref().is_none_or(sensible) {
            return Err(Problem::invalid("force_command: one line of at most 4096 bytes"));
        }
        let ports = if self.permit_port_forwarding.unwrap_or(true) { Ports::All } else { Ports::none() };
        Ok(Restrictions {
            command,
            pty: self.permit_pty.unwrap_or(true),
            listen: ports.clone(),
            ports,
            ..Restrictions::default()
        })
    }

    fn sources(&self) -> Answer<Option<String>> {
        let Some(sources) = &self.source_address else { return Ok(None) };
        if sources.len() > SOURCES_BYTES_MAX {
            return Err(Problem::invalid("source_address: at most 2048 bytes"));
        }
        let parsed = SourceList::parse_networks(sources);
        parsed.map_err(|error| Problem::invalid(format!("source_address: {error}")))?;
        Ok(Some(sources.clone()))
    }
}

/// Certifies an SSH key of the caller for a project, for a short time, and says
/// where to show it. What the caller may do is decided by the host, then.
#[utoipa::path(post, path = "/projects/{id}/ssh-certificate", tag = "ssh-ca", params(("id" = String, Path)),
    request_body = NewCertificate,
    responses((status = 201, body = CertificateView), (status = "default", body = Problem)))]
async fn certify(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(asked): Body<NewCertificate>,
) -> Answer<(StatusCode, Json<CertificateView>)> {
    let line = KeyLine::parse(&asked.public_key)
        .map_err(|error| Problem::invalid(format!("public_key: {error}")))?;
    if !line.options_text.is_empty() {
        return Err(Problem::invalid("public_key: without options; ask for them by name"));
    }
    let (restrictions, sources) = (asked.restrictions()?, asked.sources()?);
    let life = asked.ttl_secs.map_or(USER_LIFE, Duration::from_secs);
    let (membership, ways) = ways(&shared, &caller, id, None).await?;
    if !membership.role.permits(Action::Use(Scope::Ssh)) {
        return Err(Problem::denied());
    }
    let request = UserRequest {
        key: line.key,
        account: caller.id,
        project: Some(id),
        session_epoch: membership.account.session_epoch,
        acl: membership.project.acl_version,
        sources,
        restrictions,
        life,
    };
    let signed = shared.ssh_ca.sign_user(&request, shared.now()).map_err(|error| match error {
        AuthorityError::Life => Problem::invalid("ttl_secs: 1 to 3600"),
        AuthorityError::Key => Problem::invalid("public_key: not a public key of OpenSSH"),
        other => Problem::internal(&other),
    })?;
    caller.notes("ssh-certificate.sign", &signed.key_id);
    tracing::info!(key_id = signed.key_id, "an SSH certificate was signed");
    let view = CertificateView {
        certificate: signed.text,
        key_id: signed.key_id,
        serial: signed.serial.to_string(),
        expires_at: time(signed.expires),
        ways,
    };
    Ok((StatusCode::CREATED, Json(view)))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Force {
    /// Even if hosts and users may not know the next key yet.
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WhichRing {
    /// `user`, or `host`.
    #[schema(value_type = String)]
    kind: Kind,
}

/// Lets the next key of a kind sign. Administrators.
#[utoipa::path(post, path = "/ssh-ca/rotate", tag = "ssh-ca", params(Force, Wait), request_body = WhichRing,
    responses((status = 200, body = SshCaView), (status = "default", body = Problem)))]
async fn rotate(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(force): Asked<Force>,
    Asked(wait): Asked<Wait>,
    Body(which): Body<WhichRing>,
) -> Answer<Json<SshCaView>> {
    caller.require_admin()?;
    let task = shared.clone();
    let rotate = move || task.ssh_ca.rotate(which.kind, force.force, task.now());
    tokio::task::spawn_blocking(rotate).await.map_err(|error| Problem::internal(&error))??;
    let targets = shared.announce_ssh_ca().await?;
    let version = shared.ssh_ca.public().version;
    let receipt = wait.receipt(&shared, caller.change("ssh-ca.rotate", version), targets).await?;
    Ok(Json(SshCaView::new(&shared, receipt)))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WhichKey {
    /// `SHA256:…`
    fingerprint: String,
}

/// Withdraws a key at once: no certificate that it signed is good any more, and
/// what users opened with one is closed. Administrators.
#[utoipa::path(post, path = "/ssh-ca/withdraw", tag = "ssh-ca", params(Wait), request_body = WhichKey,
    responses((status = 200, body = SshCaView), (status = "default", body = Problem)))]
async fn withdraw(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Asked(wait): Asked<Wait>,
    Body(which): Body<WhichKey>,
) -> Answer<Json<SshCaView>> {
    caller.require_admin()?;
    let (task, name) = (shared.clone(), which.fingerprint.clone());
    let withdraw = move || task.ssh_ca.withdraw(&which.fingerprint, task.now());
    let found = tokio::task::spawn_blocking(withdraw).await.map_err(|error| Problem::internal(&error))??;
    if !found {
        return Err(Problem::not_found("key"));
    }
    let targets = shared.announce_ssh_ca().await?;
    let receipt = wait.receipt(&shared, caller.change("ssh-ca.withdraw", name), targets).await?;
    Ok(Json(SshCaView::new(&shared, receipt)))
}
