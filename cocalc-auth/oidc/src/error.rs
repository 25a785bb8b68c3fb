//! Why somebody could not be identified.

/// Why somebody could not be identified. What a provider said is in it only
/// with its control characters replaced, cut to a few hundred characters, and
/// without tokens.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The provider does not answer, or not as an OpenID provider does.
    #[error("the provider cannot be used now: {detail}")]
    Unavailable {
        /// What went wrong.
        detail: String,
    },
    /// Too many people log in with this provider at the same time.
    #[error("too many people log in with this provider at this moment")]
    Busy,
    /// The provider refused the code, or the client.
    #[error("the provider refused it: {code}")]
    Refused {
        /// The provider's word, for instance `invalid_grant`.
        code: String,
    },
    /// What the provider answered proves nobody.
    #[error("the provider's answer is not to be trusted: {detail}")]
    Untrusted {
        /// What is wrong with it.
        detail: String,
    },
}

impl Error {
    pub(crate) fn unavailable(detail: &str) -> Self {
        Self::Unavailable { detail: tame(detail) }
    }

    pub(crate) fn untrusted(detail: &str) -> Self {
        Self::Untrusted { detail: tame(detail) }
    }
}

/// How much of what a provider says is repeated.
const SAID_CHARS_MAX: usize = 300;

/// A provider's text, fit for a log.
pub(crate) fn tame(text: &str) -> String {
    let char = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(SAID_CHARS_MAX).map(char).collect()
}

/// The error and its reasons, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let reasons = std::iter::successors(Some(error), |error| error.source());
    reasons.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
