//! The server's own idea of who may do what.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Tier, Via},
    ids::{AccountId, Action, ProjectId, Scope},
};
use tokio::sync::watch;

/// One account with one project and one secret. A real server looks these up,
/// and compares secrets by hash.
#[derive(Debug)]
pub(crate) struct Accounts {
    account: AccountId,
    project: ProjectId,
    secret: Secret,
    sessions: Mutex<HashMap<String, Principal>>,
    /// Set to a reason when the account loses its rights: open connections
    /// end.
    revoked: watch::Sender<Option<Denial>>,
}

impl Accounts {
    pub(crate) fn new(project: ProjectId, secret: Secret) -> Self {
        Self {
            account: AccountId::random(),
            project,
            secret,
            sessions: Mutex::default(),
            revoked: watch::Sender::new(None),
        }
    }

    /// Takes the account's rights away, now.
    pub(crate) fn revoke(&self) {
        self.revoked.send_replace(Some(Denial::Forbidden("the account was closed".to_owned())));
    }
}

#[async_trait]
impl Auth for Accounts {
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial> {
        let bad = || Denial::BadCredential("not one of ours".to_owned());
        match credential {
            Credential::Token(secret)
                if context.project == self.project && secret.expose() == self.secret.expose() =>
            {
                Ok(Principal {
                    account: self.account,
                    project: self.project,
                    scopes: BTreeSet::from([Scope::Http, Scope::Ws]),
                    epoch: None,
                    session_epoch: None,
                    acl: 0,
                    via: Via::Token { jti: "secret".to_owned(), once: false },
                    embed_origin: None,
                    expires: None,
                    restrictions: Default::default(),
                    source: None,
                })
            }
            Credential::Session(value) => {
                let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
                sessions.get(value.expose()).cloned().ok_or_else(bad)
            }
            _ => Err(bad()),
        }
    }

    async fn authorize(&self, principal: &Principal, project: ProjectId, action: Action) -> Decision {
        let allowed = principal.project == project
            && action.scope().is_some_and(|scope| principal.scopes.contains(&scope));
        let outcome = match &*self.revoked.borrow() {
            Some(reason) => Err(reason.clone()),
            None if allowed => Ok(()),
            None => Err(Denial::Forbidden("not in the account's plan".to_owned())),
        };
        Decision { outcome, staleness: Duration::ZERO, tier: Tier::Fresh }
    }

    async fn admit(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Denial> {
        // Subscribed first, so that no change falls in between.
        let revoked = self.revoked.subscribe();
        self.authorize(principal, project, action).await.outcome?;
        Ok(Admission::new(revoked, ()))
    }

    async fn open_session(&self, principal: &Principal, _: ProjectId) -> Result<Secret, Denial> {
        // Two random ids are 244 bits from the system's source.
        let value = format!("{}{}", AccountId::random(), AccountId::random());
        let mut session = principal.clone();
        session.via = Via::Session { hash: String::new(), login: String::new() };
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).insert(value.clone(), session);
        Ok(Secret::new(value))
    }

    async fn close_session(&self, session: &Secret) -> Result<(), Denial> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(session.expose());
        Ok(())
    }
}
