//! The gate of a host: its own rights, its own projects.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    auth::{Auth, Context, Denial},
    ids::{Action, ProjectId, Scope},
    router::{Reach, Route, Router},
    runner::{Error, ExecRequest, Process},
    stream::BoxStream,
    wake::{Awake, Wake},
};

use super::{Access, Attempt, Gate, Login, Moved, Refusal, restricted::Restricted};
use crate::Sessions;

/// How long a login waits for a move to cut over.
const PARKED_MAX: Duration = Duration::from_secs(20);

/// Lets people in by what this host knows.
#[derive(Clone, Debug)]
pub struct LocalGate {
    auth: Arc<dyn Auth>,
    router: Arc<dyn Router>,
    sessions: Arc<dyn Sessions>,
}

impl LocalGate {
    /// Makes a gate to the projects of `sessions`.
    pub fn new(auth: Arc<dyn Auth>, router: Arc<dyn Router>, sessions: Arc<dyn Sessions>) -> Self {
        Self { auth, router, sessions }
    }

    /// Starts stopped projects with `wake`. Default: what the sessions backend
    /// can do by itself.
    pub fn wake(mut self, wake: Arc<dyn Wake>) -> Self {
        self.sessions = Arc::new(Woken { sessions: self.sessions, wake });
        self
    }

    /// Where `project` has gone, if it has.
    async fn elsewhere(&self, project: ProjectId) -> Option<Moved> {
        match self.router.route(project).await {
            Ok(Route { host, how: Reach::Remote(address), .. }) => {
                Some(Moved { project, host, ssh: address.ssh })
            }
            _ => None,
        }
    }

    /// Where `project` is, once no move is cutting over; `None` if unknown.
    async fn settled(&self, project: ProjectId) -> Option<Reach> {
        let mut changes = self.router.changes();
        let settled = async {
            loop {
                match self.router.route(project).await {
                    Ok(route) if route.how == Reach::Parked => {}
                    Ok(route) => return Some(route.how),
                    Err(_) => return None,
                }
                // A closed or lagging receiver is no reason to miss the
                // change: the route is asked for again either way.
                let _ = tokio::time::timeout(Duration::from_millis(200), changes.recv()).await;
            }
        };
        match tokio::time::timeout(PARKED_MAX, settled).await {
            Ok(found) => found,
            Err(_) => Some(Reach::Parked),
        }
    }
}

#[async_trait]
impl Gate for LocalGate {
    async fn login(&self, attempt: Attempt) -> Result<Login, Refusal> {
        let Attempt { project, credential, source } = attempt;
        // The same work for every project, known or not.
        let verified = self.auth.verify(&credential, &Context { project, source }).await;
        let principal = match verified {
            Ok(principal) if principal.project == project && principal.scopes.contains(&Scope::Ssh) => {
                principal
            }
            Ok(_) => {
                return Err(refuse(
                    project,
                    &Denial::Forbidden("not for this project, or not for SSH".into()),
                ));
            }
            Err(denial) => {
                let elsewhere = match denial {
                    Denial::NotHere(_) => self.elsewhere(project).await,
                    _ => None,
                };
                return Err(Refusal { elsewhere, ..refuse(project, &denial) });
            }
        };
        let action = Action::Use(Scope::Ssh);
        let denial = match self.settled(project).await {
            Some(Reach::Remote(_)) => {
                let moved = self.elsewhere(project).await.ok_or_else(Refusal::access_denied)?;
                // Whoever holds a good credential may know where the project
                // is, although this host can no longer decide for it.
                match self.auth.authorize(&principal, project, action).await.outcome {
                    Ok(()) | Err(Denial::NotHere(_)) => {
                        return Ok(Login::Moved(moved));
                    }
                    Err(denial) => denial,
                }
            }
            _ => match self.auth.admit(&principal, project, action).await {
                Ok(admission) => {
                    let restrictions = principal.restrictions;
                    let sessions = Restricted::wrap(self.sessions.clone(), &restrictions);
                    let account = Some(principal.account);
                    return Ok(Login::Open(Access { project, account, sessions, restrictions, admission }));
                }
                Err(denial) => denial,
            },
        };
        Err(refuse(project, &denial))
    }
}

/// Logs the true reason, and returns what may be told.
fn refuse(project: ProjectId, denial: &Denial) -> Refusal {
    tracing::info!(%project, reason = %denial, "SSH login refused");
    Refusal::from(denial)
}

/// Sessions with somebody else's waking.
#[derive(Debug)]
struct Woken {
    sessions: Arc<dyn Sessions>,
    wake: Arc<dyn Wake>,
}

#[async_trait]
impl Sessions for Woken {
    async fn wake(&self, project: ProjectId) -> Awake {
        self.wake.wake(project).await
    }

    async fn exec(&self, project: ProjectId, request: ExecRequest) -> Result<Process, Error> {
        self.sessions.exec(project, request).await
    }

    async fn dial(&self, project: ProjectId, port: u16) -> Result<BoxStream, Error> {
        self.sessions.dial(project, port).await
    }
}
