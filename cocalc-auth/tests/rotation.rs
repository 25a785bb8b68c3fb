//! Whatever an administrator does to the ring of keys, in whatever order, with
//! streams that lag: no token fails whose key was not withdrawn, and none passes
//! whose key was, once a host has heard of it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use cocalc_auth::{
    mint::{NewToken, RotateError, SigningRing},
    stream::PublicRing,
    token::{Algorithm, Claims, Expect, RING_KEYS_MAX, TokenError, Verifier},
};
use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};
use proptest::prelude::*;

const ISSUER: &str = "https://master.example";
/// No stream lags by more: who is cut off for longer than lease and grace lets
/// nobody in anyhow.
const LAG_MAX: Duration = Duration::from_secs(20 * 60);

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Rotate {
        force: bool,
    },
    /// What the master does by itself, every now and then.
    Tend,
    Withdraw(prop::sample::Index),
    Mint {
        ttl: u64,
    },
    /// A stream brings so many rings.
    Deliver {
        host: usize,
        rings: usize,
    },
    /// The master starts anew, from its file.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u64..400).prop_map(Step::Wait),
        1 => (3_600_u64..40 * 24 * 3600).prop_map(Step::Wait),
        3 => any::<bool>().prop_map(|force| Step::Rotate { force }),
        2 => Just(Step::Tend),
        2 => any::<prop::sample::Index>().prop_map(Step::Withdraw),
        6 => (1_u64..=300).prop_map(|ttl| Step::Mint { ttl }),
        4 => (0_usize..2, 1_usize..4).prop_map(|(host, rings)| Step::Deliver { host, rings }),
        1 => Just(Step::Restart),
    ]
}

struct Token {
    text: String,
    claims: Claims,
    kid: String,
    minted: Timestamp,
}

/// A host or proxy, and what is on its way to it.
struct Host {
    verifier: Verifier,
    coming: VecDeque<(Timestamp, PublicRing)>,
}

struct World {
    ring: SigningRing,
    now: Timestamp,
    hosts: [Host; 2],
    tokens: VecDeque<Token>,
    /// When each key was published first, and in which version.
    published: BTreeMap<String, (Timestamp, u64)>,
    /// In which version each withdrawn key was gone.
    withdrawn: BTreeMap<String, u64>,
    host: HostId,
    project: ProjectId,
}

impl World {
    fn new() -> Self {
        let now = Timestamp::from_secs(1_000_000_000);
        let ring = SigningRing::generate(Algorithm::EdDsa, now).unwrap();
        let public = ring.public();
        let host = || Host { verifier: Verifier::new(&public), coming: VecDeque::new() };
        let mut world = Self {
            hosts: [host(), host()],
            ring,
            now,
            tokens: VecDeque::new(),
            published: BTreeMap::new(),
            withdrawn: BTreeMap::new(),
            host: HostId::random(),
            project: ProjectId::random(),
        };
        world.note(&public);
        world
    }

    fn note(&mut self, public: &PublicRing) {
        for key in &public.keys {
            self.published.entry(key.kid.clone()).or_insert((self.now, public.version));
        }
    }

    /// The ring may have changed: everybody is sent it.
    fn publish(&mut self, before: u64) {
        let public = self.ring.public();
        assert_eq!(public.version > before, self.ring.version() > before);
        if public.version > before {
            self.note(&public);
            for host in &mut self.hosts {
                host.coming.push_back((self.now, public.clone()));
            }
        }
    }

    fn take(&mut self, step: &Step) {
        let before = self.ring.version();
        match step {
            Step::Wait(secs) => self.now = self.now.plus(Duration::from_secs(*secs)),
            Step::Rotate { force } => match self.ring.rotate(*force, self.now) {
                Ok(()) => assert!(self.ring.version() > before),
                Err(RotateError::TooEarly { wait }) => {
                    assert!(!force && wait <= Duration::from_secs(24 * 3600));
                    assert_eq!(self.ring.version(), before, "a refusal changes nothing");
                }
                // Tokens of as many old keys as are kept are still good.
                Err(RotateError::TooOften { wait }) => {
                    assert!(wait <= Duration::from_secs(305), "{wait:?}");
                    assert_eq!(self.ring.version(), before, "a refusal changes nothing");
                }
                Err(other) => panic!("{other}"),
            },
            Step::Tend => {
                if self.ring.rotation_due(self.now) {
                    self.ring.rotate(false, self.now).unwrap();
                }
                self.ring.expire(self.now);
            }
            Step::Withdraw(which) => {
                let keys = self.ring.list();
                let kid = which.get(&keys).kid.clone();
                assert!(self.ring.withdraw(&kid, self.now).unwrap());
                self.withdrawn.insert(kid, self.ring.version());
            }
            Step::Mint { ttl } => {
                let new = NewToken::new(ISSUER, self.host, AccountId::random(), self.project, Epoch::FIRST)
                    .scopes([Scope::Http])
                    .ttl(Duration::from_secs(*ttl));
                let minted = self.ring.mint(&new, self.now).unwrap();
                let kid = self.ring.current_kid().to_owned();
                assert!(!self.withdrawn.contains_key(&kid), "a withdrawn key signs");
                self.tokens.push_back(Token {
                    text: minted.token,
                    claims: minted.claims,
                    kid,
                    minted: self.now,
                });
                if self.tokens.len() > 8 {
                    self.tokens.pop_front();
                }
            }
            Step::Deliver { host, rings } => {
                let host = &mut self.hosts[*host];
                for _ in 0..*rings {
                    if let Some((_, ring)) = host.coming.pop_front() {
                        host.verifier = Verifier::new(&ring);
                    }
                }
            }
            Step::Restart => self.ring = SigningRing::from_bytes(&self.ring.to_bytes()).unwrap(),
        }
        self.publish(before);
        let now = self.now;
        for host in &mut self.hosts {
            while host.coming.front().is_some_and(|(sent, _)| now.since(*sent) > LAG_MAX) {
                let (_, ring) = host.coming.pop_front().unwrap();
                host.verifier = Verifier::new(&ring);
            }
        }
    }

    fn check(&self) {
        let public = self.ring.public();
        assert!(public.keys.len() <= 10 && public.keys.len() <= RING_KEYS_MAX, "{} keys", public.keys.len());
        assert!(public.withdrawn.len() <= 64);
        assert!(
            public.keys.iter().all(|key| !self.withdrawn.contains_key(&key.kid)),
            "a withdrawn key is back"
        );
        let expect = Expect { issuer: ISSUER, host: Some(self.host), project: self.project };
        for host in &self.hosts {
            assert!(host.verifier.refused().is_empty());
            for token in &self.tokens {
                let outcome = host.verifier.verify(&token.text, &expect, self.now);
                match self.withdrawn.get(&token.kid) {
                    Some(version) if host.verifier.version() >= *version => {
                        assert_eq!(outcome, Err(TokenError::UnknownHeader), "of a key that was withdrawn");
                    }
                    // Withdrawn, and this host has not heard of it.
                    Some(_) => {}
                    None => self.check_good(host, token, outcome),
                }
            }
        }
    }

    fn check_good(&self, host: &Host, token: &Token, outcome: Result<Claims, TokenError>) {
        let over = self.now >= token.claims.expires().plus(Duration::from_secs(5));
        let (published, version) = self.published[&token.kid];
        // It was published for as long as any stream lags before it signed, which
        // only a withdrawal or force shortens; or this host has heard of it.
        let known = token.minted.since(published) > LAG_MAX || host.verifier.version() >= version;
        match outcome {
            Ok(claims) => assert!(!over && claims == token.claims),
            // A key may be gone when its tokens are over.
            Err(TokenError::Expired | TokenError::UnknownHeader) if over => {}
            Err(error) => assert!(!known, "{error}: a token of a key that was not withdrawn"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_good_token_fails_and_no_withdrawn_key_passes(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
            world.check();
        }
        // Once every stream has caught up, everybody agrees.
        for host in 0..2 {
            world.take(&Step::Deliver { host, rings: 1000 });
        }
        world.check();
        for token in &world.tokens {
            let fine = !world.withdrawn.contains_key(&token.kid) && world.now < token.claims.expires();
            let expect = Expect { issuer: ISSUER, host: Some(world.host), project: world.project };
            for host in &world.hosts {
                let outcome = host.verifier.verify(&token.text, &expect, world.now);
                prop_assert!(!fine || outcome.is_ok(), "{:?}", outcome);
            }
        }
    }
}

#[test]
fn rotating_faster_than_tokens_expire_is_refused_before_one_fails() {
    let mut world = World::new();
    world.take(&Step::Mint { ttl: 300 });
    for _ in 0..20 {
        world.take(&Step::Rotate { force: true });
        for host in 0..2 {
            world.take(&Step::Deliver { host, rings: 10 });
        }
        world.check();
    }
    assert_eq!(world.ring.list().len(), 10);
    assert!(matches!(world.ring.rotate(true, world.now), Err(RotateError::TooOften { .. })));
    world.take(&Step::Wait(305));
    world.ring.rotate(true, world.now).unwrap();
    assert_eq!(world.ring.list().len(), 3, "what is over makes room");
}
