//! How often anybody may call.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use cocalc_auth::limit::{Gcra, Quota};
use cocalc_ids::AccountId;
use http::{HeaderMap, StatusCode};

use crate::{api::Problem, shared::Shared};

/// Addresses, accounts and names that are remembered, of each.
const KEYS_MAX: usize = 65_536;

/// Calls of one address, or IPv6 network of 64 bits: an office may share it.
const ADDRESS: (u32, u32) = (200, 4_000);
/// Calls of one account.
const ACCOUNT: (u32, u32) = (200, 4_000);
/// Refused credentials of one address, before any is looked up.
const FAILURES: (u32, u32) = (5, 100);
/// Passwords that are tried for one name: from many addresses, too.
const LOGINS: Quota = Quota { interval: Duration::from_secs(10), burst: 10 };

/// Log-ins that one address begins at OpenID providers: an office may share it.
const BEGINNINGS: (u32, u32) = (2, 200);

/// The limits of a running master.
#[derive(Debug)]
pub(crate) struct Limits {
    trusted: Vec<IpAddr>,
    state: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: Gcra<IpAddr>,
    account: Gcra<AccountId>,
    failures: Gcra<IpAddr>,
    /// Tries at accounts.
    logins: Gcra<AccountId>,
    /// Tries at names that nobody has.
    strangers: Gcra<String>,
    /// Log-ins with OpenID, apart from tries at passwords: whoever guesses those
    /// must not keep people out who come another way.
    identified: Gcra<AccountId>,
    /// Log-ins that addresses begin.
    beginnings: Gcra<IpAddr>,
}

/// Where a call comes from, as far as can be believed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source(pub(crate) IpAddr);

impl Limits {
    pub(crate) fn new(trusted: Vec<IpAddr>) -> Self {
        let quota = |(rate, burst)| Quota::per_second(rate, burst);
        let state = Inner {
            address: Gcra::new(quota(ADDRESS), KEYS_MAX),
            account: Gcra::new(quota(ACCOUNT), KEYS_MAX),
            failures: Gcra::new(quota(FAILURES), KEYS_MAX),
            logins: Gcra::new(LOGINS, KEYS_MAX),
            strangers: Gcra::new(LOGINS, KEYS_MAX),
            identified: Gcra::new(LOGINS, KEYS_MAX),
            beginnings: Gcra::new(quota(BEGINNINGS), KEYS_MAX),
        };
        Self { trusted, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last address that no trusted proxy has, reading backwards: what
    /// stands before it anybody can have written.
    fn source(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let is_trusted = |address: &IpAddr| self.trusted.contains(&address.to_canonical());
        if !is_trusted(&peer) {
            return peer;
        }
        let texts = headers.get_all("x-forwarded-for").iter().filter_map(|field| field.to_str().ok());
        let hops: Vec<&str> = texts.flat_map(|field| field.split(',')).map(str::trim).collect();
        let mut source = peer;
        for hop in hops.into_iter().rev() {
            let Ok(address) = hop.parse::<IpAddr>() else { break };
            source = address;
            if !is_trusted(&address) {
                break;
            }
        }
        source
    }

    /// A call of an account that was proved to be there.
    pub(crate) fn account(&self, account: AccountId, now: Duration) -> Result<(), Problem> {
        self.lock().account.take(&account, now).map_err(Problem::rate_limited)
    }

    /// Somebody tries a password for this name, which is `account`'s or
    /// nobody's. The two are counted apart: with more made-up names than are
    /// remembered, the tries at a real one would be forgotten.
    pub(crate) fn login(&self, account: Option<AccountId>, name: &str, now: Duration) -> Result<(), Problem> {
        let mut state = self.lock();
        let taken = match account {
            Some(account) => state.logins.take(&account, now),
            None => state.strangers.take(&name.to_owned(), now),
        };
        taken.map_err(Problem::rate_limited)
    }

    /// An OpenID provider has said that somebody is this account.
    pub(crate) fn identified(&self, account: AccountId, now: Duration) -> Result<(), Problem> {
        self.lock().identified.take(&account, now).map_err(Problem::rate_limited)
    }

    /// Somebody begins a log-in at an OpenID provider, which is remembered.
    pub(crate) fn begin(&self, source: IpAddr, now: Duration) -> Result<(), Problem> {
        self.lock().beginnings.take(&network(source), now).map_err(Problem::rate_limited)
    }
}

/// What one party controls: an address, or an IPv6 network of a site.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// Refuses whoever calls too often, before anything is looked up.
pub(crate) async fn limit(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<SocketAddr>().map(SocketAddr::ip);
    let Some(peer) = peer else { return next.run(request).await };
    let source = shared.limits.source(peer, request.headers());
    let (key, now) = (network(source), shared.clock.boot());
    let allowed = {
        let mut state = shared.limits.lock();
        // One that has failed too often waits until one failure is forgiven.
        let failed = state.failures.peek(&key, now);
        failed.and_then(|()| state.address.take(&key, now))
    };
    if let Err(wait) = allowed {
        return Problem::rate_limited(wait).into_response();
    }
    request.extensions_mut().insert(Source(source));
    let response = next.run(request).await;
    if response.status() == StatusCode::UNAUTHORIZED {
        let _ = shared.limits.lock().failures.take(&key, shared.clock.boot());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_names_do_not_give_more_tries_at_a_real_one() {
        let limits = Limits::new(vec![]);
        let account = AccountId::random();
        let mut granted = 0;
        for round in 0..100 {
            for name in 0..2 * KEYS_MAX / 100 {
                let _ = limits.login(None, &format!("{round}-{name}"), Duration::ZERO);
            }
            granted += u32::from(limits.login(Some(account), "somebody", Duration::ZERO).is_ok());
        }
        assert_eq!(granted, LOGINS.burst);
    }

    #[test]
    fn only_trusted_proxies_say_who_calls() {
        let proxy: IpAddr = "10.0.0.1".parse().unwrap();
        let limits = Limits::new(vec![proxy, "10.0.0.2".parse().unwrap()]);
        let headers = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-forwarded-for", text.parse().unwrap());
            headers
        };
        let user: IpAddr = "192.0.2.7".parse().unwrap();
        for (peer, text, source) in [
            (user, "203.0.113.9", "192.0.2.7"),
            (proxy, "203.0.113.9", "203.0.113.9"),
            // The user wrote the first one.
            (proxy, "127.0.0.1, 203.0.113.9", "203.0.113.9"),
            (proxy, "1.1.1.1, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
            (proxy, "garbage", "10.0.0.1"),
            (proxy, "", "10.0.0.1"),
        ] {
            assert_eq!(limits.source(peer, &headers(text)), source.parse::<IpAddr>().unwrap(), "{text}");
        }
    }
}
