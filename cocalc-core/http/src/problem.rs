//! What an ingress answers itself: problem documents for programs, small pages
//! for browsers.

use std::{borrow::Cow, time::Duration};

use cocalc_core::auth::Denial;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::json;

use crate::body::Body;

/// Carries the stable code of an answer that is the ingress's own; apps can't
/// set it.
pub const CODE_HEADER: &str = "cocalc-code";

/// An answer that is not the app's.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) message: Cow<'static, str>,
    pub(crate) retry_after: Option<Duration>,
    /// Whether it counts against who asked: nothing of ours is to blame.
    pub(crate) failure: bool,
    /// Browsers ask again by themselves.
    pub(crate) refresh: bool,
    /// Whether the connection's framing can no longer be trusted.
    pub(crate) close: bool,
    pub(crate) location: Option<String>,
    /// What few problems have.
    pub(crate) details: Option<Box<Details>>,
    pub(crate) headers: Vec<(&'static str, String)>,
}

/// What is said of a project that is on its way up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Details {
    /// The question of the address that browsers ask again.
    pub(crate) again: String,
    /// What the project wrote last; for who may see that.
    pub(crate) log: Option<String>,
}

impl Problem {
    /// The same, where browsers that ask again ask `question`.
    pub(crate) fn asked_again(mut self, question: String) -> Self {
        if self.refresh && !question.is_empty() {
            self.details.get_or_insert_default().again = question;
        }
        self
    }

    fn log(&self) -> Option<&str> {
        self.details.as_ref()?.log.as_deref()
    }

    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retry_after: None,
            failure: false,
            refresh: false,
            close: false,
            location: None,
            details: None,
            headers: Vec::new(),
        }
    }

    /// A message that no two parsers need agree on; the connection ends.
    pub(crate) fn bad_request(message: &'static str) -> Self {
        Self { close: true, ..Self::new(StatusCode::BAD_REQUEST, "bad_request", message) }
    }

    pub(crate) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "There is nothing at this address.")
    }

    pub(crate) fn unavailable(code: &'static str, message: impl Into<Cow<'static, str>>, secs: u64) -> Self {
        Self {
            retry_after: Some(Duration::from_secs(secs)),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
        }
    }

    pub(crate) fn bad_gateway(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, code, message)
    }

    pub(crate) fn gateway_timeout(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, code, message)
    }

    pub(crate) fn header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The answer, for a browser or for a program.
    pub(crate) fn response(self, browser: bool) -> Response<Body> {
        let (kind, body) =
            if browser { ("text/html; charset=utf-8", self.page()) } else { (PROBLEM_JSON, self.json()) };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(CODE_HEADER, HeaderValue::from_static(self.code));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(after)));
        }
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        }
        response
    }

    fn json(&self) -> String {
        let mut problem = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or("Error"),
            "status": self.status.as_u16(),
            "code": self.code,
            // RFC 9457 calls it detail; the contract promised a message.
            "detail": self.message,
            "message": self.message,
        });
        if let Some(location) = &self.location {
            problem["location"] = json!(location);
        }
        if let Some(log) = self.log() {
            problem["log"] = json!(log);
        }
        problem.to_string()
    }

    fn page(&self) -> String {
        let refresh = match self.retry_after {
            Some(after) if self.refresh => {
                // With an address: an address with a part after `#` is otherwise
                // only scrolled to. A question alone keeps the path.
                let again = self.details.as_ref().map_or("", |details| &details.again);
                let again = if again.is_empty() { "?" } else { again };
                format!("<meta http-equiv=\"refresh\" content=\"{};url={}\">", seconds(after), escape(again))
            }
            _ => String::new(),
        };
        let again = if self.refresh { "<p>This page looks again by itself.</p>" } else { "" };
        let log = self.log().map_or_else(String::new, |log| {
            format!("<h2>What it wrote last</h2><pre style=\"overflow:auto\">{}</pre>", escape(log))
        });
        let body = format!("{again}<p><code>{}</code></p>{log}", escape(self.code));
        page(&self.message, &format!("{refresh}\n"), &body)
    }
}

impl From<&Denial> for Problem {
    fn from(denial: &Denial) -> Self {
        let (status, code) = denial.public();
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::FORBIDDEN);
        // As little as the code says, in words.
        let message = match code {
            "unauthenticated" => "Sign in to open this project.",
            "token_expired" => "This link has expired. Open the project again.",
            "rate_limited" => "Too many requests. Try again later.",
            _ => "You cannot open this project.",
        };
        let retry_after = match denial {
            Denial::RateLimited { retry_after } => Some(*retry_after),
            _ => None,
        };
        let failure = matches!(denial, Denial::BadCredential(_) | Denial::Used | Denial::Forbidden(_));
        Self { retry_after, failure, ..Self::new(status, code, message) }
    }
}

impl From<Denial> for Problem {
    fn from(denial: Denial) -> Self {
        Self::from(&denial)
    }
}

pub(crate) const PROBLEM_JSON: &str = "application/problem+json";

/// Whether the client is a browser that shows a page.
pub(crate) fn wants_page(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|accept| accept.to_str().ok())
        .flat_map(|accept| accept.split(','))
        .any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/html")))
}

/// A small page.
pub(crate) fn page(title: &str, head: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>{head}\
         <style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:15vh auto;padding:0 1em}}</style>\
         </head><body><h1>{title}</h1>{body}</body></html>\n"
    )
}

pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Whole seconds, rounded up, at least one.
fn seconds(duration: Duration) -> u64 {
    (duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).max(1)
}
