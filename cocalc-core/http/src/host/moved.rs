//! What a host answers for a project that has moved away.

use cocalc_core::{
    ids::ProjectId,
    router::{HostAddress, Route},
};
use http::{Method, StatusCode};

use super::{Asked, session::question};
use crate::{
    path::Origin,
    problem::{Problem, wants_page},
    wire,
};

/// Says where the project is now: browsers are sent there, programs and
/// proxies are told.
pub(super) fn problem(asked: &Asked<'_>, route: &Route, address: &HostAddress) -> Problem {
    let location = location(asked, route.project, address);
    let page = wants_page(&asked.parts.headers) && matches!(asked.parts.method, Method::GET | Method::HEAD);
    let status = if page && !asked.view.proxied {
        StatusCode::TEMPORARY_REDIRECT
    } else {
        StatusCode::MISDIRECTED_REQUEST
    };
    let mut problem = Problem::new(status, wire::PROJECT_MOVED, "The project is on another host now.")
        .header(wire::HOST_HEADER, route.host.to_string())
        .header(wire::EPOCH_HEADER, route.epoch.to_string());
    if status == StatusCode::TEMPORARY_REDIRECT {
        problem =
            problem.header("location", location.clone()).header("referrer-policy", "no-referrer".into());
    }
    problem.location = Some(location);
    problem
}

/// The same place at the new host, in the same form if it has names.
fn location(asked: &Asked<'_>, project: ProjectId, address: &HostAddress) -> String {
    let scheme = if address.url.starts_with("https://") { "https" } else { "http" };
    let path = asked.parts.uri.path();
    let query = question(&asked.parts.uri);
    match asked.origin {
        Origin::Project(_) if !address.domain.is_empty() => {
            format!("{scheme}://{project}.{}{path}{query}", address.domain)
        }
        Origin::Port(_, port) if !address.domain.is_empty() => {
            format!("{scheme}://{port}--{project}.{}{path}{query}", address.domain)
        }
        Origin::Port(_, port) => format!("{}/{project}/proxy/{port}{path}{query}", address.url),
        Origin::Project(_) | Origin::Base => {
            let rest = path.get(asked.place.mount.len()..).unwrap_or("/");
            format!("{}/{project}{rest}{query}", address.url)
        }
    }
}
