//! Where a request is meant to go, from its authority and its raw path alone.
//!
//! Routing looks at the path exactly once, byte by byte, before anything is
//! sliced or decoded: every part of the routed prefix has one spelling, so an
//! encoded slash, a dot segment or a doubled slash in it simply does not match.
//! What follows the prefix is the app's business and is forwarded unchanged.

use cocalc_core::ids::ProjectId;

/// The path under which the ingress keeps its own endpoints on every origin.
pub const SESSION_PATH: &str = "/.cocalc/session";

/// The names and the base path under which an ingress answers.
#[derive(Clone, Debug, Default)]
pub struct Served {
    domains: Vec<Box<str>>,
    names: Vec<Box<str>>,
    base_path: Box<str>,
}

/// What a request's authority stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The daemon itself; projects are told apart by path.
    Base,
    /// One project's own origin, `<project_id>.<domain>`.
    Project(ProjectId),
    /// The own origin of one port of a project, `<port>--<project_id>.<domain>`.
    Port(ProjectId, u16),
}

/// What a request's path stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target<'a> {
    /// One of the daemon's own paths (`/.cocalc/…`, `/healthz`, `/readyz`,
    /// `/metrics`, `/conat/…`), without the base path.
    Own(&'a str),
    /// Something of a project.
    Project(Place<'a>),
}

/// A place in a project.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Place<'a> {
    /// Which project.
    pub project: ProjectId,
    /// What precedes the project's own paths: empty on its own origin, and
    /// `<base path>/<project_id>` in path routing.
    pub mount: &'a str,
    /// What it is.
    pub what: What<'a>,
}

/// The kinds of places in a project.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum What<'a> {
    /// The project without a final slash, in path routing.
    Bare,
    /// The project's front page.
    Root,
    /// The exchange of a token for a session.
    Session,
    /// An app that sees the whole path.
    Port {
        /// Where it listens.
        port: u16,
    },
    /// An app that sees only what follows its prefix.
    Proxy {
        /// Where it listens.
        port: u16,
        /// The prefix that is taken off, for instance `/<project_id>/proxy/80`.
        prefix: &'a str,
        /// What the app sees: empty, or beginning with a slash.
        rest: &'a str,
    },
    /// Raw files.
    Files {
        /// What follows `/files`: empty, or beginning with a slash.
        rest: &'a str,
    },
    /// The ingress's own pages of a project.
    Page {
        /// What follows `/.cocalc`, beginning with a slash.
        rest: &'a str,
    },
    /// The message bus.
    Bus {
        /// What follows `/conat`: empty, or beginning with a slash.
        rest: &'a str,
    },
}

/// Says that a name or base path cannot be served.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("cannot serve {what} {value:?}: expected {expected}")]
#[non_exhaustive]
pub struct ServedError {
    /// What was configured.
    pub what: &'static str,
    /// Its value.
    pub value: String,
    /// The accepted form, for people.
    pub expected: &'static str,
}

impl Served {
    /// Serves nothing but the loopback literals `127.0.0.1`, `[::1]` and
    /// `localhost`, at any port.
    pub fn new() -> Self {
        Self::default()
    }

    /// Also serves `domain` itself, and below it an origin for each project.
    /// It carries the port, if that is not the scheme's own.
    ///
    /// # Errors
    ///
    /// A text that is not `name` or `name:port` in lower case is refused.
    pub fn domain(mut self, domain: &str) -> Result<Self, ServedError> {
        self.domains.push(checked_name("domain", domain)?);
        Ok(self)
    }

    /// Also serves the name `name`, for path routing only.
    ///
    /// # Errors
    ///
    /// As for [`domain`](Self::domain).
    pub fn name(mut self, name: &str) -> Result<Self, ServedError> {
        self.names.push(checked_name("name", name)?);
        Ok(self)
    }

    /// Expects `base_path` before every path of the base origin. Default: none.
    ///
    /// # Errors
    ///
    /// A path that does not begin with a slash, ends with one, or contains
    /// anything but plain segments is refused.
    pub fn base_path(mut self, base_path: &str) -> Result<Self, ServedError> {
        let plain = |segment: &str| {
            !segment.is_empty()
                && segment != "."
                && segment != ".."
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b))
        };
        let valid =
            base_path.is_empty() || base_path.strip_prefix('/').is_some_and(|p| p.split('/').all(plain));
        if !valid {
            return Err(ServedError {
                what: "base path",
                value: base_path.to_owned(),
                expected: "nothing, or /plain/segments without a final slash",
            });
        }
        self.base_path = base_path.into();
        Ok(self)
    }

    /// The base path: empty, or `/plain/segments`.
    pub fn base(&self) -> &str {
        &self.base_path
    }

    /// Which origin an authority (the `Host` field) names; `None` if it is not
    /// served here.
    pub fn origin(&self, authority: &str) -> Option<Origin> {
        if authority.len() > 300 {
            return None;
        }
        let authority = authority.to_ascii_lowercase();
        if is_loopback(&authority) || self.names.iter().any(|name| **name == *authority) {
            return Some(Origin::Base);
        }
        for domain in &self.domains {
            if **domain == *authority {
                return Some(Origin::Base);
            }
            let label = authority.strip_suffix(&**domain).and_then(|label| label.strip_suffix('.'));
            if let Some(label) = label {
                return origin_label(label);
            }
        }
        None
    }

    /// What `path` stands for on `origin`; `None` if there is nothing.
    pub fn target<'a>(&self, origin: Origin, path: &'a str) -> Option<Target<'a>> {
        if !path.starts_with('/') {
            return None;
        }
        let place = |project, mount, what| Some(Target::Project(Place { project, mount, what }));
        match origin {
            Origin::Port(project, _) | Origin::Project(project) if path == SESSION_PATH => {
                place(project, "", What::Session)
            }
            Origin::Port(..) if is_under(path, "/.cocalc") => None,
            Origin::Port(project, port) => place(project, "", What::Port { port }),
            Origin::Project(project) => place(project, "", what(path, path)?),
            Origin::Base => {
                // Probes by load balancers know nothing of a base path.
                if let "/healthz" | "/readyz" | "/metrics" = path {
                    return Some(Target::Own(path));
                }
                let rest = path.strip_prefix(&*self.base_path)?;
                if is_own(rest) {
                    return Some(Target::Own(rest));
                }
                let project: ProjectId = rest.strip_prefix('/')?.get(..36)?.parse().ok()?;
                let (mount, rest) = path.split_at(self.base_path.len() + 37);
                match rest {
                    "" => place(project, mount, What::Bare),
                    SESSION_PATH => place(project, mount, What::Session),
                    rest => place(project, mount, what(path, rest)?),
                }
            }
        }
    }
}

/// Reads `/port/N…` and its kin: `rest` is the end of `path`.
fn what<'a>(path: &'a str, rest: &'a str) -> Option<What<'a>> {
    if rest == "/" {
        return Some(What::Root);
    }
    if let Some(rest) = rest.strip_prefix("/port/") {
        let (port, _) = port_segment(rest)?;
        return Some(What::Port { port });
    }
    if let Some(rest) = rest.strip_prefix("/proxy/") {
        let (port, rest) = port_segment(rest)?;
        let (prefix, _) = path.split_at(path.len() - rest.len());
        return Some(What::Proxy { port, prefix, rest });
    }
    if is_under(rest, "/files") {
        return Some(What::Files { rest: &rest["/files".len()..] });
    }
    if let Some(rest) = rest.strip_prefix("/.cocalc").filter(|rest| is_page(rest)) {
        return Some(What::Page { rest });
    }
    if is_under(rest, "/conat") {
        return Some(What::Bus { rest: &rest["/conat".len()..] });
    }
    None
}

/// What there is below `/.cocalc` of a project, but for its session.
fn is_page(rest: &str) -> bool {
    matches!(rest, "/ports" | "/snapshots" | "/status" | "/stay" | "/terminals")
        || ["/assets/", "/terminal/"].iter().any(|under| rest.strip_prefix(under).is_some_and(is_plain))
}

/// Whether a last segment needs no second look.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

/// Splits `80/rest` or `80` into the port and `/rest` or nothing.
fn port_segment(text: &str) -> Option<(u16, &str)> {
    let (digits, rest) = text.split_at(text.find('/').unwrap_or(text.len()));
    Some((parse_port(digits)?, rest))
}

/// A TCP port in its one spelling.
fn parse_port(digits: &str) -> Option<u16> {
    let plain = (1..=5).contains(&digits.len())
        && !digits.starts_with('0')
        && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

fn is_own(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz" | "/metrics")
        || is_under(path, "/.cocalc")
        || is_under(path, "/conat")
}

/// Whether `path` is `root` or lies below it.
fn is_under(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Reads `<project_id>` or `<port>--<project_id>`.
fn origin_label(label: &str) -> Option<Origin> {
    match label.split_once("--") {
        None => label.parse().ok().map(Origin::Project),
        Some((port, project)) => Some(Origin::Port(project.parse().ok()?, parse_port(port)?)),
    }
}

fn is_loopback(authority: &str) -> bool {
    ["127.0.0.1", "[::1]", "localhost"].iter().any(|literal| {
        authority.strip_prefix(literal).is_some_and(|port| {
            port.is_empty() || port.strip_prefix(':').is_some_and(|port| parse_port(port).is_some())
        })
    })
}

fn checked_name(what: &'static str, value: &str) -> Result<Box<str>, ServedError> {
    let (name, port) = match value.rsplit_once(':') {
        // An IPv6 literal may end with its bracket.
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (value, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let literal = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'))
        .is_some_and(|name| name.parse::<std::net::Ipv6Addr>().is_ok());
    let valid = value.len() <= 200
        && (literal || name.split('.').all(label))
        && port.is_none_or(|port| parse_port(port).is_some());
    if valid {
        Ok(value.into())
    } else {
        Err(ServedError { what, value: value.to_owned(), expected: "name or name:port, in lower case" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b";

    fn id() -> ProjectId {
        ID.parse().unwrap()
    }

    fn served() -> Served {
        Served::new().domain("alpha.localhost:7810").unwrap().name("host.example.com").unwrap()
    }

    fn base(path: &str) -> Option<Target<'_>> {
        served().target(Origin::Base, path)
    }

    #[test]
    fn authorities_name_origins() {
        let served = served();
        for authority in [
            "127.0.0.1",
            "127.0.0.1:7810",
            "[::1]:9",
            "localhost:80",
            "host.example.com",
            "alpha.localhost:7810",
        ] {
            assert_eq!(served.origin(authority), Some(Origin::Base), "{authority}");
        }
        assert_eq!(served.origin(&format!("{ID}.alpha.localhost:7810")), Some(Origin::Project(id())));
        assert_eq!(served.origin(&format!("{ID}.ALPHA.localhost:7810")), Some(Origin::Project(id())));
        assert_eq!(served.origin(&format!("80--{ID}.alpha.localhost:7810")), Some(Origin::Port(id(), 80)));
        for authority in [
            "",
            "evil.example",
            "alpha.localhost",
            "alpha.localhost:7811",
            "127.0.0.1:0",
            "127.0.0.1:x",
            "127.0.0.1.evil.example",
            "localhost.",
            "x.alpha.localhost:7810",
            &format!("a.{ID}.alpha.localhost:7810"),
            &format!("{ID}alpha.localhost:7810"),
            &format!("{ID}.host.example.com"),
            &format!("080--{ID}.alpha.localhost:7810"),
            &format!("0--{ID}.alpha.localhost:7810"),
            &format!("65536--{ID}.alpha.localhost:7810"),
            &format!("--{ID}.alpha.localhost:7810"),
            &format!("80-{ID}.alpha.localhost:7810"),
        ] {
            assert_eq!(served.origin(authority), None, "{authority}");
        }
    }

    #[test]
    fn paths_name_places() {
        let mount = format!("/{ID}");
        let at = |path: &str| match base(path) {
            Some(Target::Project(place)) => {
                assert_eq!((place.project, place.mount), (id(), &*mount));
                format!("{:?}", place.what)
            }
            other => format!("{other:?}"),
        };
        assert_eq!(at(&mount), "Bare");
        assert_eq!(at(&format!("/{ID}/")), "Root");
        assert_eq!(at(&format!("/{ID}/.cocalc/session")), "Session");
        assert_eq!(at(&format!("/{ID}/port/80")), "Port { port: 80 }");
        assert_eq!(at(&format!("/{ID}/port/80//../%2f")), "Port { port: 80 }");
        let proxy = |rest| format!("Proxy {{ port: 8888, prefix: \"/{ID}/proxy/8888\", rest: \"{rest}\" }}");
        assert_eq!(at(&format!("/{ID}/proxy/8888")), proxy(""));
        assert_eq!(at(&format!("/{ID}/proxy/8888/a//b/../%2e")), proxy("/a//b/../%2e"));
        assert_eq!(at(&format!("/{ID}/files/a/b")), "Files { rest: \"/a/b\" }");
        assert_eq!(at(&format!("/{ID}/conat/")), "Bus { rest: \"/\" }");
        assert_eq!(at(&format!("/{ID}/.cocalc/terminal/a-1")), "Page { rest: \"/terminal/a-1\" }");
        assert_eq!(at(&format!("/{ID}/.cocalc/assets/page.js")), "Page { rest: \"/assets/page.js\" }");
        assert_eq!(base("/healthz"), Some(Target::Own("/healthz")));
        assert_eq!(base("/.cocalc/session"), Some(Target::Own("/.cocalc/session")));
        assert_eq!(base("/conat/?"), Some(Target::Own("/conat/?")));
    }

    #[test]
    fn every_other_spelling_is_nowhere() {
        let upper = ID.to_uppercase();
        for path in [
            String::new(),
            "/".into(),
            "*".into(),
            "/healthz/".into(),
            format!("//{ID}/port/80/"),
            format!("/./{ID}/port/80/"),
            format!("/x/../{ID}/port/80/"),
            format!("/%2e/{ID}/port/80/"),
            format!("/{ID}%2fport/80/"),
            format!("/{ID}%2Fport/80/"),
            format!("/{ID}\\port\\80"),
            format!("/{ID}%5cport/80/"),
            format!("/{ID}x/port/80/"),
            format!("/{ID}//port/80/"),
            format!("/{ID}/./port/80/"),
            format!("/{ID}/port//80/"),
            format!("/{ID}/port/"),
            format!("/{ID}/port/0/"),
            format!("/{ID}/port/080/"),
            format!("/{ID}/port/+80/"),
            format!("/{ID}/port/65536/"),
            format!("/{ID}/port/80@evil/"),
            format!("/{ID}/port/80%2f"),
            format!("/{ID}/port/80\\x"),
            format!("/{ID}/ports/80/"),
            format!("/{ID}/Port/80/"),
            format!("/{ID}/.cocalc/session/"),
            format!("/{ID}/.cocalc"),
            format!("/{ID}/.cocalc/status/"),
            format!("/{ID}/.cocalc/terminal/"),
            format!("/{ID}/.cocalc/terminal/a/b"),
            format!("/{ID}/.cocalc/terminal/%61"),
            format!("/{ID}/.cocalc/assets/.."),
            format!("/{ID}/.cocalc/assets/../status"),
            format!("/{ID}//.cocalc/status"),
            format!("/{}/port/80/", ID.replace('-', "")),
            format!("/{{{ID}}}/port/80/"),
            format!("/{upper}/port/80/"),
            format!("{ID}/port/80/"),
            format!("/{}é/port/80", &ID[..35]),
        ] {
            assert_eq!(base(&path), None, "{path}");
        }
    }

    #[test]
    fn own_origins_have_the_same_paths_without_the_id() {
        let served = served();
        let at = |origin, path| match served.target(origin, path) {
            Some(Target::Project(place)) => {
                assert_eq!((place.project, place.mount), (id(), ""));
                format!("{:?}", place.what)
            }
            other => format!("{other:?}"),
        };
        let project = Origin::Project(id());
        assert_eq!(at(project, "/"), "Root");
        assert_eq!(at(project, "/port/80/x"), "Port { port: 80 }");
        assert_eq!(at(project, "/proxy/80/x"), "Proxy { port: 80, prefix: \"/proxy/80\", rest: \"/x\" }");
        assert_eq!(at(project, "/.cocalc/session"), "Session");
        assert_eq!(at(project, "/.cocalc/status"), "Page { rest: \"/status\" }");
        for nothing in ["/healthz", "/metrics", "/.cocalc/x", "//port/80/", "/index.html"] {
            assert_eq!(at(project, nothing), "None", "{nothing}");
        }
        let port = Origin::Port(id(), 80);
        for anything in ["/", "/healthz", "//x", "/../y", "/conat/", "/.cocalcx"] {
            assert_eq!(at(port, anything), "Port { port: 80 }", "{anything}");
        }
        assert_eq!(at(port, "/.cocalc/session"), "Session");
        // An app's own origin has no project page, and no terminals.
        for nothing in ["/.cocalc/other", "/.cocalc/terminal/1", "/.cocalc/status"] {
            assert_eq!(at(port, nothing), "None", "{nothing}");
        }
    }

    #[test]
    fn a_base_path_precedes_everything_but_probes() {
        let served = Served::new().base_path("/some/prefix").unwrap();
        assert_eq!(served.target(Origin::Base, "/some/prefix/healthz"), Some(Target::Own("/healthz")));
        assert_eq!(served.target(Origin::Base, "/healthz"), Some(Target::Own("/healthz")));
        let path = format!("/some/prefix/{ID}/proxy/80/x");
        let mount = format!("/some/prefix/{ID}");
        let prefix = format!("/some/prefix/{ID}/proxy/80");
        assert_eq!(
            served.target(Origin::Base, &path),
            Some(Target::Project(Place {
                project: id(),
                mount: &mount,
                what: What::Proxy { port: 80, prefix: &prefix, rest: "/x" }
            }))
        );
        assert_eq!(served.target(Origin::Base, &format!("/{ID}/port/80/")), None);
        for bad in ["x", "/", "/x/", "//x", "/../x", "/a%2f"] {
            assert!(Served::new().base_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_checked() {
        for good in
            ["alpha.localhost:7810", "example.com", "localhost", "10.0.0.1:80", "[fe80::1]:80", "[::2]"]
        {
            assert!(Served::new().name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "a..b", "a.", "Alpha", "a:0", "a:x", "a/b", "a b", "[::g]", "http://a"] {
            assert!(Served::new().domain(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_routed_was_spelled_canonically(
            head in "[/a-f0-9%.\\\\-]{0,10}",
            tail in "[/a-z0-9%.\\\\-]{0,30}",
            with_id in any::<bool>(),
        ) {
            let path = if with_id { format!("/{head}{ID}{tail}") } else { format!("/{head}{tail}") };
            if let Some(Target::Project(place)) = base(&path) {
                // Rebuilding the path from its parts gives it back, so no
                // byte of the prefix had a second meaning.
                let mount = format!("/{ID}");
                prop_assert_eq!(place.mount, &mount);
                let rebuilt = match place.what {
                    What::Bare => mount,
                    What::Root => format!("{mount}/"),
                    What::Session => format!("{mount}{SESSION_PATH}"),
                    What::Port { port } => {
                        let prefix = format!("{mount}/port/{port}");
                        let rest = path.strip_prefix(&prefix).unwrap();
                        prop_assert!(rest.is_empty() || rest.starts_with('/'));
                        format!("{prefix}{rest}")
                    }
                    What::Proxy { port, prefix, rest } => {
                        prop_assert_eq!(prefix, format!("{mount}/proxy/{port}"));
                        format!("{prefix}{rest}")
                    }
                    What::Files { rest } => format!("{mount}/files{rest}"),
                    What::Bus { rest } => format!("{mount}/conat{rest}"),
                    What::Page { rest } => format!("{mount}/.cocalc{rest}"),
                };
                prop_assert_eq!(rebuilt, path);
            }
        }

        #[test]
        fn nothing_panics(authority in ".{0,80}", path in ".{0,80}") {
            let served = served();
            if let Some(origin) = served.origin(&authority) {
                let _ = served.target(origin, &path);
            }
            let _ = served.target(Origin::Base, &path);
            let _ = served.target(Origin::Port(id(), 1), &path);
        }
    }
}
