//! What fuzz targets reach of the private parsers; nothing for other users.

use cocalc_core::{auth::Secret, ids::HostId};
use http::{HeaderMap, HeaderValue, header};

use crate::{
    cookies,
    credential::{self, Shown},
};

/// Reads a request's cookies, `Authorization` and query as a host does, passes
/// what an app would get, and panics if a credential of ours is in it.
pub fn request(cookie: &[u8], authorization: &[u8], query: &str, own_origin: bool, https: bool) {
    let host = HostId::from_bytes([1; 16]);
    let mut headers = HeaderMap::new();
    for field in cookie.split(|b| *b == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(field) {
            headers.append(header::COOKIE, value);
        }
    }
    for field in authorization.split(|b| *b == b'\n') {
        if let Ok(value) = HeaderValue::from_bytes(field) {
            headers.append(header::AUTHORIZATION, value);
        }
    }
    // With HTTPS on an own origin, only the prefixed name counts.
    if let Ok(Shown::Cookies(found)) = credential::find(&headers, Some(query), host, own_origin, https)
        && own_origin
        && https
    {
        for value in found.spellings.iter().flatten() {
            let wanted = format!("__Host-cocalc-session-{host}={}", value.expose());
            let mut fields = headers.get_all(header::COOKIE).iter();
            let shown = |field: &HeaderValue| {
                let pairs = field.as_bytes().split(|b| *b == b';');
                pairs.map(<[u8]>::trim_ascii).any(|pair| pair == wanted.as_bytes())
            };
            assert!(fields.any(shown), "{wanted}");
        }
    }
    let cleaned = credential::clean_query(query);
    assert!(matches!(credential::query_token(Some(&cleaned)), Ok(None)), "{cleaned:?}");

    let had = cookies::has_session(&headers);
    cookies::strip(&mut headers);
    assert!(!cookies::has_session(&headers), "an app would see a session");
    assert!(headers.get_all(header::COOKIE).iter().count() <= 1);
    assert!(cookies::find_sessions(&headers, host, own_origin, https).is_empty(), "had one: {had}");
}

/// Sets a session cookie whose value is `value`, which sessions have as
/// base64url, and reads it back as a browser would send it.
pub fn session(value: &str, mount: bool, https: bool) {
    if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) {
        return;
    }
    let host = HostId::from_bytes([1; 16]);
    let mount = if mount { "/base" } else { "" };
    let set = cookies::set_session(host, &Secret::new(value), cookies::Scope { mount, https });
    let pairs: Vec<_> = set.iter().filter_map(|field| field.split(';').next()).collect();
    let Ok(field) = HeaderValue::from_str(&pairs.join("; ")) else { return };
    let headers = HeaderMap::from_iter([(header::COOKIE, field)]);
    let found = cookies::find_sessions(&headers, host, mount.is_empty(), https);
    let first = found.spellings.iter().flatten().next();
    assert_eq!(first.map(Secret::expose), Some(value), "not read back");
}

/// Confines an app's `Set-Cookie`, and panics if it could reach another origin,
/// another project, or a name of ours.
pub fn set_cookie(field: &[u8], proxied: bool) {
    let (mount, taken) = ("/id", if proxied { "/id/proxy/80" } else { "" });
    let Ok(field) = HeaderValue::from_bytes(field) else { return };
    let Some(confined) = cookies::confine(&field, mount, taken) else { return };
    // Browsers read it as RFC 6265, section 5.2: names are trimmed, and
    // attribute names have no case.
    let text = String::from_utf8_lossy(confined.as_bytes()).into_owned();
    let mut attributes = text.split(';');
    let name = attributes.next().unwrap_or_default().split('=').next().unwrap_or_default();
    assert!(!name.to_ascii_lowercase().contains("cocalc-session-"), "{text:?}");
    for attribute in attributes {
        let (name, value) = attribute.split_once('=').unwrap_or((attribute, ""));
        let name = name.trim().to_ascii_lowercase();
        assert_ne!(name, "domain", "{text:?}");
        if name == "path" {
            let value = value.trim();
            assert!(value == mount || value.starts_with("/id/"), "{text:?}");
        }
    }
    let again = cookies::confine(&confined, mount, taken);
    assert!(again.is_some(), "what was let through once is let through again: {text:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        /// The fuzz target's checks, on what is more likely to be near a
        /// credential than bytes at random.
        #[test]
        fn no_credential_reaches_an_app(
            cookie in "((__Host-|__HOST-)?(cocalc-session-|COCALC-Session-)?(http-)?[a-z0-9 =;,\"\t\n-]{0,40}){0,4}",
            authorization in "(Bearer |bearer\t)?[a-zA-Z0-9._ \n-]{0,60}",
            query in "(cocalc_token|cocalc_token=|&|a=b|%63ocalc_token=|[a-z=&%0-9]{0,8}){0,6}",
            own_origin: bool,
            https: bool,
        ) {
            super::request(cookie.as_bytes(), authorization.as_bytes(), &query, own_origin, https);
        }

        #[test]
        fn cookies_of_apps_stay_in_their_project(
            field in "[ \t]{0,2}(__Host-cocalc-session-|[a-z]{1,4})?=?[a-z ]{0,6}(; ?(Path|path|PATH|Domain|DoMaIn| Path )[= ]{0,2}(/|/id|/id/|/idx|/x|//evil|\\.example|[a-z./]{0,8})){0,4}",
            proxied: bool,
        ) {
            super::set_cookie(field.as_bytes(), proxied);
        }

        #[test]
        fn sessions_are_read_back(value in "[A-Za-z0-9_-]{0,43}", mount: bool, https: bool) {
            super::session(&value, mount, https);
        }
    }
}
