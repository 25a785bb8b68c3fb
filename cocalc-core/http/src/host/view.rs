//! A request as the user sees it, also when it came through a proxy.

use std::net::IpAddr;

use cocalc_core::ids::ProjectId;
use http::{Method, StatusCode, header, request::Parts};

use super::{Asked, Inner};
use crate::{
    credential::Shown,
    headers::{self, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PREFIX, X_FORWARDED_PROTO},
    path::{Origin, Served},
    problem::Problem,
    server::Client,
    websocket::Wish,
    wire,
};

/// Where the user is, and how they call this place.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// What the address bar shows, in lower case.
    pub(super) authority: String,
    pub(super) https: bool,
    /// What a proxy took off the front of the path.
    pub(super) prefix: String,
    pub(super) source: Option<IpAddr>,
    /// Whether a proxy is in between, which follows moves by itself.
    pub(super) proxied: bool,
}

/// The names that proxies use on their own connections to a host, whatever
/// names the host has.
pub(super) fn internal() -> Served {
    // A constant that is a valid name; were it not, proxies would get 421.
    Served::new().domain(wire::INTERNAL_DOMAIN).unwrap_or_default()
}

impl Inner {
    /// What origin is asked for, and what the user sees.
    pub(super) fn view(
        &self,
        parts: &Parts,
        authority: String,
        client: Client,
    ) -> Result<(&Served, Origin, View), Problem> {
        if client.trusted
            && let Some(origin) = self.internal.origin(&authority)
        {
            return Ok((&self.internal, origin, forwarded(parts)?));
        }
        let Some(origin) = self.served.origin(&authority) else {
            return Err(unknown_host());
        };
        let mut view = View {
            authority,
            https: self.https,
            prefix: String::new(),
            source: client.address,
            proxied: false,
        };
        if client.trusted {
            // A front of the embedder's own, which passes the name on.
            let headers = &parts.headers;
            match headers::single(headers, &X_FORWARDED_PROTO) {
                Some("https") => view.https = true,
                Some("http") => view.https = false,
                _ => {}
            }
            let source = headers::single(headers, &X_FORWARDED_FOR).and_then(|source| source.parse().ok());
            view.source = source.or(view.source);
        }
        Ok((&self.served, origin, view))
    }

    /// Refuses what a page of another site makes a browser do in the user's
    /// name: WebSockets, and requests that change something.
    pub(super) fn check_origin(&self, asked: &Asked<'_>, shown: &Shown) -> Result<(), Problem> {
        let ambient = matches!(shown, Shown::Cookies(_));
        let websocket = asked.wish == Wish::WebSocket;
        let safe = matches!(asked.parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        if !websocket && (safe || !ambient) {
            return Ok(());
        }
        let mut origins = asked.parts.headers.get_all(header::ORIGIN).iter();
        let allowed = match (origins.next(), origins.next()) {
            // Browsers send it with every WebSocket and every unsafe request.
            (None, _) => !websocket || !ambient,
            (Some(origin), None) => {
                origin.to_str().is_ok_and(|origin| same_project(origin, &asked.view, asked.origin))
            }
            (Some(_), Some(_)) => false,
        };
        if allowed {
            return Ok(());
        }
        tracing::info!(project = %asked.place.project, "refused a request from another origin");
        Err(Problem::new(StatusCode::FORBIDDEN, "origin_refused", "Pages of other sites may not do this."))
    }
}

pub(crate) fn unknown_host() -> Problem {
    Problem::new(StatusCode::MISDIRECTED_REQUEST, "unknown_host", "This name is not served here.")
}

/// What an authenticated proxy says of the user.
fn forwarded(parts: &Parts) -> Result<View, Problem> {
    let bad = || Problem::bad_request("The proxy did not say for whom it asks.");
    let headers = &parts.headers;
    let authority = headers::single(headers, &X_FORWARDED_HOST).ok_or_else(bad)?.to_ascii_lowercase();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b);
    if authority.is_empty() || !authority.bytes().all(plain) {
        return Err(bad());
    }
    let https = match headers::single(headers, &X_FORWARDED_PROTO) {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(bad()),
    };
    let prefix = headers::single(headers, &X_FORWARDED_PREFIX).unwrap_or_default();
    // The same check as for a base path of our own.
    let prefix = Served::new().base_path(prefix).map_err(|_| bad())?.base().to_owned();
    let source = headers::single(headers, &X_FORWARDED_FOR).and_then(|source| source.parse().ok());
    Ok(View { authority, https, prefix, source, proxied: true })
}

/// Whether `origin` (an `Origin` field) belongs to the project as the user sees
/// it: the very origin of the request, or another own origin of the project.
fn same_project(origin: &str, view: &View, asked: Origin) -> bool {
    let scheme = if view.https { "https://" } else { "http://" };
    let Some(authority) = origin.strip_prefix(scheme) else { return false };
    let (authority, here) = (without_port(authority, view.https), without_port(&view.authority, view.https));
    if authority.eq_ignore_ascii_case(here) {
        return true;
    }
    let project = match asked {
        Origin::Base => return false,
        Origin::Project(project) | Origin::Port(project, _) => project,
    };
    let (Some((label, domain)), Some((_, here))) = (authority.split_once('.'), here.split_once('.')) else {
        return false;
    };
    let id = label.split_once("--").map_or(label, |(_, id)| id);
    domain.eq_ignore_ascii_case(here) && id.parse::<ProjectId>() == Ok(project)
}

pub(super) fn without_port(authority: &str, https: bool) -> &str {
    authority.strip_suffix(if https { ":443" } else { ":80" }).unwrap_or(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_of_one_project_trust_each_other() {
        let id: ProjectId = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b".parse().unwrap();
        let other = ProjectId::random();
        let view = |authority: &str, https| View {
            authority: authority.to_owned(),
            https,
            prefix: String::new(),
            source: None,
            proxied: false,
        };
        let own = view(&format!("{id}.a.localhost:7810"), false);
        let here = Origin::Project(id);
        for good in [
            format!("http://{id}.a.localhost:7810"),
            format!("http://80--{id}.a.localhost:7810"),
            format!("http://{id}.A.localhost:7810"),
        ] {
            assert!(same_project(&good, &own, here), "{good}");
        }
        for bad in [
            "null".to_owned(),
            String::new(),
            format!("https://{id}.a.localhost:7810"),
            format!("http://{id}.a.localhost"),
            format!("http://{other}.a.localhost:7810"),
            format!("http://{id}.b.localhost:7810"),
            "http://a.localhost:7810".to_owned(),
            format!("http://{id}.a.localhost:7810.evil.example"),
            format!("http://x.{id}.a.localhost:7810"),
        ] {
            assert!(!same_project(&bad, &own, here), "{bad}");
        }
        let base = view("host.example.com", true);
        assert!(same_project("https://host.example.com", &base, Origin::Base));
        assert!(same_project("https://host.example.com:443", &base, Origin::Base));
        assert!(!same_project(&format!("https://{id}.example.com"), &base, Origin::Base));
    }
}
