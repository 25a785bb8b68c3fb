//! Decides on a host: `impl Auth`.

use std::{
    fmt,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{
    acl::{Ask, Proof, Refusal, Verdict},
    audit::Event,
    session::{SessionHash, SessionRecord, SessionSecret},
    stream::SshKey,
    token::{Claims, Expect, LEEWAY, LoginTag, TokenError, TokenId, Usage},
};
use cocalc_auth_ssh::{Found, Options, certificate_fingerprint, find_key, fingerprint, verify_user};
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Via},
    chain,
    ids::{AccountId, Action, Epoch, HostId, ProjectId, ProxyId, Restrictions, Scope, Timestamp},
};

use crate::{
    AuditLog, Knowledge, denial,
    knowledge::{Error, SESSION_LIFE, blocking},
    tier,
};

/// One in so many allowed decisions is written to the audit log.
const ALLOWED_SAMPLE: u64 = 64;

/// Which projects this host holds the grant of. Closures are `Grants` too.
pub trait Grants: Send + Sync + 'static {
    /// The epoch of the grant that this host durably holds for `project`, if it
    /// does, and has not frozen it.
    fn held(&self, project: ProjectId) -> Option<Epoch>;
}

impl<F: Fn(ProjectId) -> Option<Epoch> + Send + Sync + 'static> Grants for F {
    fn held(&self, project: ProjectId) -> Option<Epoch> {
        self(project)
    }
}

/// Reads `~/.ssh/authorized_keys` of the projects of this host.
///
/// # Contract
///
/// - What is returned is inside the project, whatever links its tenant made.
/// - No more than [`FILE_BYTES_MAX`](cocalc_auth_ssh::FILE_BYTES_MAX) bytes are
///   returned; a larger file is none.
#[async_trait]
pub trait InsideKeys: fmt::Debug + Send + Sync + 'static {
    /// The file, or `None` if there is none that may be read.
    async fn file(&self, project: ProjectId) -> Option<Vec<u8>>;
}

/// Decides by connect tokens, browser sessions, SSH keys and SSH certificates,
/// from the cached ACL, for the projects that this host holds.
pub struct TokenAuth {
    knowledge: Arc<Knowledge>,
    host: HostId,
    grants: Arc<dyn Grants>,
    audit: Option<AuditLog>,
    inside: Option<Arc<dyn InsideKeys>>,
    allowed: AtomicU64,
}

impl TokenAuth {
    /// Decides for `host`, which holds what `grants` says.
    pub fn new(
        knowledge: Arc<Knowledge>,
        host: HostId,
        grants: Arc<dyn Grants>,
        audit: Option<AuditLog>,
    ) -> Self {
        Self { knowledge, host, grants, audit, inside: None, allowed: AtomicU64::new(0) }
    }

    /// Looks also into the lists of keys inside projects, where their owners
    /// let them count. Default: it does not, and those lists open nothing.
    pub fn inside_keys(mut self, keys: Arc<dyn InsideKeys>) -> Self {
        self.inside = Some(keys);
        self
    }

    fn token(&self, token: &str, context: &Context) -> Result<Principal, Denial> {
        // Without the issuer, or with a clock that is far off, nothing can be
        // said of any token.
        let issuer = self.knowledge.issuer().ok_or(Denial::Stale)?;
        if self.knowledge.skewed() {
            return Err(Denial::Stale);
        }
        let now = self.knowledge.master_now();
        let expect = Expect { issuer: &issuer, host: Some(self.host), project: context.project };
        match self.knowledge.verify(token, &expect, now) {
            Ok(claims) if claims.usage == Usage::Once && self.may_be_forgotten(&claims) => Err(Denial::Used),
            Ok(claims) => Ok(principal(claims, context.source)),
            Err(TokenError::Expired) => Err(Denial::TokenExpired),
            Err(error) => Err(Denial::BadCredential(error.to_string())),
        }
    }

    /// The list of used tokens may have lost its end when the machine went down:
    /// a one-use token that was made before it came up is not believed.
    fn may_be_forgotten(&self, claims: &Claims) -> bool {
        let boot = i64::try_from(self.knowledge.clock.boot().as_millis()).unwrap_or(i64::MAX);
        let booted = Timestamp::from_millis(self.knowledge.master_now().millis().saturating_sub(boot));
        claims.issued() < booted.plus(LEEWAY)
    }

    fn session(&self, cookie: &str, context: &Context) -> Result<Principal, Denial> {
        let unknown = || Denial::BadCredential("no such session".to_owned());
        let hash = SessionHash::of_cookie(cookie).ok_or_else(unknown)?;
        // One indexed read, from the page cache as a rule.
        let found = self.knowledge.store.session(&hash).map_err(|error| {
            tracing::error!(error = %chain(&error), "cannot look up a session");
            Denial::Stale
        })?;
        let session = found.filter(|session| session.project == context.project).ok_or_else(unknown)?;
        if self.knowledge.master_now().since(session.created) > SESSION_LIFE {
            return Err(unknown());
        }
        Ok(Principal {
            account: session.account,
            project: session.project,
            scopes: session.scopes,
            // Sessions outlive a move, and an abort of one: the ACL decides.
            epoch: None,
            session_epoch: Some(session.session_epoch),
            acl: session.acl,
            via: Via::Session {
                hash: hash.to_string(),
                login: session.login.map(|login| login.to_string()).unwrap_or_default(),
            },
            embed_origin: session.embed_origin,
            expires: None,
            restrictions: Restrictions::default(),
            source: context.source,
        })
    }

    /// Somebody who, as `proxy` attests, holds the key of `verified`.
    async fn attested(&self, verified: Principal, proxy: ProxyId) -> Result<Principal, Denial> {
        let project = verified.project;
        let known = || self.knowledge.with(|cache| cache.project(project).is_some());
        if self.grants.held(project).is_some() && !known() {
            self.knowledge.fetch(project, known).await;
        }
        if self.knowledge.with(|cache| cache.attesting_proxy(project, proxy).is_some()) {
            return Ok(verified);
        }
        // The owner may have allowed it since the project left; its host knows.
        let left = self.grants.held(project).is_none();
        Err(denial(if left { Refusal::NotHeld } else { Refusal::ProxyWithdrawn }))
    }

    async fn key(&self, key: &str, context: &Context, proxy: Option<ProxyId>) -> Result<Principal, Denial> {
        let project = context.project;
        let find = || self.knowledge.with(|cache| cache.find_keys(project, key));
        if self.grants.held(project).is_none() {
            // What is still known of a project that has left proves who may
            // hear where it is; every use is refused. Nothing is fetched for
            // somebody who has proved nothing yet.
            return match find() {
                Ok(found) => self.admitted(&found, context, proxy).unwrap_or(Err(denial(Refusal::NotHeld))),
                Err(_) => Err(denial(Refusal::NotHeld)),
            };
        }
        let mut found = find();
        if found.is_err() && self.knowledge.fetch(project, || find().is_ok()).await {
            found = find();
        }
        match self.admitted(&found.map_err(denial)?, context, proxy) {
            Some(decided) => decided,
            None => self.inside(key, context, proxy).await,
        }
    }

    /// What the entries of a key come to, here and now; `None` if there is no
    /// entry at all.
    ///
    /// Of each account the first entry counts that admits. Of several accounts
    /// one that sets no limits goes first: nobody limits the key's holder by
    /// listing it too.
    fn admitted(
        &self,
        found: &[SshKey],
        context: &Context,
        proxy: Option<ProxyId>,
    ) -> Option<Result<Principal, Denial>> {
        let now = self.knowledge.master_now();
        let (mut admitted, mut refused) = (Vec::<(&SshKey, Restrictions)>::new(), None);
        for listed in found {
            let decided = Options::parse(&listed.options)
                .and_then(|options| options.admits(context.source, now).map(|()| options));
            match decided {
                Ok(options) if admitted.iter().all(|(other, _)| other.account != listed.account) => {
                    admitted.push((listed, options.restrictions().clone()));
                }
                Ok(_) => {}
                Err(error) => refused = Some(Err(Denial::BadCredential(error.to_string()))),
            }
        }
        let free = admitted.iter().position(|(_, restrictions)| restrictions.are_none()).unwrap_or(0);
        if free < admitted.len() {
            let (listed, restrictions) = admitted.swap_remove(free);
            let via = Via::SshKey { key: listed.id, proxy };
            return Some(Ok(by_key(listed.account, via, restrictions, context)));
        }
        refused
    }

    /// Looks into the project's own list, if that counts.
    async fn inside(
        &self,
        key: &str,
        context: &Context,
        proxy: Option<ProxyId>,
    ) -> Result<Principal, Denial> {
        let unknown = || Denial::BadCredential("the key is in no list of the project".to_owned());
        let project = context.project;
        let owner = self.knowledge.with(|cache| cache.inside_keys(project));
        let (Some(owner), Some(inside)) = (owner, &self.inside) else { return Err(unknown()) };
        let file = inside.file(project).await.ok_or_else(unknown)?;
        match find_key(&file, key, context.source, self.knowledge.master_now()) {
            Found::Nowhere => Err(unknown()),
            Found::Refused(error) => {
                Err(Denial::BadCredential(format!("the project's authorized_keys: {error}")))
            }
            Found::Admitted(restrictions) => {
                let fingerprint = fingerprint(key).ok_or_else(unknown)?;
                Ok(by_key(owner, Via::InsideSshKey { fingerprint, proxy }, restrictions, context))
            }
        }
    }

    fn certificate(
        &self,
        text: &str,
        context: &Context,
        proxy: Option<ProxyId>,
    ) -> Result<Principal, Denial> {
        if self.knowledge.skewed() {
            return Err(Denial::Stale);
        }
        let authorities = self.knowledge.with(|cache| cache.ssh_authorities().user.clone());
        let now = self.knowledge.master_now();
        // The signatures are checked without the lock.
        let verified = verify_user(text, &authorities, context.project, context.source, now)
            .map_err(|error| Denial::BadCredential(error.to_string()))?;
        Ok(Principal {
            account: verified.account,
            project: context.project,
            scopes: [Scope::Ssh].into(),
            epoch: None,
            session_epoch: Some(verified.session_epoch),
            acl: verified.acl,
            via: Via::SshCertificate {
                serial: verified.serial,
                key_id: verified.key_id,
                authority: verified.authority,
                fingerprint: verified.fingerprint,
                proxy,
            },
            embed_origin: None,
            expires: Some(verified.expires),
            restrictions: verified.restrictions,
            source: context.source,
        })
    }

    fn ask(&self, principal: &Principal, project: ProjectId, action: Action) -> Result<Ask, Denial> {
        if principal.project != project {
            return Err(Denial::Forbidden("the credential is for another project".to_owned()));
        }
        if action.scope().is_some_and(|scope| !principal.scopes.contains(&scope)) {
            return Err(Denial::Forbidden("the credential does not open this".to_owned()));
        }
        let proof = match &principal.via {
            Via::Token { .. } => Proof::Token,
            Via::Session { hash, .. } => {
                let hash = hash.parse().map_err(|_| Denial::BadCredential("no such session".to_owned()))?;
                Proof::Session(hash)
            }
            Via::SshKey { key, proxy: None } => Proof::Key(*key),
            Via::SshKey { key, proxy: Some(proxy) } => Proof::AttestedKey(*key, *proxy),
            Via::SshCertificate { authority, proxy, .. } => {
                Proof::Certificate { authority: authority.clone(), proxy: *proxy }
            }
            Via::InsideSshKey { proxy, .. } => Proof::InsideKey { proxy: *proxy },
            _ => return Err(Denial::BadCredential("a proof of unknown kind".to_owned())),
        };
        Ok(Ask {
            account: principal.account,
            project,
            action,
            epoch: principal.epoch,
            session_epoch: principal.session_epoch,
            login: login(&principal.via),
            acl: principal.acl,
            proof,
        })
    }

    /// Decides, after a fetch if that may help.
    async fn settle(&self, ask: &Ask) -> Verdict {
        let decide = || self.knowledge.decide(ask, self.grants.held(ask.project));
        let may_fetch = |verdict: &Verdict| verdict.outcome.is_err_and(Refusal::may_fetch);
        let verdict = decide();
        if !may_fetch(&verdict) {
            return verdict;
        }
        self.knowledge.fetch(ask.project, || !may_fetch(&decide())).await;
        decide()
    }

    fn record(&self, kind: &str, reason: String, project: ProjectId, fill: impl FnOnce(&mut Event)) {
        self.write(kind, reason, project, |event| {
            event.epoch = self.grants.held(project);
            fill(event);
        });
    }

    fn write(&self, kind: &str, reason: String, project: ProjectId, fill: impl FnOnce(&mut Event)) {
        let Some(audit) = &self.audit else { return };
        let mut event = Event::new(kind, reason, self.knowledge.clock.wall());
        event.project = Some(project);
        fill(&mut event);
        audit.record(event);
    }

    fn record_decision(&self, principal: &Principal, action: Action, verdict: &Verdict) {
        let kind = match verdict.outcome {
            Err(_) => "deny",
            Ok(()) if self.allowed.fetch_add(1, Ordering::Relaxed).is_multiple_of(ALLOWED_SAMPLE) => "allow",
            Ok(()) => return,
        };
        let reason = verdict.outcome.map_or_else(|refusal| refusal.to_string(), |()| "member".to_owned());
        self.record(kind, reason, principal.project, |event| {
            identify(event, principal);
            event.action = Some(format!("{action:?}"));
            event.staleness_ms = verdict.staleness.and_then(|age| u64::try_from(age.as_millis()).ok());
        });
    }

    /// Somebody was let in by SSH: by what proof.
    fn record_login(&self, principal: &Principal, verdict: &Verdict) {
        self.record("login", proof_text(&principal.via), principal.project, |event| {
            identify(event, principal);
            event.action = Some(format!("{:?}", Action::Use(Scope::Ssh)));
            event.staleness_ms = verdict.staleness.and_then(|age| u64::try_from(age.as_millis()).ok());
        });
    }

    fn record_denial(&self, principal: &Principal, action: Action, denial: &Denial) {
        self.record("deny", denial.to_string(), principal.project, |event| {
            identify(event, principal);
            event.action = Some(format!("{action:?}"));
        });
    }

    /// Administrative actions are not decided while their record would be lost.
    fn auditable(&self, action: Action) -> bool {
        action != Action::Administer || self.audit.as_ref().is_none_or(|audit| !audit.is_full())
    }

    /// What every way to use a principal has in common.
    fn usable(&self, principal: &Principal, project: ProjectId, action: Action) -> Result<Ask, Denial> {
        if !self.auditable(action) {
            return Err(Denial::Stale);
        }
        self.ask(principal, project, action)
    }

    /// A one-use token is judged like any other, so that a page can be refused
    /// before it is used up, but it carries no connection.
    fn lasting(&self, principal: &Principal, project: ProjectId, action: Action) -> Result<Ask, Denial> {
        if matches!(principal.via, Via::Token { once: true, .. }) {
            return Err(Denial::Forbidden("a one-use token opens a session, and nothing else".to_owned()));
        }
        self.usable(principal, project, action)
    }

    /// Uses up a one-use token.
    async fn redeem(&self, principal: &Principal) -> Result<(), Denial> {
        let Via::Token { jti, once: true } = &principal.via else { return Ok(()) };
        let id: TokenId = jti.parse().map_err(|_| Denial::BadCredential("no token id".to_owned()))?;
        let expires = principal.expires.ok_or(Denial::TokenExpired)?;
        let store = self.knowledge.store.clone();
        let until = expires.plus(LEEWAY);
        match blocking(move || Ok(store.insert_used(&id, until)?)).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Denial::Used),
            Err(error) => Err(failed(&error)),
        }
    }
}

#[async_trait]
impl Auth for TokenAuth {
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial> {
        let verified = match credential {
            Credential::Token(token) => self.token(token.expose(), context),
            Credential::Session(cookie) => self.session(cookie.expose(), context),
            Credential::SshKey(key) => self.key(key, context, None).await,
            Credential::SshCertificate(text) => self.certificate(text, context, None),
            Credential::AttestedSshKey { key, proxy } => match proxy_id(proxy) {
                Ok(proxy) => match self.key(key, context, Some(proxy)).await {
                    Ok(verified) => self.attested(verified, proxy).await,
                    Err(denial) => Err(denial),
                },
                Err(denial) => Err(denial),
            },
            Credential::AttestedSshCertificate { certificate, proxy } => match proxy_id(proxy) {
                Ok(proxy) => match self.certificate(certificate, context, Some(proxy)) {
                    Ok(verified) => self.attested(verified, proxy).await,
                    Err(denial) => Err(denial),
                },
                Err(denial) => Err(denial),
            },
            _ => Err(Denial::BadCredential("a credential of unknown kind".to_owned())),
        };
        if let Err(denial) = &verified {
            // Without the epoch: nothing here looks at what this host holds, which
            // would show in the time that it takes.
            self.write("deny", refusal_text(credential, denial), context.project, |event| {
                event.source = context.source.map(|source| source.to_string());
            });
        }
        verified
    }

    async fn authorize(&self, principal: &Principal, project: ProjectId, action: Action) -> Decision {
        match self.usable(principal, project, action) {
            Ok(ask) => {
                let verdict = self.settle(&ask).await;
                self.record_decision(principal, action, &verdict);
                decision(&verdict)
            }
            Err(denial) => {
                self.record_denial(principal, action, &denial);
                let (staleness, tier) = self.knowledge.freshness(project);
                Decision { outcome: Err(denial), staleness, tier }
            }
        }
    }

    async fn admit(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Denial> {
        let ask = self.lasting(principal, project, action).inspect_err(|denial| {
            self.record_denial(principal, action, denial);
        })?;
        // The fetch, if one is needed; what counts is decided and registered in
        // one step below, so that no change can fall in between.
        self.settle(&ask).await;
        let (verdict, admission) = self.knowledge.admit(&ask, self.grants.held(project));
        match (action, &verdict.outcome) {
            // Every one of them, not a sample: there are few, and they last.
            (Action::Use(Scope::Ssh), Ok(())) => self.record_login(principal, &verdict),
            _ => self.record_decision(principal, action, &verdict),
        }
        match (verdict.outcome, admission) {
            (Ok(()), Some(admission)) => Ok(admission),
            (Err(refusal), _) => Err(denial(refusal)),
            (Ok(()), None) => Err(Denial::Stale),
        }
    }

    async fn open_session(&self, principal: &Principal, project: ProjectId) -> Result<Secret, Denial> {
        let opened = self.open(principal, project).await;
        let (kind, reason) = match &opened {
            Ok(_) => ("redeem", "token".to_owned()),
            Err(denial) => ("deny", denial.to_string()),
        };
        self.record(kind, reason, project, |event| {
            identify(event, principal);
            event.action = Some("open session".to_owned());
        });
        opened
    }

    async fn close_session(&self, session: &Secret) -> Result<(), Denial> {
        let Some(hash) = SessionHash::of_cookie(session.expose()) else { return Ok(()) };
        let knowledge = Arc::clone(&self.knowledge);
        blocking(move || knowledge.end_session(hash)).await.map_err(|error| failed(&error))
    }
}

impl TokenAuth {
    async fn open(&self, principal: &Principal, project: ProjectId) -> Result<Secret, Denial> {
        if !matches!(principal.via, Via::Token { .. }) {
            return Err(Denial::Forbidden("only a token opens a session".to_owned()));
        }
        // A session opens what the token opens; any of it will do to be a
        // member whose rights are known.
        let scope = principal.scopes.first().ok_or_else(|| Denial::Forbidden("no scope".to_owned()))?;
        let ask = self.ask(principal, project, Action::Use(*scope))?;
        let verdict = self.settle(&ask).await;
        match verdict.outcome {
            // Which scopes the role permits is decided on each use.
            Ok(()) | Err(Refusal::Role) => {}
            Err(refusal) => return Err(denial(refusal)),
        }
        self.redeem(principal).await?;
        let secret = SessionSecret::random().map_err(|error| {
            tracing::error!(%error, "cannot make a session");
            Denial::Stale
        })?;
        let session = SessionRecord {
            account: principal.account,
            project,
            scopes: principal.scopes.clone(),
            session_epoch: principal.session_epoch.unwrap_or(0),
            acl: principal.acl,
            embed_origin: principal.embed_origin.clone(),
            created: self.knowledge.master_now(),
            login: login(&principal.via),
        };
        let (store, hash) = (self.knowledge.store.clone(), secret.hash());
        blocking(move || Ok(store.insert_session(&hash, &session)?)).await.map_err(|error| failed(&error))?;
        Ok(Secret::new(secret.expose()))
    }
}

impl fmt::Debug for TokenAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenAuth").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Who it is, and from where. Whose keys a project's own list has is not known:
/// the account that answers for the list is not who was there.
fn identify(event: &mut Event, principal: &Principal) {
    if !matches!(principal.via, Via::InsideSshKey { .. }) {
        event.account = Some(principal.account);
    }
    event.source = principal.source.map(|source| source.to_string());
}

/// A proof in words, without secrets.
fn proof_text(via: &Via) -> String {
    let (text, proxy) = match via {
        Via::Token { jti, .. } => (format!("token {jti}"), &None),
        Via::SshKey { key, proxy } => (format!("key {key}"), proxy),
        Via::SshCertificate { serial, key_id, fingerprint, proxy, .. } => {
            (format!("certificate {serial} \"{key_id}\" of {fingerprint}"), proxy)
        }
        Via::InsideSshKey { fingerprint, proxy } => (format!("authorized_keys {fingerprint}"), proxy),
        _ => ("session".to_owned(), &None),
    };
    match proxy {
        Some(proxy) => format!("{text} by proxy {proxy}"),
        None => text,
    }
}

/// Why a credential was refused, with what can be said of it.
fn refusal_text(credential: &Credential, denial: &Denial) -> String {
    let (kind, key) = match credential {
        Credential::SshKey(key) | Credential::AttestedSshKey { key, .. } => ("key", fingerprint(key)),
        Credential::SshCertificate(text) | Credential::AttestedSshCertificate { certificate: text, .. } => {
            ("certificate", certificate_fingerprint(text))
        }
        _ => return denial.to_string(),
    };
    match key {
        Some(key) => format!("{kind} {key}: {denial}"),
        None => format!("{kind}: {denial}"),
    }
}

/// The log-in that a token or session was made under.
fn login(via: &Via) -> Option<LoginTag> {
    match via {
        Via::Token { jti, .. } => jti.parse().ok().map(|jti: TokenId| jti.login()),
        Via::Session { login, .. } => login.parse().ok(),
        _ => None,
    }
}

fn proxy_id(text: &str) -> Result<ProxyId, Denial> {
    text.parse().map_err(|_| Denial::BadCredential("a proxy without an id".to_owned()))
}

fn principal(claims: Claims, source: Option<IpAddr>) -> Principal {
    let expires = claims.expires();
    Principal {
        account: claims.sub,
        project: claims.prj,
        scopes: claims.scp,
        epoch: Some(claims.epoch),
        session_epoch: Some(claims.sep),
        acl: claims.acl,
        via: Via::Token { jti: claims.jti.to_string(), once: claims.usage == Usage::Once },
        embed_origin: claims.emb,
        expires: Some(expires),
        restrictions: Restrictions::default(),
        source,
    }
}

fn by_key(account: AccountId, via: Via, restrictions: Restrictions, context: &Context) -> Principal {
    Principal {
        account,
        project: context.project,
        scopes: [Scope::Ssh].into(),
        epoch: None,
        session_epoch: None,
        acl: 0,
        via,
        embed_origin: None,
        expires: None,
        restrictions,
        source: context.source,
    }
}

fn decision(verdict: &Verdict) -> Decision {
    Decision {
        outcome: verdict.outcome.map_err(denial),
        staleness: verdict.staleness.unwrap_or(Duration::MAX),
        tier: tier(verdict.tier),
    }
}

fn failed(error: &Error) -> Denial {
    tracing::error!(error = %chain(error), "a token cannot be redeemed");
    Denial::Stale
}
