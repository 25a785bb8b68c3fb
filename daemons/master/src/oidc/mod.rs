//! Logging in with OpenID providers: which there are, and who is under way.
//!
//! A log-in begins in a browser, which is remembered by a cookie, goes to the
//! provider, and comes back with a state that is good once. A program that logs
//! in gets a code at its own loopback address (RFC 8252), which is good once,
//! only with the secret whose hash it named at the beginning; and only when the
//! person has agreed in the browser: a page could have sent them here, and that
//! port could be a tunnel to somebody else.

mod config;
mod once;

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth_oidc::{Pending, Person, Provider};
use cocalc_sqlite::master::Account;

pub use self::config::OidcConfig;
pub(crate) use self::config::validate;
use self::once::Once;
use crate::secret;

/// How long somebody may take at their provider.
pub(crate) const LOGIN_LIFE: Duration = Duration::from_secs(600);
/// How many are there at the same time; each takes about a kilobyte.
const LOGINS_MAX: usize = 10_000;
/// How long a program may take to fetch its token.
const HANDOFF_LIFE: Duration = Duration::from_secs(120);
const HANDOFFS_MAX: usize = 10_000;

/// A provider, and whom of its people we let in.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    /// What people call it.
    pub(crate) shown: String,
    /// Whether whoever comes first gets an account.
    pub(crate) create_accounts: bool,
    pub(crate) provider: Provider,
    domains: Vec<String>,
}

/// A log-in that is under way.
#[derive(Debug)]
pub(crate) struct Login {
    pub(crate) known: Arc<Known>,
    pub(crate) pending: Pending,
    /// The hash of the cookie of the browser in which it began.
    pub(crate) browser: [u8; 32],
    pub(crate) target: Target,
}

/// Where it leads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    /// Within the browser: to a path of this master, or no further.
    Page { next: Option<String> },
    /// To a program on the same machine as the browser.
    Program(Program),
}

/// A program that waits for a code.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Program {
    /// Its port on 127.0.0.1.
    pub(crate) port: u16,
    /// What it wants to see again.
    pub(crate) state: String,
    /// The hash of a secret that it has.
    pub(crate) challenge: [u8; 32],
    /// Whether the identity is to be linked to an account rather than used.
    pub(crate) link: bool,
}

/// What waits for a person's word before a program gets it.
#[derive(Debug)]
pub(crate) struct Consent {
    /// The hash of the cookie of the browser that is asked.
    pub(crate) browser: [u8; 32],
    pub(crate) program: Program,
    pub(crate) handoff: Handoff,
}

/// What a program gets for its code.
#[derive(Debug)]
pub(crate) enum Handoff {
    /// It logs in.
    LogIn(Account),
    /// Somebody has shown who they are.
    Link { provider: String, subject: String },
}

/// All that is known of OpenID.
pub(crate) struct Oidc {
    known: Vec<Arc<Known>>,
    logins: Mutex<Once<Login>>,
    consents: Mutex<Once<Consent>>,
    handoffs: Mutex<Once<([u8; 32], Handoff)>>,
}

impl fmt::Debug for Oidc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Oidc").field("known", &self.known).finish_non_exhaustive()
    }
}

impl Oidc {
    /// Takes what was configured, for a master at `url`. Asks nobody.
    pub(crate) fn new(configured: &[OidcConfig], url: &str) -> Result<Self, String> {
        validate(configured)?;
        let make = |config: &OidcConfig| {
            let provider = Provider::new(config.settings(url)?)
                .map_err(|error| format!("oidc {}: {error}", config.name))?;
            Ok(Arc::new(Known {
                name: config.name.clone(),
                shown: config.shown().to_owned(),
                create_accounts: config.create_accounts,
                provider,
                domains: config.allowed_email_domains.clone(),
            }))
        };
        Ok(Self {
            known: configured.iter().map(make).collect::<Result<_, String>>()?,
            logins: Mutex::new(Once::new(LOGINS_MAX, LOGIN_LIFE)),
            consents: Mutex::new(Once::new(HANDOFFS_MAX, LOGIN_LIFE)),
            handoffs: Mutex::new(Once::new(HANDOFFS_MAX, HANDOFF_LIFE)),
        })
    }

    pub(crate) fn all(&self) -> &[Arc<Known>] {
        &self.known
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&Arc<Known>> {
        self.known.iter().find(|known| known.name == name)
    }

    pub(crate) fn by_issuer(&self, issuer: &str) -> Option<&Arc<Known>> {
        self.known.iter().find(|known| known.provider.issuer() == issuer)
    }

    /// Remembers a log-in by its state.
    pub(crate) fn begin(&self, state: &str, login: Login, now: Duration) {
        self.logins.lock().unwrap_or_else(PoisonError::into_inner).put(state, login, now);
    }

    /// The log-in with this state; it is forgotten.
    pub(crate) fn resume(&self, state: &str, now: Duration) -> Option<Login> {
        self.logins.lock().unwrap_or_else(PoisonError::into_inner).take(state, now)
    }

    /// Keeps what a person is asked about; the word with which they agree.
    pub(crate) fn ask(&self, consent: Consent, now: Duration) -> Result<String, getrandom::Error> {
        let word = secret::generate("")?;
        self.consents.lock().unwrap_or_else(PoisonError::into_inner).put(&word, consent, now);
        Ok(word)
    }

    /// What was asked about with this word; it is forgotten.
    pub(crate) fn agreed(&self, word: &str, now: Duration) -> Option<Consent> {
        self.consents.lock().unwrap_or_else(PoisonError::into_inner).take(word, now)
    }

    /// A code for a program that has the secret of `challenge`.
    pub(crate) fn hand_off(
        &self,
        challenge: [u8; 32],
        handoff: Handoff,
        now: Duration,
    ) -> Result<String, getrandom::Error> {
        let code = secret::generate("")?;
        self.handoffs.lock().unwrap_or_else(PoisonError::into_inner).put(&code, (challenge, handoff), now);
        Ok(code)
    }

    /// What the program with `code` and `verifier` gets. The code is spent, even
    /// with a wrong verifier.
    pub(crate) fn redeem(&self, code: &str, verifier: &str, now: Duration) -> Option<Handoff> {
        let found = self.handoffs.lock().unwrap_or_else(PoisonError::into_inner).take(code, now);
        found.filter(|(challenge, _)| secret::hash(verifier) == *challenge).map(|(_, handoff)| handoff)
    }
}

impl Known {
    /// Whether somebody with this address is let in.
    pub(crate) fn admits(&self, person: &Person) -> bool {
        self.domains.is_empty()
            || person.email.as_deref().is_some_and(|email| in_domains(email, &self.domains))
    }
}

/// Whether an address is in one of the domains; not in one below them.
fn in_domains(email: &str, domains: &[String]) -> bool {
    let domain = email.rsplit_once('@').map(|(_, domain)| domain);
    domain.is_some_and(|domain| domains.iter().any(|allowed| allowed.eq_ignore_ascii_case(domain)))
}

/// Whether a path leads nowhere but to this master: browsers take `//x` and
/// `/\x` for hosts, and pass over tabs and ends of lines.
pub(crate) fn is_local_path(path: &str) -> bool {
    let bytes = path.as_bytes();
    path.len() <= 1024
        && bytes.first() == Some(&b'/')
        && !matches!(bytes.get(1), Some(b'/' | b'\\'))
        && bytes.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'\\')
}

/// A program's challenge, the SHA-256 of its secret in base64url.
pub(crate) fn parse_challenge(text: &str) -> Option<[u8; 32]> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()
}

/// What program and browser both show, so that a person can see that it is the
/// same log-in: eight letters and digits that nobody takes for one another.
pub(crate) fn shown_code(challenge: &[u8; 32]) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHJKLMNPQRSTUVWXYZ23456789";
    let letter = |byte: &u8| LETTERS.get(usize::from(byte & 31)).copied().map_or('?', char::from);
    let (first, second) = (challenge.iter().take(4), challenge.iter().skip(4).take(4));
    first.map(letter).chain(['-']).chain(second.map(letter)).collect()
}

/// Whether this is what [`secret::generate`] makes.
pub(crate) fn is_secret(text: &str) -> bool {
    parse_challenge(text).is_some()
}

/// A name for an account, from what a provider calls a person.
pub(crate) fn account_name(person: &Person, clean: impl Fn(&str) -> Option<String>) -> String {
    let candidates = [&person.name, &person.email];
    let short = |text: &String| text.trim().chars().take(100).collect::<String>().trim().to_owned();
    candidates
        .into_iter()
        .flatten()
        .map(short)
        .find_map(|name| clean(&name))
        .unwrap_or_else(|| "somebody".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_paths_are_next() {
        for good in ["/", "/projects/1?x=y#z", "/a//b", "/%2F%2Fevil.example"] {
            assert!(is_local_path(good), "{good}");
        }
        let long = format!("/{}", "a".repeat(1024));
        for bad in [
            "",
            "//evil.example",
            "/\\evil.example",
            "\\\\evil.example",
            "https://evil.example",
            "evil.example",
            "/\t/evil.example",
            "/\n/evil.example",
            " /x",
            "/a\\b",
            "javascript:alert(1)",
            "/ü",
            &long,
        ] {
            assert!(!is_local_path(bad), "{bad:?}");
        }
    }

    #[test]
    fn domains_are_whole() {
        let domains = ["example.org".to_owned()];
        assert!(in_domains("ada@EXAMPLE.org", &domains));
        for bad in
            ["ada@sub.example.org", "ada@notexample.org", "example.org", "ada@example.org@evil.example", ""]
        {
            assert!(!in_domains(bad, &domains), "{bad}");
        }
    }

    #[test]
    fn a_code_is_good_once_and_only_with_its_verifier() {
        let oidc = Oidc::new(&[], "https://master.example").unwrap();
        let now = Duration::ZERO;
        let give = || {
            let handoff = Handoff::Link { provider: "p".into(), subject: "s".into() };
            oidc.hand_off(secret::hash("verifier"), handoff, now).unwrap()
        };
        let code = give();
        assert!(matches!(oidc.redeem(&code, "verifier", now), Some(Handoff::Link { .. })));
        assert!(oidc.redeem(&code, "verifier", now).is_none(), "once");
        let code = give();
        assert!(oidc.redeem(&code, "guess", now).is_none());
        assert!(oidc.redeem(&code, "verifier", now).is_none(), "a wrong guess spends it");
        let code = give();
        assert!(oidc.redeem(&code, "verifier", HANDOFF_LIFE).is_none(), "too late");
    }

    #[test]
    fn names_of_accounts_are_tame() {
        let person = |name: &str, email: &str| Person {
            subject: "1".into(),
            name: Some(name.into()),
            email: Some(email.into()),
        };
        let clean = |name: &str| (!name.is_empty() && !name.contains('\n')).then(|| name.to_owned());
        let named = |person| account_name(&person, clean);
        assert_eq!(named(person(" Ada ", "")), "Ada");
        assert_eq!(named(person("a\nb", "ada@x.org")), "ada@x.org");
        assert_eq!(named(person("", "")), "somebody");
        assert_eq!(named(person(&"x".repeat(500), "")).len(), 100);
    }
}
