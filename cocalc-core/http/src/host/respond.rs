//! What of an app's response reaches the user.

use cocalc_core::auth::Principal;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::Asked;
use crate::{cookies, headers, path::What};

/// Where an app is, as its user sees it.
#[derive(Debug)]
pub(super) struct App {
    /// The external path of its project: empty on an own origin.
    mount: String,
    /// The external prefix that the app does not see: empty if it sees all.
    taken: String,
    frame_ancestors: HeaderValue,
    /// Whether it is used in a frame of another site, and may keep cookies there.
    embedded: bool,
}

impl App {
    pub(super) fn of(asked: &Asked<'_>, principal: &Principal) -> Self {
        let own_origin = asked.place.mount.is_empty();
        let mount =
            if own_origin { String::new() } else { format!("{}{}", asked.view.prefix, asked.place.mount) };
        let taken = match asked.place.what {
            What::Proxy { prefix, .. } => format!("{}{prefix}", asked.view.prefix),
            _ => String::new(),
        };
        // Elsewhere, browsers would not keep them at all.
        let secure = asked.view.https || is_loopback(&asked.view.authority);
        Self {
            mount,
            taken,
            frame_ancestors: frame_ancestors(principal.embed_origin.as_deref()),
            embedded: secure && principal.embed_origin.is_some(),
        }
    }

    /// Keeps the app within its own place.
    pub(super) fn filter(&self, fields: &mut HeaderMap) {
        headers::pass_response(fields);
        headers::remove_ours(fields);
        // It would send the user's next requests elsewhere.
        fields.remove(header::ALT_SVC);
        if !self.mount.is_empty() {
            // These speak for the whole origin, which is shared.
            for name in WHOLE_ORIGIN {
                fields.remove(HeaderName::from_static(name));
            }
        }
        if fields.contains_key(header::SET_COOKIE) {
            headers::rewrite_all(fields, header::SET_COOKIE, |field| {
                let field = cookies::confine(field, &self.mount, &self.taken)?;
                Some(if self.embedded { cookies::embed(&field) } else { field })
            });
        }
        if !self.taken.is_empty() && fields.contains_key(header::LOCATION) {
            headers::rewrite_all(fields, header::LOCATION, |field| Some(self.outside(field)));
        }
        if is_shown(fields.get(header::CONTENT_TYPE)) {
            // Policies add up: this one only narrows what the app allows.
            let policy = framed(fields).unwrap_or_else(|| self.frame_ancestors.clone());
            fields.append(header::CONTENT_SECURITY_POLICY, policy);
        }
    }

    /// A path of an app that does not see its prefix, with the prefix.
    fn outside(&self, location: &HeaderValue) -> HeaderValue {
        let bytes = location.as_bytes();
        let is_path = bytes.starts_with(b"/") && !bytes.starts_with(b"//") && !bytes.starts_with(b"/\\");
        let known = bytes.strip_prefix(self.taken.as_bytes());
        let has_prefix = known.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"));
        if !is_path || has_prefix {
            return location.clone();
        }
        HeaderValue::from_bytes(&[self.taken.as_bytes(), bytes].concat()).unwrap_or_else(|_| location.clone())
    }
}

/// Fields that a browser obeys, and keeps, for a whole origin. Some tell a third
/// party of every address that is asked for there (Network Error Logging).
const WHOLE_ORIGIN: [&str; 11] = [
    "accept-ch",
    "clear-site-data",
    "critical-ch",
    "expect-ct",
    "nel",
    "public-key-pins",
    "public-key-pins-report-only",
    "report-to",
    "service-worker-allowed",
    "set-login",
    "strict-transport-security",
];

/// Whether a browser may show a response as a page: what is HTML or XML, and what
/// says of itself nothing that it could be, for then it is looked at.
fn is_shown(kind: Option<&HeaderValue>) -> bool {
    let Some(kind) = kind else { return true };
    let kind = kind.as_bytes();
    let kind = kind.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    let contains = |what: &[u8]| kind.windows(what.len()).any(|part| part.eq_ignore_ascii_case(what));
    !kind.contains(&b'/') || contains(b"html") || contains(b"xml")
}

/// Whether browsers trust the place without TLS.
fn is_loopback(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    host == "127.0.0.1" || host == "localhost" || host.ends_with(".localhost")
}

/// What an app says of frames in the older way (RFC 7034), which browsers no
/// longer look at once there is a policy that names ancestors. An app that has
/// such a policy itself is believed there.
fn framed(fields: &HeaderMap) -> Option<HeaderValue> {
    let names_ancestors = |field: &HeaderValue| {
        field.as_bytes().windows(15).any(|part| part.eq_ignore_ascii_case(b"frame-ancestors"))
    };
    if fields.get_all(header::CONTENT_SECURITY_POLICY).iter().any(names_ancestors) {
        return None;
    }
    let said = fields.get(header::X_FRAME_OPTIONS)?.as_bytes();
    let said = said.trim_ascii();
    if said.eq_ignore_ascii_case(b"deny") {
        Some(HeaderValue::from_static("frame-ancestors 'none'"))
    } else if said.eq_ignore_ascii_case(b"sameorigin") {
        Some(HeaderValue::from_static("frame-ancestors 'self'"))
    } else {
        None
    }
}

/// Who may show the project in a frame: itself, and whom its token names.
pub(super) fn frame_ancestors(embed_origin: Option<&str>) -> HeaderValue {
    let is_origin = |origin: &&str| {
        (origin.starts_with("https://") || origin.starts_with("http://"))
            && origin.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:/[]".contains(&b))
            && origin.matches('/').count() == 2
    };
    embed_origin
        .filter(is_origin)
        .and_then(|origin| HeaderValue::try_from(format!("frame-ancestors 'self' {origin}")).ok())
        .unwrap_or(HeaderValue::from_static("frame-ancestors 'self'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(mount: &str, taken: &str) -> App {
        App {
            mount: mount.to_owned(),
            taken: taken.to_owned(),
            frame_ancestors: frame_ancestors(None),
            embedded: false,
        }
    }

    fn filtered(app: &App, fields: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        app.filter(&mut map);
        map.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn apps_stay_in_their_place() {
        let by_path = app("/id", "/id/proxy/80");
        assert_eq!(
            filtered(
                &by_path,
                &[
                    ("connection", "x-hop"),
                    ("x-hop", "1"),
                    ("alt-svc", "h3"),
                    ("service-worker-allowed", "/"),
                    ("clear-site-data", "*"),
                    ("strict-transport-security", "max-age=1"),
                    ("nel", "{\"report_to\":\"x\",\"success_fraction\":1,\"max_age\":99}"),
                    ("report-to", "{\"group\":\"x\",\"endpoints\":[{\"url\":\"https://evil.example\"}]}"),
                    ("accept-ch", "x"),
                    ("content-type", "text/plain"),
                    ("cocalc-code", "project_moved"),
                    ("set-cookie", "a=b; Domain=x; Path=/"),
                    ("set-cookie", "cocalc-session-x=y"),
                    ("location", "/login"),
                ]
            ),
            [
                "content-type: text/plain",
                "set-cookie: a=b; Path=/id/proxy/80/",
                "location: /id/proxy/80/login"
            ]
        );
        for kept in ["https://x/", "//x/", "relative", "/id/proxy/80/x"] {
            assert_eq!(by_path.outside(&HeaderValue::from_static(kept)), kept);
        }
        assert_eq!(
            filtered(&app("", ""), &[("content-type", "Text/HTML"), ("content-security-policy", "x")]),
            [
                "content-type: Text/HTML",
                "content-security-policy: x",
                "content-security-policy: frame-ancestors 'self'"
            ]
        );
    }

    #[test]
    fn whatever_can_be_shown_as_a_page_says_who_may_frame_it() {
        let policed = |fields: &[(&'static str, &'static str)]| {
            filtered(&app("", ""), fields).iter().any(|field| field.contains("frame-ancestors"))
        };
        assert!(policed(&[]), "browsers guess");
        for kind in
            ["text/html", "TEXT/HTML; charset=x", " application/xhtml+xml", "image/svg+xml", "text/xml"]
        {
            assert!(policed(&[("content-type", kind)]), "{kind}");
        }
        assert!(policed(&[("content-type", "html")]) && policed(&[("content-type", "")]));
        // Nominated for removal, it says nothing either.
        assert!(policed(&[("content-type", "text/plain"), ("connection", "content-type")]));
        for kind in ["application/json", "text/css; charset=xml", "image/png", "application/octet-stream"] {
            assert!(!policed(&[("content-type", kind)]), "{kind}");
        }
    }

    #[test]
    fn what_an_app_says_of_frames_in_the_older_way_still_holds() {
        let by_name = App { frame_ancestors: frame_ancestors(Some("https://m.example")), ..app("", "") };
        for (said, kept) in [("DENY", "'none'"), ("sameorigin", "'self'"), ("x", "'self' https://m.example")]
        {
            let fields = [("content-type", "text/html"), ("x-frame-options", said)];
            let expected = format!("content-security-policy: frame-ancestors {kept}");
            assert!(filtered(&by_name, &fields).contains(&expected), "{said}");
        }
        let both = [
            ("content-type", "text/html"),
            ("x-frame-options", "DENY"),
            ("content-security-policy", "Frame-Ancestors *"),
        ];
        let expected = "content-security-policy: frame-ancestors 'self' https://m.example".to_owned();
        assert!(filtered(&by_name, &both).contains(&expected));
    }

    #[test]
    fn only_an_origin_may_embed() {
        assert_eq!(
            frame_ancestors(Some("https://master.example:8443")),
            "frame-ancestors 'self' https://master.example:8443"
        );
        for bad in ["*", "https://x; script-src *", "https://x/ y", "javascript:x", "https://x/y", "'none'"] {
            assert_eq!(frame_ancestors(Some(bad)), "frame-ancestors 'self'", "{bad}");
        }
    }
}
