//! Which credential a request shows, and where.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_core::{
    auth::{Denial, Secret},
    ids::{HostId, ProjectId},
};
use http::{HeaderMap, header};

use crate::cookies::{self, Found};

/// The query parameter and form field that carries a connect token.
pub(crate) const TOKEN_FIELD: &str = "cocalc_token";

const TOKEN_BYTES_MAX: usize = 4096;

/// What a request shows.
#[derive(Debug)]
pub(crate) enum Shown {
    Nothing,
    /// `Authorization: Bearer`.
    Bearer(Secret),
    /// The query parameter.
    Query(Secret),
    /// Session cookies, which browsers add by themselves.
    Cookies(Found),
}

/// The credential of a request to a host. A bearer token that is not one of
/// ours belongs to the app when a cookie says who asks.
pub(crate) fn find(
    headers: &HeaderMap,
    query: Option<&str>,
    host: HostId,
    own_origin: bool,
    https: bool,
) -> Result<Shown, Denial> {
    let bearer = bearer(headers)?;
    if let Some(token) = bearer
        && is_connect_token(token)
    {
        return Ok(Shown::Bearer(Secret::new(token)));
    }
    if let Some(token) = query_token(query)? {
        return Ok(Shown::Query(Secret::new(token)));
    }
    let found = cookies::find_sessions(headers, host, own_origin, https);
    if !found.is_empty() {
        return Ok(Shown::Cookies(found));
    }
    Ok(bearer.map_or(Shown::Nothing, |token| Shown::Bearer(Secret::new(token))))
}

/// The token of `Authorization: Bearer`, whosever it is.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Denial> {
    let mut fields = headers.get_all(header::AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Ok(None) };
    let bad = |why: &str| Err(Denial::BadCredential(why.to_owned()));
    if fields.next().is_some() {
        return bad("several Authorization fields");
    }
    let Ok(field) = field.to_str() else { return Ok(None) };
    let Some((scheme, token)) = field.split_once(' ') else { return Ok(None) };
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Ok(None);
    }
    Ok(Some(token.trim()))
}

/// The token in the query.
pub(crate) fn query_token(query: Option<&str>) -> Result<Option<&str>, Denial> {
    let mut tokens = query
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.strip_prefix(TOKEN_FIELD)?.strip_prefix('='));
    match (tokens.next(), tokens.next()) {
        (None, _) => Ok(None),
        (Some(token), None) => Ok(Some(token)),
        (Some(_), Some(_)) => Err(Denial::BadCredential("several tokens in the query".to_owned())),
    }
}

/// The query without the token; every other byte stays.
pub(crate) fn clean_query(query: &str) -> String {
    let is_token =
        |pair: &&str| pair.strip_prefix(TOKEN_FIELD).is_some_and(|v| v.is_empty() || v.starts_with('='));
    query.split('&').filter(|pair| !is_token(pair)).collect::<Vec<_>>().join("&")
}

/// Whether a bearer token is, or pretends to be, a connect token; such never
/// reach an app.
pub(crate) fn is_connect_token(token: &str) -> bool {
    if token.len() > TOKEN_BYTES_MAX {
        return false;
    }
    let mut parts = token.split('.');
    let mut says = |what: &[&[u8]]| {
        let text = parts.next().and_then(|part| URL_SAFE_NO_PAD.decode(part).ok()).unwrap_or_default();
        what.iter().all(|what| text.windows(what.len()).any(|window| window == *what))
    };
    // One that is whole says so at once.
    says(&[b"cocalc-connect+jwt"]) || says(&[b"\"prj\"", b"project-host:"])
}

/// The project that a token claims to be for. A hint for routing only: nothing
/// is verified.
pub(crate) fn claimed_project(token: &str) -> Option<ProjectId> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    claims.get("prj")?.as_str()?.parse().ok()
}

/// Reads a field of an `application/x-www-form-urlencoded` text.
pub(crate) fn form_field(form: &str, name: &str) -> Option<String> {
    form.split('&').filter_map(|pair| pair.split_once('=')).find(|(n, _)| *n == name).and_then(
        |(_, value)| {
            let mut bytes = Vec::with_capacity(value.len());
            let mut rest = value.bytes();
            while let Some(b) = rest.next() {
                bytes.push(match b {
                    b'+' => b' ',
                    b'%' => {
                        let digits = [rest.next()?, rest.next()?];
                        u8::from_str_radix(str::from_utf8(&digits).ok().filter(|d| !d.starts_with('+'))?, 16)
                            .ok()?
                    }
                    b => b,
                });
            }
            String::from_utf8(bytes).ok()
        },
    )
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn token() -> String {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        format!(
            "{}.{}.{}",
            part(r#"{"alg":"EdDSA","typ":"cocalc-connect+jwt","kid":"k"}"#),
            part(r#"{"prj":"0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b","aud":"project-host:x"}"#),
            part("signature")
        )
    }

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    #[test]
    fn the_strongest_credential_counts() {
        let host = HostId::random();
        let cookie = format!("cocalc-session-{host}=s");
        let ours = format!("Bearer {}", token());
        let shown = |fields: &[(&'static str, &str)], query| match find(
            &headers(fields),
            query,
            host,
            false,
            false,
        ) {
            Ok(Shown::Nothing) => "nothing",
            Ok(Shown::Bearer(_)) => "bearer",
            Ok(Shown::Query(_)) => "query",
            Ok(Shown::Cookies(_)) => "cookie",
            Err(_) => "refused",
        };
        assert_eq!(shown(&[], None), "nothing");
        assert_eq!(shown(&[("authorization", &ours), ("cookie", &cookie)], Some("cocalc_token=x")), "bearer");
        assert_eq!(shown(&[("authorization", "Bearer of-the-app"), ("cookie", &cookie)], None), "cookie");
        assert_eq!(shown(&[("authorization", "Bearer of-the-app")], None), "bearer");
        assert_eq!(shown(&[("authorization", "Basic eA==")], None), "nothing");
        assert_eq!(shown(&[("cookie", &cookie)], Some("a=b&cocalc_token=x")), "query");
        assert_eq!(shown(&[], Some("cocalc_token=x&cocalc_token=x")), "refused");
        assert_eq!(shown(&[("authorization", &ours), ("authorization", &ours)], None), "refused");
    }

    #[test]
    fn tokens_are_recognised_even_when_damaged() {
        let token = token();
        assert!(is_connect_token(&token));
        let (header, rest) = token.split_once('.').unwrap();
        assert!(is_connect_token(&format!("x{}.{rest}", &header[1..])));
        assert!(is_connect_token(&format!("{header}.x")));
        for other in ["", "a.b.c", "sk-1234", &"x".repeat(9000)] {
            assert!(!is_connect_token(other), "{other}");
        }
        assert_eq!(
            claimed_project(&token).map(|id| id.to_string()).as_deref(),
            Some("0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b")
        );
    }

    #[test]
    fn queries_are_cleaned_and_forms_read() {
        assert_eq!(clean_query("a=%20b&cocalc_token=x&&c"), "a=%20b&&c");
        assert_eq!(clean_query("cocalc_token"), "");
        assert_eq!(clean_query("xcocalc_token=1&cocalc_tokens=2"), "xcocalc_token=1&cocalc_tokens=2");
        assert_eq!(form_field("a=1&next=%2Fx+y%3F", "next").as_deref(), Some("/x y?"));
        for bad in ["next=%", "next=%2", "next=%zz", "next=%+1", "next=%ff", "xnext=1", ""] {
            assert_eq!(form_field(bad, "next"), None, "{bad}");
        }
    }
}
