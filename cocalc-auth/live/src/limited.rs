//! Bounds on how often anybody may ask, before anything is verified.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::limit::{Gcra, Quota};
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Decision, Denial, Principal, Secret, Tier},
    clock::Clock,
    ids::{AccountId, Action, ProjectId},
};

/// Addresses, accounts and projects that are remembered, of each.
const KEYS_MAX: usize = 65_536;

/// How often who may ask. Defaults suit one busy host.
#[derive(Clone, Copy, Debug)]
pub struct AuthLimits {
    /// Of one source address, or IPv6 network of 64 bits. An office may share
    /// it. Default: 500 a second, 5,000 at once.
    pub source: Quota,
    /// Of one account. Default: 500 a second, 5,000 at once.
    pub account: Quota,
    /// To one project. Default: 2,000 a second, 10,000 at once.
    pub project: Quota,
    /// To the whole host. Default: 20,000 a second, 50,000 at once.
    pub host: Quota,
}

impl Default for AuthLimits {
    fn default() -> Self {
        Self {
            source: Quota::per_second(500, 5_000),
            account: Quota::per_second(500, 5_000),
            project: Quota::per_second(2_000, 10_000),
            host: Quota::per_second(20_000, 50_000),
        }
    }
}

/// Another [`Auth`], which is asked only as often as [`AuthLimits`] say. More is
/// [`Denial::RateLimited`], with the time after which it helps to come back.
pub struct LimitedAuth {
    inner: Arc<dyn Auth>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    source: Gcra<IpAddr>,
    account: Gcra<AccountId>,
    project: Gcra<ProjectId>,
    host: Gcra<()>,
}

impl LimitedAuth {
    /// Bounds what `inner` is asked.
    pub fn new(inner: Arc<dyn Auth>, clock: Arc<dyn Clock>, limits: AuthLimits) -> Self {
        let state = State {
            source: Gcra::new(limits.source, KEYS_MAX),
            account: Gcra::new(limits.account, KEYS_MAX),
            project: Gcra::new(limits.project, KEYS_MAX),
            host: Gcra::new(limits.host, 1),
        };
        Self { inner, clock, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a signature is checked: whoever asks, and all together.
    fn asked(&self, source: Option<IpAddr>) -> Result<(), Denial> {
        let now = self.clock.boot();
        let mut state = self.state();
        source.map_or(Ok(()), |source| state.source.take(&network(source), now)).map_err(limited)?;
        state.host.take(&(), now).map_err(limited)
    }

    /// Of who was proved to be there: an account cannot use up what is another's.
    fn used(&self, principal: &Principal) -> Result<(), Denial> {
        let now = self.clock.boot();
        let mut state = self.state();
        state.account.take(&principal.account, now).map_err(limited)?;
        state.project.take(&principal.project, now).map_err(limited)
    }
}

fn limited(retry_after: Duration) -> Denial {
    Denial::RateLimited { retry_after }
}

/// What one party controls: an address, or an IPv6 network of a site.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Auth for LimitedAuth {
    async fn verify(&self, credential: &Credential, context: &Context) -> Result<Principal, Denial> {
        self.asked(context.source)?;
        self.inner.verify(credential, context).await
    }

    async fn authorize(&self, principal: &Principal, project: ProjectId, action: Action) -> Decision {
        match self.used(principal) {
            Ok(()) => self.inner.authorize(principal, project, action).await,
            // Nothing was looked at; nothing is claimed of what is known.
            Err(denial) => Decision { outcome: Err(denial), staleness: Duration::MAX, tier: Tier::Fresh },
        }
    }

    async fn admit(
        &self,
        principal: &Principal,
        project: ProjectId,
        action: Action,
    ) -> Result<Admission, Denial> {
        self.used(principal)?;
        self.inner.admit(principal, project, action).await
    }

    async fn open_session(&self, principal: &Principal, project: ProjectId) -> Result<Secret, Denial> {
        self.used(principal)?;
        self.inner.open_session(principal, project).await
    }

    async fn close_session(&self, session: &Secret) -> Result<(), Denial> {
        // Of a session that there is: a bound would keep it open.
        self.inner.close_session(session).await
    }
}

impl fmt::Debug for LimitedAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LimitedAuth").field("inner", &self.inner).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use cocalc_core::{
        auth::Via,
        ids::{Scope, Timestamp},
    };

    use super::*;

    #[derive(Debug, Default)]
    struct At(AtomicU64);

    impl Clock for At {
        fn wall(&self) -> Timestamp {
            Timestamp::from_secs(0)
        }

        fn boot(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::SeqCst))
        }
    }

    /// Lets everybody in.
    #[derive(Debug)]
    struct Open(AccountId);

    #[async_trait]
    impl Auth for Open {
        async fn verify(&self, _: &Credential, context: &Context) -> Result<Principal, Denial> {
            Ok(Principal {
                account: self.0,
                project: context.project,
                scopes: [Scope::Http].into(),
                epoch: None,
                session_epoch: None,
                acl: 0,
                via: Via::Token { jti: String::new(), once: false },
                embed_origin: None,
                expires: None,
                restrictions: Default::default(),
                source: None,
            })
        }

        async fn authorize(&self, _: &Principal, _: ProjectId, _: Action) -> Decision {
            Decision { outcome: Ok(()), staleness: Duration::ZERO, tier: Tier::Fresh }
        }

        async fn admit(&self, _: &Principal, _: ProjectId, _: Action) -> Result<Admission, Denial> {
            Err(Denial::Stale)
        }

        async fn open_session(&self, _: &Principal, _: ProjectId) -> Result<Secret, Denial> {
            Err(Denial::Stale)
        }

        async fn close_session(&self, _: &Secret) -> Result<(), Denial> {
            Err(Denial::Stale)
        }
    }

    #[tokio::test]
    async fn each_party_has_its_own_bound() {
        let clock = Arc::new(At::default());
        let limits = AuthLimits {
            source: Quota::per_second(1, 3),
            account: Quota::per_second(1, 5),
            project: Quota::per_second(10, 100),
            host: Quota::per_second(10, 100_000_000),
        };
        let auth = LimitedAuth::new(Arc::new(Open(AccountId::random())), clock.clone(), limits);
        let project = ProjectId::random();
        let credential = Credential::Token(Secret::new("x"));
        let ask = async |source: &str| {
            let context = Context { project, source: Some(source.parse().unwrap()) };
            auth.verify(&credential, &context).await
        };
        for n in 0..3 {
            // One site, however many addresses it has.
            ask(&format!("2001:db8::{n}")).await.unwrap();
        }
        let second = Denial::RateLimited { retry_after: Duration::from_secs(1) };
        assert_eq!(ask("2001:db8::ffff:1").await.unwrap_err(), second);
        let principal = ask("2001:db8:0:1::1").await.unwrap();
        assert!(ask("192.0.2.1").await.is_ok(), "others are let in");

        // A million addresses take bounded memory, and shut nobody out.
        for n in 0..1_000_000_u32 {
            let address = IpAddr::from((0x0a00_0000 + n).to_be_bytes());
            auth.asked(Some(address)).unwrap();
        }
        assert!(auth.state().source.len() <= KEYS_MAX);
        assert!(ask("198.51.100.1").await.is_ok());

        let action = Action::Use(Scope::Http);
        for _ in 0..5 {
            auth.authorize(&principal, project, action).await.outcome.unwrap();
        }
        let refused = auth.authorize(&principal, project, action).await.outcome.unwrap_err();
        assert_eq!((refused.public().0, &refused), (429, &second));
        let other = Principal { account: AccountId::random(), ..principal.clone() };
        auth.authorize(&other, project, action).await.outcome.unwrap();
        clock.0.store(1000, Ordering::SeqCst);
        auth.authorize(&principal, project, action).await.outcome.unwrap();
        assert!(ask("2001:db8::1").await.is_ok(), "what was told is enough");
    }
}
