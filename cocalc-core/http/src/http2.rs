//! HTTP/2 from users, as the HTTP/1.1 that everything else here reads.

use base64::Engine;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header};

use crate::{body::Body, problem::Problem, websocket};

/// Turns a request into what HTTP/1.1 would have brought, and returns whether
/// it opens a WebSocket (RFC 8441).
///
/// The framing layer has refused what is malformed already: connection-specific
/// fields (RFC 9113, 8.2.2), a `Content-Length` that lies (8.1.1), control
/// bytes, pseudo-fields out of place (8.3).
pub(crate) fn into_http1<B>(request: &mut Request<B>) -> Result<bool, Problem> {
    if let (false, Some(authority)) =
        (request.headers().contains_key(header::HOST), request.uri().authority())
    {
        let host = HeaderValue::from_str(authority.as_str());
        let host = host.map_err(|_| Problem::bad_request("The authority is not a name."))?;
        request.headers_mut().insert(header::HOST, host);
    }
    join_cookies(request);
    *request.version_mut() = Version::HTTP_11;
    let Some(protocol) = request.extensions().get::<hyper::ext::Protocol>() else {
        // CONNECT without a protocol is refused further on, as everywhere.
        return Ok(false);
    };
    if request.method() != Method::CONNECT || protocol.as_str() != "websocket" {
        return Err(Problem::new(
            StatusCode::NOT_IMPLEMENTED,
            "protocol_unknown",
            "The only protocol to connect to is websocket.",
        ));
    }
    *request.method_mut() = Method::GET;
    // HTTP/2 has no key: it shows to an HTTP/1.1 server that its answer is to
    // this request, which is ours.
    let key = cocalc_core::ids::AccountId::random();
    let key = base64::engine::general_purpose::STANDARD.encode(key.as_bytes());
    let headers = request.headers_mut();
    websocket::switching(headers);
    if let Ok(key) = HeaderValue::from_str(&key) {
        headers.insert(header::SEC_WEBSOCKET_KEY, key);
    }
    Ok(true)
}

/// Turns the answer into what HTTP/2 has for it. For a WebSocket any 2xx would
/// mean that it is open.
pub(crate) fn from_http1(mut response: Response<Body>, websocket: bool) -> Response<Body> {
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    if websocket && response.status().is_success() {
        let message = "The app did not switch to WebSocket.";
        return Problem::bad_gateway("app_error", message).response(false);
    }
    let headers = response.headers_mut();
    for name in [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ] {
        headers.remove(name);
    }
    if websocket && switched {
        headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        headers.remove(header::CONTENT_LENGTH);
        *response.status_mut() = StatusCode::OK;
    }
    *response.version_mut() = Version::HTTP_2;
    response
}

/// Browsers send each cookie as a field of its own; HTTP/1.1 has one for all of
/// them (RFC 9113, 8.2.3).
fn join_cookies<B>(request: &mut Request<B>) {
    let fields = request.headers().get_all(header::COOKIE);
    if fields.iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = fields.iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        request.headers_mut().insert(header::COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_become_one_field_and_the_authority_the_host() {
        let mut request = Request::builder()
            .version(Version::HTTP_2)
            .uri("https://a.example/x?y")
            .header("cookie", "a=1")
            .header("cookie", "b=2; c=3")
            .body(())
            .unwrap();
        assert!(!into_http1(&mut request).unwrap());
        assert_eq!(request.headers()["host"], "a.example");
        let cookies: Vec<_> = request.headers().get_all("cookie").iter().collect();
        assert_eq!(cookies, ["a=1; b=2; c=3"]);
        assert_eq!(request.version(), Version::HTTP_11);
    }

    #[test]
    fn a_page_instead_of_a_switch_does_not_open_a_websocket() {
        let page = || Response::new(Body::from("hello"));
        assert_eq!(from_http1(page(), true).status(), StatusCode::BAD_GATEWAY);
        assert_eq!(from_http1(page(), false).status(), StatusCode::OK);
        let mut switched = page();
        *switched.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        websocket::switching(switched.headers_mut());
        let opened = from_http1(switched, true);
        assert_eq!(opened.status(), StatusCode::OK);
        assert!(!opened.headers().contains_key(header::UPGRADE));
        assert!(!opened.headers().contains_key(header::CONNECTION));
    }
}
