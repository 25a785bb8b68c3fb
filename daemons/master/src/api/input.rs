//! What requests carry, and how it is refused.

use std::{str::FromStr, time::Duration};

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use bytes::Bytes;
use http::{StatusCode, request::Parts};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::{BODY_BYTES_MAX, problem::Problem};

/// How long a client may take to send a body.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// The whole body, unless it is too large or too slow.
pub(crate) async fn whole(body: axum::body::Body) -> Result<Bytes, Problem> {
    let body = http_body_util::Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(BODY_LIMIT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is too large"))
        }
        Ok(Err(_)) => Err(Problem::invalid("the body ended too early")),
        Err(_) => Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "too_slow", "the body took too long")),
    }
}

/// A JSON body; an empty one is `{}`.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let bytes = whole(request.into_body()).await?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        // Fields by name only: a list would do for serde.
        if !text.trim_ascii_start().starts_with(b"{") {
            return Err(Problem::invalid("expected a JSON object"));
        }
        serde_json::from_slice(text).map(Self).map_err(|error| Problem::invalid(error.to_string()))
    }
}

/// The query.
pub(crate) struct Asked<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(query)) => Ok(Self(query)),
            Err(error) => Err(Problem::invalid(error.body_text())),
        }
    }
}

/// The id in the path. What is no id names nothing.
pub(crate) struct Id<T>(pub(crate) T);

impl<T: FromStr, S: Send + Sync> FromRequestParts<S> for Id<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.ok().and_then(|Path(id)| id.parse().ok()).map(Self).ok_or_else(|| Problem::not_found("thing"))
    }
}

/// Two of them.
pub(crate) struct Ids<T, U>(pub(crate) T, pub(crate) U);

impl<T: FromStr, U: FromStr, S: Send + Sync> FromRequestParts<S> for Ids<T, U> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<(String, String)>::from_request_parts(parts, state).await;
        path.ok()
            .and_then(|Path((first, second))| Some(Self(first.parse().ok()?, second.parse().ok()?)))
            .ok_or_else(|| Problem::not_found("thing"))
    }
}

/// Whether a character changes how the text around it is shown, or is not seen
/// at all, so that two names that look alike would differ: marks of direction,
/// fillers, tags, line and paragraph separators. Joiners and variation
/// selectors stay, which some scripts and emoji need.
fn is_disguise(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180e}'
        | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{2800}'
        | '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{e0000}'..='\u{e00ff}')
}

/// Whether a text has characters that act on what is around them rather than
/// being read.
pub(crate) fn acts(text: &str) -> bool {
    text.chars().any(|c| c.is_control() || is_disguise(c))
}

/// Text in Unicode's composed form (NFC): what looks the same and was typed on
/// different machines is the same.
pub(crate) fn composed(text: &str) -> String {
    icu_normalizer::ComposingNormalizerBorrowed::new_nfc().normalize(text).into_owned()
}

/// A name that people give, for people: no control characters or marks of
/// direction, no limits on script, in composed form.
pub(crate) fn clean_name(name: &str) -> Result<String, Problem> {
    // What cannot become short enough is not worth the work.
    let name = if name.len() > 16 * NAME_CHARS_MAX { String::new() } else { composed(name) };
    let length = name.chars().count();
    if (1..=NAME_CHARS_MAX).contains(&length) && name.trim() == name && !acts(&name) {
        Ok(name)
    } else {
        Err(Problem::invalid("name: 1 to 100 characters, none of control, no space around it"))
    }
}

/// Somebody else's name for a person, made harmless to show.
pub(crate) fn harmless_name(name: &str) -> String {
    let shown = name.chars().filter(|c| !c.is_control() && !is_disguise(*c)).take(NAME_CHARS_MAX);
    composed(shown.collect::<String>().trim())
}

/// In composed form.
pub(crate) const NAME_CHARS_MAX: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_they_look_like() {
        for good in [
            "a",
            "Grüße an alle",
            "مشروع",
            "می‌خواهم",
            "日本語",
            "👩‍🔬",
            "❤️",
            "e\u{328}\u{301}x",
            &"é".repeat(100),
        ] {
            assert_eq!(clean_name(good).ok().as_deref(), Some(&*composed(good)), "{good}");
        }
        for bad in [
            "",
            " a",
            "a\u{3000}",
            "a\n",
            "a\0",
            "a\u{9b}2J",
            "a\u{202e}gpj",
            "a\u{2066}b",
            "\u{200f}a",
            "a\u{200b}b",
            "a\u{ad}b",
            "\u{3164}",
            "a\u{e0041}",
            "a\u{7f}",
            "a\u{feff}",
            &"x".repeat(101),
            &"é".repeat(101),
            &"x".repeat(1 << 20),
        ] {
            assert!(clean_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mixed_normal_forms_are_one_name() {
        let (composed, decomposed) = ("Jos\u{e9}", "Jose\u{301}");
        assert_eq!(clean_name(decomposed).ok().as_deref(), Some(composed));
        // A hundred characters, however they were typed.
        assert!(clean_name(&"e\u{301}".repeat(100)).is_ok());
        assert!(clean_name(&"e\u{301}".repeat(101)).is_err());
    }
}
