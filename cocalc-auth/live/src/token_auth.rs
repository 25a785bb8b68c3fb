//! Decides on a host: `impl Auth`.

use std::{
    fmt,
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
    token::{Claims, Expect, LEEWAY, TokenError, TokenId, Usage},
};
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Via},
    chain,
    ids::{AccountId, Action, Epoch, HostId, KeyId, ProjectId, ProxyId, Scope, Timestamp},
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

/// Decides by connect tokens, browser sessions and SSH keys, from the cached
/// ACL, for the projects that this host holds.
pub struct TokenAuth {
    knowledge: Arc<Knowledge>,
    host: HostId,
    grants: Arc<dyn Grants>,
    audit: Option<AuditLog>,
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
        Self { knowledge, host, grants, audit, allowed: AtomicU64::new(0) }
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
            Ok(claims) => Ok(principal(claims)),
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
            via: Via::Session { hash: hash.to_string() },
            embed_origin: session.embed_origin,
            expires: None,
        })
    }

    async fn attested(&self, key: &str, project: ProjectId, proxy: ProxyId) -> Result<Principal, Denial> {
        let principal = self.key(key, project, Some(proxy)).await?;
        if self.knowledge.with(|cache| cache.attesting_proxy(project, proxy).is_some()) {
            return Ok(principal);
        }
        // The owner may have allowed it since the project left; its host knows.
        let left = self.grants.held(project).is_none();
        Err(denial(if left { Refusal::NotHeld } else { Refusal::ProxyWithdrawn }))
    }

    async fn key(&self, key: &str, project: ProjectId, proxy: Option<ProxyId>) -> Result<Principal, Denial> {
        let find = || self.knowledge.with(|cache| cache.find_key(project, key));
        if self.grants.held(project).is_none() {
            // What is still known of a project that has left proves who may
            // hear where it is; every use is refused. Nothing is fetched for
            // somebody who has proved nothing yet.
            return match find() {
                Ok(Some((account, key))) => Ok(by_key(account, key, proxy, project)),
                _ => Err(denial(Refusal::NotHeld)),
            };
        }
        let mut found = find();
        if found.is_err() && self.knowledge.fetch(project, || find().is_ok()).await {
            found = find();
        }
        let (account, key) = found
            .map_err(denial)?
            .ok_or_else(|| Denial::BadCredential("the key is in no list of the project".to_owned()))?;
        Ok(by_key(account, key, proxy, project))
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
            Via::Session { hash } => {
                let hash = hash.parse().map_err(|_| Denial::BadCredential("no such session".to_owned()))?;
                Proof::Session(hash)
            }
            Via::SshKey { key, proxy: None } => Proof::Key(*key),
            Via::SshKey { key, proxy: Some(proxy) } => Proof::AttestedKey(*key, *proxy),
            _ => return Err(Denial::BadCredential("a proof of unknown kind".to_owned())),
        };
        Ok(Ask {
            account: principal.account,
            project,
            action,
            epoch: principal.epoch,
            session_epoch: principal.session_epoch,
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
            event.account = Some(principal.account);
            event.action = Some(format!("{action:?}"));
            event.staleness_ms = verdict.staleness.and_then(|age| u64::try_from(age.as_millis()).ok());
        });
    }

    fn record_denial(&self, principal: &Principal, action: Action, denial: &Denial) {
        self.record("deny", denial.to_string(), principal.project, |event| {
            event.account = Some(principal.account);
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
            Credential::SshKey(key) => self.key(key, context.project, None).await,
            Credential::AttestedSshKey { key, proxy } => match proxy.parse() {
                Ok(proxy) => self.attested(key, context.project, proxy).await,
                Err(_) => Err(Denial::BadCredential("a proxy without an id".to_owned())),
            },
            _ => Err(Denial::BadCredential("a credential of unknown kind".to_owned())),
        };
        if let Err(denial) = &verified {
            // Without the epoch: nothing here looks at what this host holds, which
            // would show in the time that it takes.
            self.write("deny", denial.to_string(), context.project, |event| {
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
        self.record_decision(principal, action, &verdict);
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
            event.account = Some(principal.account);
            event.action = Some("open session".to_owned());
        });
        opened
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

fn principal(claims: Claims) -> Principal {
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
    }
}

fn by_key(account: AccountId, key: KeyId, proxy: Option<ProxyId>, project: ProjectId) -> Principal {
    Principal {
        account,
        project,
        scopes: [Scope::Ssh].into(),
        epoch: None,
        session_epoch: None,
        acl: 0,
        via: Via::SshKey { key, proxy },
        embed_origin: None,
        expires: None,
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
