//! The session cookie: its names, how it is set, read and kept from apps.
//!
//! Cookies ignore ports, so the name carries the host's id. Each session has
//! two spellings. The *secure* one is what browsers keep, also in frames:
//! `Secure; SameSite=None; Partitioned`; on a project's own origin with the
//! `__Host-` prefix, which no other origin can set. The *plain* one exists on
//! unencrypted HTTP only, where nothing can be kept from the network anyhow:
//! curl and other programs that don't know that loopback is trustworthy would
//! not send the secure one. It is `SameSite=Lax`.

use cocalc_core::{auth::Secret, ids::HostId};
use http::{HeaderMap, HeaderValue, header};

const MARK: &str = "cocalc-session-";
const SESSION_SECS: u64 = 30 * 24 * 3600;

/// Where a cookie is to be sent, and over what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope<'a> {
    /// The external path of the project: empty on its own origin.
    pub(crate) mount: &'a str,
    /// Whether the user came over HTTPS.
    pub(crate) https: bool,
}

/// The fields that set a session cookie.
pub(crate) fn set_session(host: HostId, value: &Secret, scope: Scope<'_>) -> Vec<String> {
    let value = value.expose();
    let prefix = if scope.mount.is_empty() { "__Host-" } else { "" };
    let path = format!("{}/", scope.mount);
    let common = format!("Path={path}; Max-Age={SESSION_SECS}; HttpOnly");
    let mut cookies =
        vec![format!("{prefix}{MARK}{host}={value}; {common}; Secure; SameSite=None; Partitioned")];
    if !scope.https {
        cookies.push(format!("{MARK}http-{host}={value}; {common}; SameSite=Lax"));
    }
    cookies
}

/// The fields that have a browser forget its session.
pub(crate) fn forget_session(host: HostId, scope: Scope<'_>) -> Vec<String> {
    let prefix = if scope.mount.is_empty() { "__Host-" } else { "" };
    let common = format!("Path={}/; Max-Age=0; HttpOnly", scope.mount);
    let mut cookies = vec![format!("{prefix}{MARK}{host}=; {common}; Secure; SameSite=None; Partitioned")];
    if !scope.https {
        cookies.push(format!("{MARK}http-{host}=; {common}; SameSite=Lax"));
    }
    cookies
}

/// How many different values of one name are looked up; more are somebody's
/// doing, and each costs a query.
const VALUES_MAX: usize = 16;

/// The session cookies of this host among a request's cookies.
///
/// Browsers send every cookie of a name whose path matches, and in path routing
/// an app of another project can set one of ours for a path above or below. So
/// all of them are candidates: which is a session of the project is for whoever
/// decides to say, and what somebody planted does not lock out who has one.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Different values by spelling, the more trustworthy spelling first.
    pub(crate) spellings: [Vec<Secret>; 2],
    /// There are more values than are looked up.
    pub(crate) crowded: bool,
}

impl Found {
    pub(crate) fn is_empty(&self) -> bool {
        self.spellings.iter().all(Vec::is_empty)
    }
}

/// `own_origin` and `https` say where and how the user has come.
pub(crate) fn find_sessions(headers: &HeaderMap, host: HostId, own_origin: bool, https: bool) -> Found {
    // On an own origin, only the prefix proves that no sibling set the cookie.
    let secure = if own_origin { format!("__Host-{MARK}{host}") } else { format!("{MARK}{host}") };
    // It was not set over HTTPS: there, it is another origin's plant.
    let plain = (!https).then(|| format!("{MARK}http-{host}"));
    let mut found = Found::default();
    for (wanted, values) in [Some(secure), plain].into_iter().zip(&mut found.spellings) {
        let Some(wanted) = wanted else { continue };
        for (name, value) in pairs(headers) {
            // A session's value is ASCII; what is not was never one.
            let Ok(value) = str::from_utf8(value) else { continue };
            if name != wanted.as_bytes() || values.iter().any(|known| known.expose() == value) {
                continue;
            }
            if values.len() == VALUES_MAX {
                found.crowded = true;
                break;
            }
            values.push(Secret::new(value));
        }
    }
    found
}

/// Whether any cookie looks like a session of ours.
pub(crate) fn has_session(headers: &HeaderMap) -> bool {
    pairs(headers).any(|(name, _)| is_ours(name))
}

/// Removes every session cookie of ours, of whatever host, from a request. All
/// others stay as they are, also those that are no text.
pub(crate) fn strip(headers: &mut HeaderMap) {
    if !headers.contains_key(header::COOKIE) {
        return;
    }
    let kept: Vec<&[u8]> =
        fields(headers).filter(|pair| !pair.is_empty() && !is_ours(split(pair).0)).collect();
    let kept = kept.join(&b"; "[..]);
    headers.remove(header::COOKIE);
    if !kept.is_empty()
        && let Ok(value) = HeaderValue::from_bytes(&kept)
    {
        headers.insert(header::COOKIE, value);
    }
}

/// What an app's `Set-Cookie` may become: no other domain, no name of ours, and
/// in path routing no path outside the app. `taken` is the prefix that the app
/// does not see.
pub(crate) fn confine(field: &HeaderValue, mount: &str, taken: &str) -> Option<HeaderValue> {
    let field = str::from_utf8(field.as_bytes()).ok()?;
    let mut attributes = field.split(';');
    let pair = attributes.next()?;
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    // A cookie without a name is sent as its value alone, which another parser takes
    // for a name and a value (RFC 6265bis, 5.6; CVE-2022-2860).
    if is_ours(name.as_bytes()) || name.trim().is_empty() && is_ours(value.as_bytes()) {
        return None;
    }
    let mut confined = pair.trim().to_owned();
    let mut path = None;
    for attribute in attributes {
        let attribute = attribute.trim();
        let (name, value) = attribute.split_once('=').unwrap_or((attribute, ""));
        let name = name.trim();
        if name.eq_ignore_ascii_case("domain") || attribute.is_empty() {
            continue;
        }
        if name.eq_ignore_ascii_case("path") {
            path = Some(value.trim());
            continue;
        }
        confined.push_str("; ");
        confined.push_str(attribute);
    }
    let inside =
        |path: &str| path.strip_prefix(mount).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let path = match path.filter(|path| path.starts_with('/')) {
        // Without a path, browsers take the directory of the request.
        None => None,
        Some(path) if !taken.is_empty() && !inside(path) => Some(format!("{taken}{path}")),
        Some(path) if inside(path) => Some(path.to_owned()),
        Some(_) => Some(format!("{mount}/")),
    };
    if let Some(path) = path {
        confined.push_str("; Path=");
        confined.push_str(&path);
    }
    HeaderValue::from_bytes(confined.as_bytes()).ok()
}

/// What stands between semicolons. On bytes, for an app may set a cookie that
/// is no ASCII, and must not hide the session beside it.
fn fields(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
        .map(<[u8]>::trim_ascii)
}

/// Name and value; without `=` all of it is the name.
fn split(pair: &[u8]) -> (&[u8], &[u8]) {
    match pair.iter().position(|byte| *byte == b'=') {
        Some(at) => (&pair[..at], &pair[at + 1..]),
        None => (pair, b""),
    }
}

fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&[u8], &[u8])> {
    fields(headers).filter(|pair| pair.contains(&b'=')).map(split)
}

/// Whether a cookie name is one that only the ingress may set, in any spelling
/// that a browser or server could take for it.
fn is_ours(name: &[u8]) -> bool {
    name.to_ascii_lowercase().windows(MARK.len()).any(|part| part == MARK.as_bytes())
}

/// An app's `Set-Cookie` where the app is in a frame of another site: browsers
/// that block third-party cookies keep those that belong to that frame alone.
/// That no other site makes requests with them is seen to on every request.
pub(crate) fn embed(field: &HeaderValue) -> HeaderValue {
    let Ok(text) = str::from_utf8(field.as_bytes()) else { return field.clone() };
    let replaced = |attribute: &&str| {
        let name = attribute.split('=').next().unwrap_or_default().trim();
        !["samesite", "secure", "partitioned"].iter().any(|other| name.eq_ignore_ascii_case(other))
    };
    let mut attributes = text.split(';');
    let pair = attributes.next().unwrap_or_default();
    let kept = std::iter::once(pair).chain(attributes.filter(replaced)).collect::<Vec<_>>().join(";");
    HeaderValue::try_from(format!("{kept}; Secure; SameSite=None; Partitioned")).unwrap_or(field.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cookies(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (header::COOKIE, HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn each_place_has_its_cookie() {
        let host = HostId::random();
        let value = Secret::new("v");
        let own = set_session(host, &value, Scope { mount: "", https: true });
        assert_eq!(own.len(), 1);
        assert!(own[0].starts_with(&format!("__Host-cocalc-session-{host}=v; Path=/; ")), "{own:?}");
        assert!(own[0].ends_with("; HttpOnly; Secure; SameSite=None; Partitioned"), "{own:?}");
        let by_path = set_session(host, &value, Scope { mount: "/b/id", https: false });
        assert!(by_path[0].starts_with(&format!("cocalc-session-{host}=v; Path=/b/id/; ")), "{by_path:?}");
        assert!(!by_path[1].contains("Secure") && by_path[1].contains("SameSite=Lax"), "{by_path:?}");
    }

    #[test]
    fn every_value_is_a_candidate_and_the_prefix_comes_first() {
        let host = HostId::random();
        let other = HostId::random();
        let name = format!("cocalc-session-{host}");
        let find = |fields: &[&str], own| {
            let found = find_sessions(&cookies(fields), host, own, false);
            let values = |values: &Vec<Secret>| {
                values.iter().map(|v| v.expose().to_owned()).collect::<Vec<_>>().join(",")
            };
            found.spellings.iter().map(values).collect::<Vec<_>>().join("|")
        };
        assert_eq!(find(&["a=b"], false), "|");
        assert_eq!(find(&[&format!("a=b; {name}=x")], false), "x|");
        assert_eq!(find(&["a=b", &format!("{name}=x; c=d")], false), "x|");
        assert_eq!(find(&[&format!("{name}=x; {name}=x")], false), "x|");
        assert_eq!(find(&[&format!("{name}=x; {name}=y")], false), "x,y|");
        assert_eq!(find(&[&format!("{name}=x")], true), "|");
        assert_eq!(find(&[&format!("__Host-{name}=z; {name}=x")], true), "z|");
        assert_eq!(find(&[&format!("cocalc-session-http-{host}=p")], true), "|p");
        assert_eq!(find(&[&format!("cocalc-session-{other}=x")], false), "|");
        let plain = cookies(&[&format!("cocalc-session-http-{host}=p")]);
        for own in [false, true] {
            assert!(find_sessions(&plain, host, own, true).is_empty());
        }
        let many: Vec<String> = (0..VALUES_MAX + 1).map(|n| format!("{name}={n}")).collect();
        let crowded = find_sessions(&cookies(&[&many.join(";")]), host, false, false);
        assert!(crowded.crowded && crowded.spellings[0].len() == VALUES_MAX);
    }

    #[test]
    fn a_cookie_that_is_no_text_hides_nothing() {
        let host = HostId::random();
        for odd in [&b"a=\xc3\xa9"[..], b"\xff", b"\xff=\xfe"] {
            let field = [odd, b"; cocalc-session-", host.to_string().as_bytes(), b"=x; c=d"].concat();
            let mut headers =
                HeaderMap::from_iter([(header::COOKIE, HeaderValue::from_bytes(&field).unwrap())]);
            assert_eq!(find_sessions(&headers, host, false, true).spellings[0][0].expose(), "x");
            strip(&mut headers);
            assert_eq!(headers.get(header::COOKIE).unwrap().as_bytes(), [odd, b"; c=d"].concat());
        }
    }

    #[test]
    fn apps_see_only_their_cookies() {
        let host = HostId::random();
        let mut headers = cookies(&[
            &format!("a=b; __Host-cocalc-session-{host}=x;c=d"),
            &format!("COCALC-session-http-{host}=x"),
            "e=f",
        ]);
        strip(&mut headers);
        assert_eq!(headers.get(header::COOKIE).unwrap(), "a=b; c=d; e=f");
        assert_eq!(headers.get_all(header::COOKIE).iter().count(), 1);
        let mut headers = cookies(&[&format!("cocalc-session-{host}=x")]);
        strip(&mut headers);
        assert!(headers.is_empty());
    }

    #[test]
    fn cookies_of_apps_are_confined() {
        let confined = |field: &str, mount: &str, taken: &str| {
            confine(&HeaderValue::from_str(field).unwrap(), mount, taken)
                .map(|field| field.to_str().unwrap().to_owned())
        };
        let keeps = |field, mount, taken, expected: &str| {
            assert_eq!(confined(field, mount, taken).as_deref(), Some(expected), "{field}");
        };
        keeps("a=b; Path=/; HttpOnly", "", "", "a=b; HttpOnly; Path=/");
        keeps("a=b; DOMAIN=.localhost; Secure", "", "", "a=b; Secure");
        keeps("a=b", "", "", "a=b");
        keeps("a=b; Path=/", "/id", "", "a=b; Path=/id/");
        keeps("a=b; Path=/idx/", "/id", "", "a=b; Path=/id/");
        keeps("a=b; Path=/id/port/80/", "/id", "", "a=b; Path=/id/port/80/");
        keeps("a=b; Path=/", "/id", "/id/proxy/80", "a=b; Path=/id/proxy/80/");
        keeps("a=b; Path=/x", "/id", "/id/proxy/80", "a=b; Path=/id/proxy/80/x");
        keeps("a=b; Path=/id/x", "/id", "/id/proxy/80", "a=b; Path=/id/x");
        keeps("a=b; Path=evil", "/id", "/id/proxy/80", "a=b");
        assert_eq!(confined("cocalc-session-x=y", "", ""), None);
        assert_eq!(confined("__Host-Cocalc-Session-x=y; Secure; Path=/", "", ""), None);
        assert_eq!(confined(" __host-cocalc-session-x=y", "/id", ""), None);
        for nameless in ["=cocalc-session-x=y", " = cocalc-session-http-x=y; Path=/", "=Cocalc-Session-x"] {
            assert_eq!(confined(nameless, "/id", ""), None, "{nameless}");
        }
        keeps("=a=b", "", "", "=a=b");
        keeps("a=cocalc-session-x=y", "", "", "a=cocalc-session-x=y");
    }

    #[test]
    fn cookies_in_a_frame_belong_to_it_alone() {
        let embedded =
            |text: &'static str| embed(&HeaderValue::from_static(text)).to_str().unwrap().to_owned();
        assert_eq!(
            embedded("_xsrf=secure; Path=/; samesite=Lax; SECURE; HttpOnly"),
            "_xsrf=secure; Path=/; HttpOnly; Secure; SameSite=None; Partitioned"
        );
        assert_eq!(embedded("Secure=1"), "Secure=1; Secure; SameSite=None; Partitioned");
    }
}
