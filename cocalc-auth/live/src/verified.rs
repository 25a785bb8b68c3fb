//! Tokens whose signature was checked a moment ago.
//!
//! A program shows the same token with every request, and the signature is most
//! of what a decision costs. What is remembered is only that these bytes are
//! authentic and what they say; issuer, host, project and time are checked each
//! time, and so is what is allowed.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use cocalc_auth::token::{Claims, Expect, TokenError, Usage, Verifier};
use cocalc_core::ids::Timestamp;
use sha2::{Digest, Sha256};

/// Tokens that are remembered: some kilobytes each thousand. At the limit, the
/// one that ends first is forgotten.
const TOKENS_MAX: usize = 8_192;

/// By its hash, so that no token is kept.
type Hash = [u8; 32];

#[derive(Debug, Default)]
pub(crate) struct Verified(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Whose keys they were checked with; with any others they are forgotten.
    /// It is held on to, so that no other verifier gets its address.
    verifier: Arc<Verifier>,
    claims: HashMap<Hash, Arc<Claims>>,
    order: BTreeSet<(u64, Hash)>,
}

impl Verified {
    /// As [`Verifier::verify`], with the keys that are in force now.
    pub(crate) fn verify(
        &self,
        verifier: &Arc<Verifier>,
        token: &str,
        expect: &Expect<'_>,
        now: Timestamp,
    ) -> Result<Claims, TokenError> {
        let hash: Hash = Sha256::digest(token).into();
        let known = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.keep_to(verifier);
            state.claims.get(&hash).cloned()
        };
        if let Some(claims) = known {
            claims.check(expect, now)?;
            return Ok(Arc::unwrap_or_clone(claims));
        }
        // Without the lock: it takes longest.
        let claims = verifier.authenticate(token)?;
        claims.check(expect, now)?;
        // What is shown once need not be known again.
        if claims.usage == Usage::Multi {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The keys may have changed meanwhile.
            if Arc::ptr_eq(&state.verifier, verifier) {
                state.remember(hash, Arc::new(claims.clone()), now);
            }
        }
        Ok(claims)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let state = self.0.lock().unwrap();
        assert_eq!(state.claims.len(), state.order.len());
        state.claims.len()
    }
}

impl State {
    fn keep_to(&mut self, verifier: &Arc<Verifier>) {
        if !Arc::ptr_eq(&self.verifier, verifier) {
            *self = Self { verifier: verifier.clone(), ..Self::default() };
        }
    }

    fn remember(&mut self, hash: Hash, claims: Arc<Claims>, now: Timestamp) {
        let now = u64::try_from(now.secs()).unwrap_or(0);
        // Two at a time, so that the work of one call is bounded and what is
        // over still goes.
        for _ in 0..2 {
            let Some(&(exp, _)) = self.order.first() else { break };
            if exp >= now && self.order.len() < TOKENS_MAX {
                break;
            }
            if let Some((_, first)) = self.order.pop_first() {
                self.claims.remove(&first);
            }
        }
        self.order.insert((claims.exp, hash));
        self.claims.insert(hash, claims);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cocalc_auth::{
        mint::{NewToken, SigningRing},
        token::Algorithm,
    };
    use cocalc_core::ids::{AccountId, Epoch, HostId, ProjectId, Scope};

    use super::*;

    const ISSUER: &str = "https://master.example";

    struct World {
        ring: SigningRing,
        verified: Verified,
        host: HostId,
        project: ProjectId,
        now: Timestamp,
    }

    impl World {
        fn new() -> Self {
            let now = Timestamp::from_secs(1_000_000);
            let ring = SigningRing::generate(Algorithm::EdDsa, now).unwrap();
            let (host, project) = (HostId::random(), ProjectId::random());
            Self { ring, verified: Verified::default(), host, project, now }
        }

        fn token(&self, ttl: u64, usage: Usage) -> String {
            let new = NewToken::new(ISSUER, self.host, AccountId::random(), self.project, Epoch::FIRST)
                .scopes([Scope::Http])
                .usage(usage)
                .ttl(Duration::from_secs(ttl));
            self.ring.mint(&new, self.now).unwrap().token
        }

        fn verify(
            &self,
            verifier: &Arc<Verifier>,
            token: &str,
            now: Timestamp,
        ) -> Result<Claims, TokenError> {
            let expect = Expect { issuer: ISSUER, host: Some(self.host), project: self.project };
            self.verified.verify(verifier, token, &expect, now)
        }
    }

    #[test]
    fn what_is_remembered_is_judged_like_what_is_not() {
        let world = World::new();
        let verifier = Arc::new(Verifier::new(&world.ring.public()));
        let token = world.token(60, Usage::Multi);
        let first = world.verify(&verifier, &token, world.now).unwrap();
        assert_eq!(world.verified.len(), 1);
        assert_eq!(world.verify(&verifier, &token, world.now).unwrap(), first);
        // For another project, host or issuer it is no better for being known.
        let (issuer, host, project) = (ISSUER, Some(world.host), world.project);
        for (expect, error) in [
            (Expect { issuer: "x", host, project }, TokenError::WrongIssuer),
            (Expect { issuer, host: Some(HostId::random()), project }, TokenError::WrongAudience),
            (Expect { issuer, host, project: ProjectId::random() }, TokenError::WrongProject),
        ] {
            assert_eq!(world.verified.verify(&verifier, &token, &expect, world.now), Err(error));
        }
        // Nor is a text that differs from it in one byte.
        let other = format!("{}{}", &token[..token.len() - 1], if token.ends_with('A') { "B" } else { "A" });
        assert!(world.verify(&verifier, &other, world.now).is_err());
        let end = world.now.plus(Duration::from_secs(65));
        assert_eq!(world.verify(&verifier, &token, end), Err(TokenError::Expired));
        let before = Timestamp::from_secs(world.now.secs() - 6);
        assert_eq!(world.verify(&verifier, &token, before), Err(TokenError::NotYetValid));
    }

    #[test]
    fn other_keys_know_nothing_of_it() {
        let mut world = World::new();
        let old = Arc::new(Verifier::new(&world.ring.public()));
        let token = world.token(60, Usage::Multi);
        world.verify(&old, &token, world.now).unwrap();
        world.ring.rotate(true, world.now).unwrap();
        let rotated = Arc::new(Verifier::new(&world.ring.public()));
        assert!(world.verify(&rotated, &token, world.now).is_ok(), "a rotation drops nobody");
        let kid = rotated.kids().last().unwrap().to_owned();
        assert!(world.ring.withdraw(&kid, world.now).unwrap());
        let without = Arc::new(Verifier::new(&world.ring.public()));
        assert_eq!(world.verify(&without, &token, world.now), Err(TokenError::UnknownHeader));
        assert_eq!(world.verified.len(), 0);
        // Who still has the keys of before does not bring it back.
        world.verify(&old, &token, world.now).unwrap();
        assert_eq!(world.verify(&without, &token, world.now), Err(TokenError::UnknownHeader));
    }

    #[test]
    fn memory_is_bounded_and_what_is_over_goes() {
        let world = World::new();
        let verifier = Arc::new(Verifier::new(&world.ring.public()));
        world.verify(&verifier, &world.token(60, Usage::Once), world.now).unwrap();
        assert_eq!(world.verified.len(), 0, "one-use tokens are not kept");
        let claims = world.verify(&verifier, &world.token(60, Usage::Multi), world.now).unwrap();
        let mut state = world.verified.0.lock().unwrap();
        for n in 0..3 * TOKENS_MAX as u64 {
            let hash = Sha256::digest(n.to_be_bytes()).into();
            let claims = Claims { exp: claims.exp + n % 7, ..claims.clone() };
            state.remember(hash, Arc::new(claims), world.now);
            assert!(state.claims.len() <= TOKENS_MAX && state.order.len() == state.claims.len());
        }
        let later = world.now.plus(Duration::from_secs(3600));
        for n in 0..2 * TOKENS_MAX as u64 {
            let hash = Sha256::digest((n % 2).to_le_bytes()).into();
            let claims = Claims { exp: claims.exp + 3600, ..claims.clone() };
            state.remember(hash, Arc::new(claims), later);
        }
        assert!(state.claims.len() <= 2, "{}", state.claims.len());
    }
}
