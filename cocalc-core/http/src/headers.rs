//! Which header fields pass, in which direction.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Version,
    header::{self, Entry},
    request::Parts,
};

use crate::{problem::Problem, trailers};

pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(crate) const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(crate) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const X_FORWARDED_PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");

/// Refuses a request that another parser could read differently, and returns
/// its authority, in lower case.
pub(crate) fn check_request(parts: &Parts) -> Result<String, Problem> {
    if parts.method == Method::CONNECT {
        return Err(Problem {
            close: true,
            ..Problem::new(
                http::StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "CONNECT is not served here.",
            )
        });
    }
    let headers = &parts.headers;
    if headers.contains_key(header::TRANSFER_ENCODING) {
        if headers.contains_key(header::CONTENT_LENGTH) {
            return Err(Problem::bad_request("Transfer-Encoding and Content-Length exclude each other."));
        }
        let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let chunked = codings.next().is_some_and(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"));
        if !chunked || codings.next().is_some() {
            return Err(Problem::bad_request("The only transfer coding is chunked."));
        }
    }
    if headers.get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        return Err(Problem::bad_request("Content-Length is repeated."));
    }
    for name in headers.keys() {
        if name.as_str().contains('_') {
            let dashed = name.as_str().replace('_', "-");
            // Servers that turn fields into variables see no difference
            // between these and the ones that are set here.
            if is_forwarding(&dashed) || is_ours(&dashed) || FRAMING.contains(&&*dashed) {
                return Err(Problem::bad_request("A header field imitates another one."));
            }
        }
    }
    for nominated in connection_options(headers) {
        let name = nominated.to_ascii_lowercase();
        if is_forwarding(&name) || is_ours(&name) || FRAMING.contains(&&*name) {
            return Err(Problem::bad_request("Connection names a header field that must not be removed."));
        }
    }
    authority(parts)
}

/// Fields that may not be nominated for removal, nor imitated.
const FRAMING: [&str; 7] =
    ["host", "authorization", "cookie", "origin", "content-length", "transfer-encoding", "content-type"];

fn authority(parts: &Parts) -> Result<String, Problem> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host,
        (None, _) if parts.version == Version::HTTP_10 => {
            return Err(Problem::bad_request("The request names no host."));
        }
        (None, _) => return Err(Problem::bad_request("There must be one Host field.")),
        (Some(_), Some(_)) => return Err(Problem::bad_request("There must be one Host field.")),
    };
    let Some(host) = host.to_str().ok().filter(|host| !host.is_empty() && host.len() <= 300) else {
        return Err(Problem::bad_request("The Host field is not a name."));
    };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if !host.bytes().all(plain) {
        return Err(Problem::bad_request("The Host field is not a name."));
    }
    if let Some(authority) = parts.uri.authority()
        && !authority.as_str().eq_ignore_ascii_case(host)
    {
        return Err(Problem::bad_request("The request's address and its Host field disagree."));
    }
    if parts
        .uri
        .scheme()
        .is_some_and(|scheme| *scheme != http::uri::Scheme::HTTP && *scheme != http::uri::Scheme::HTTPS)
    {
        return Err(Problem::bad_request("The request's address is not of HTTP."));
    }
    Ok(host.to_ascii_lowercase())
}

fn options<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|option| !option.is_empty())
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    options(headers, &header::CONNECTION)
}

/// Whether a field that is a list contains `option`.
pub(crate) fn has_option(headers: &HeaderMap, name: &HeaderName, option: &str) -> bool {
    options(headers, name).any(|o| o.eq_ignore_ascii_case(option))
}

/// Whether `Connection` contains `option`.
pub(crate) fn has_connection_option(headers: &HeaderMap, option: &str) -> bool {
    has_option(headers, &header::CONNECTION, option)
}

/// Readies the fields of a request for the next hop: what is meant for one
/// connection only goes, and what is true of the next one, too, is said anew.
pub(crate) fn pass_request(headers: &mut HeaderMap) {
    let trailers = trailers::are_accepted(headers);
    pass_response(headers);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("TE"));
    }
}

/// The same of a response.
pub(crate) fn pass_response(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        // The coding counts (RFC 9112, 6.3), and hyper has read the body by it.
        headers.remove(header::CONTENT_LENGTH);
    }
    let announced = trailers::announced(headers);
    remove_hop_by_hop(headers);
    if let Some(names) = announced {
        headers.insert(header::TRAILER, names);
    }
}

/// Removes what is meant for one connection only (RFC 9110, 7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let nominated: Vec<HeaderName> =
            connection_options(headers).filter_map(|option| option.parse().ok()).collect();
        for name in nominated {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    for name in [
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("http2-settings"),
        // No field at all, but CGI programs take it for the name of a proxy to
        // use (CVE-2016-5385).
        HeaderName::from_static("proxy"),
    ] {
        headers.remove(name);
    }
}

/// Removes everything by which a client could pretend to be forwarded, and
/// what is the ingress's own.
pub(crate) fn remove_forwarding(headers: &mut HeaderMap) {
    remove_matching(headers, |name| is_forwarding(name) || is_ours(name));
}

/// Removes the ingress's own fields.
pub(crate) fn remove_ours(headers: &mut HeaderMap) {
    remove_matching(headers, is_ours);
}

fn remove_matching(headers: &mut HeaderMap, remove: impl Fn(&str) -> bool) {
    if headers.keys().any(|name| remove(name.as_str())) {
        let names: Vec<HeaderName> = headers.keys().filter(|name| remove(name.as_str())).cloned().collect();
        for name in names {
            headers.remove(name);
        }
    }
}

pub(crate) fn is_forwarding(name: &str) -> bool {
    name == "forwarded" || name.starts_with("x-forwarded") || name == "x-real-ip" || name == "via"
}

pub(crate) fn is_ours(name: &str) -> bool {
    name.starts_with("cocalc-") || name.starts_with("x-cocalc-")
}

/// Keeps only the first value of a field, for fields where several would be
/// read differently by different servers.
pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Sets a field to text of ours; nothing if it is no field value.
pub(crate) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => {
            headers.insert(name, value);
        }
        Err(_) => {
            headers.remove(name);
        }
    }
}

/// Replaces all values of a field by what `change` makes of each; `None` drops
/// it.
pub(crate) fn rewrite_all(
    headers: &mut HeaderMap,
    name: HeaderName,
    change: impl Fn(&HeaderValue) -> Option<HeaderValue>,
) {
    let changed: Vec<HeaderValue> = headers.get_all(&name).iter().filter_map(change).collect();
    if let Entry::Occupied(entry) = headers.entry(&name) {
        entry.remove_entry_mult();
    }
    for value in changed {
        headers.append(&name, value);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn requests_have_one_authority() {
        assert_eq!(check_request(&parts("/", &[("host", "A:80")])).unwrap(), "a:80");
        assert_eq!(check_request(&parts("http://a:80/", &[("host", "A:80")])).unwrap(), "a:80");
        for (uri, headers) in [
            ("/", &[][..]),
            ("/", &[("host", "a"), ("host", "a")]),
            ("/", &[("host", "")]),
            ("/", &[("host", "a b")]),
            ("/", &[("host", "a@b")]),
            ("/", &[("host", "a/b")]),
            ("http://b/", &[("host", "a")]),
            ("http://u@a/", &[("host", "a")]),
            ("ftp://a/", &[("host", "a")]),
            ("/", &[("host", "a"), ("x_forwarded_for", "1")]),
            ("/", &[("host", "a"), ("cocalc_code", "1")]),
            ("/", &[("host", "a"), ("content_length", "1")]),
            ("/", &[("host", "a"), ("connection", "close, X-Forwarded-For")]),
            ("/", &[("host", "a"), ("connection", "authorization")]),
            ("/", &[("host", "a"), ("connection", "cookie")]),
            ("/", &[("host", "a"), ("content-length", "1"), ("transfer-encoding", "chunked")]),
            ("/", &[("host", "a"), ("transfer-encoding", "gzip, chunked")]),
            ("/", &[("host", "a"), ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
        ] {
            let problem = check_request(&parts(uri, headers)).unwrap_err();
            assert_eq!((problem.code, problem.close), ("bad_request", true), "{uri} {headers:?}");
        }
    }

    #[test]
    fn fields_of_one_hop_stay_there() {
        let mut headers = parts(
            "/",
            &[
                ("connection", "keep-alive, X-Private"),
                ("x-private", "1"),
                ("keep-alive", "1"),
                ("te", "trailers"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
                ("proxy-authorization", "x"),
                ("forwarded", "for=1"),
                ("x-forwarded-anything", "1"),
                ("x-real-ip", "1"),
                ("cocalc-code", "1"),
                ("accept", "x"),
            ],
        )
        .headers;
        remove_hop_by_hop(&mut headers);
        remove_forwarding(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["accept"]);
    }

    #[test]
    fn trailers_are_asked_for_anew() {
        let fields = [("te", "gzip;q=0.5, trailers"), ("connection", "TE"), ("trailer", "Host, X-Sum")];
        let mut asked = parts("/", &fields).headers;
        pass_request(&mut asked);
        assert_eq!(
            (&asked["te"], &asked["connection"], &asked["trailer"]),
            (
                &HeaderValue::from_static("trailers"),
                &HeaderValue::from_static("TE"),
                &HeaderValue::from_static("x-sum"),
            )
        );
        let mut answered = parts("/", &fields).headers;
        pass_response(&mut answered);
        assert_eq!(answered.keys().collect::<Vec<_>>(), ["trailer"]);
    }
}
