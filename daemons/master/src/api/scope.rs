//! What a scoped API key may call.

use cocalc_ids::ProjectId;
use cocalc_sqlite::master::{KeyLimits, Verb};
use http::Method;

use super::problem::Problem;

/// The verb that a call takes; `None`: no scoped key may call it. `route` is the
/// path as it is declared, with its parameters named. What is not listed is
/// refused, so that a new call is not open to old keys by oversight.
pub(super) fn verb_of(method: &Method, route: &str) -> Option<Verb> {
    let route = route.strip_prefix("/api/v1").unwrap_or(route);
    let rest = route.strip_prefix("/projects/{id}");
    match (method.as_str(), route, rest) {
        (_, "/ssh-keys" | "/ssh-keys/{id}", _) => Some(Verb::Account),
        (_, _, Some("/backups/escrow" | "/backups/erase")) => None,
        ("GET", _, Some(_)) => Some(Verb::Read),
        ("GET", "/account" | "/projects" | "/proxies" | "/images", _) => Some(Verb::Read),
        ("GET", _, None)
            if ["/operations", "/hosts", "/receipts/"].iter().any(|start| route.starts_with(start)) =>
        {
            Some(Verb::Read)
        }
        ("POST", "/projects", _) => Some(Verb::Create),
        ("POST", _, Some("/connect" | "/ssh-certificate")) => Some(Verb::Connect),
        ("POST", _, Some("/start" | "/stop" | "/move" | "/keep")) => Some(Verb::Operate),
        ("POST", "/operations/{id}/cancel", _) => Some(Verb::Operate),
        ("POST" | "DELETE", _, Some(rest)) if rest.starts_with("/snapshots") => Some(Verb::Operate),
        ("POST", _, Some("/backups")) => Some(Verb::Operate),
        ("DELETE", _, Some("")) => Some(Verb::Manage),
        ("POST" | "DELETE", _, Some(rest)) if rest.starts_with("/members") => Some(Verb::Manage),
        ("PATCH", _, Some("/access" | "/idle")) => Some(Verb::Manage),
        ("PUT", _, Some("/limits" | "/isolation" | "/image")) => Some(Verb::Manage),
        ("POST", _, Some("/apps/{name}/restart")) => Some(Verb::Operate),
        ("PUT" | "DELETE", _, Some("/env/{name}" | "/secrets/{name}")) => Some(Verb::Manage),
        _ => None,
    }
}

/// Whether a scoped key may make this call; what it may not see does not exist.
pub(super) fn check(limits: &KeyLimits, method: &Method, route: &str, path: &str) -> Result<(), Problem> {
    let allowed = verb_of(method, route).is_some_and(|verb| limits.verbs.contains(&verb));
    if !allowed {
        return Err(Problem::new(
            http::StatusCode::FORBIDDEN,
            "access_denied",
            "this API key may not do that",
        ));
    }
    match project_of(path) {
        Some(project) if !covers(limits, project) => Err(Problem::not_found("project")),
        _ => Ok(()),
    }
}

/// Whether the key is good for this project.
pub(super) fn covers(limits: &KeyLimits, project: ProjectId) -> bool {
    limits.projects.as_ref().is_none_or(|projects| projects.contains(&project))
}

fn project_of(path: &str) -> Option<ProjectId> {
    let (_, rest) = path.split_once("/projects/")?;
    rest.split('/').next()?.parse().ok()
}

/// Limits that make sense.
pub(super) fn validate(limits: &KeyLimits) -> Result<(), Problem> {
    if limits.verbs.is_empty() {
        return Err(Problem::invalid(
            "verbs: at least one of read, connect, operate, manage, create, account",
        ));
    }
    let Some(projects) = &limits.projects else { return Ok(()) };
    if projects.is_empty() || projects.len() > 100 {
        return Err(Problem::invalid("projects: 1 to 100 of them, or none at all for any"));
    }
    if limits.verbs.contains(&Verb::Create) || limits.verbs.contains(&Verb::Account) {
        return Err(Problem::invalid(
            "verbs: create and account are not about projects that exist; leave projects out",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_refused() {
        for (method, route, verb) in [
            (Method::GET, "/api/v1/projects/{id}/why", Some(Verb::Read)),
            (Method::POST, "/api/v1/projects/{id}/connect", Some(Verb::Connect)),
            (Method::POST, "/api/v1/projects/{id}/ssh-certificate", Some(Verb::Connect)),
            (Method::POST, "/api/v1/ssh-ca/rotate", None),
            (Method::DELETE, "/api/v1/projects/{id}", Some(Verb::Manage)),
            (Method::DELETE, "/api/v1/projects/{id}/snapshots/{name}", Some(Verb::Operate)),
            (Method::POST, "/api/v1/projects/{id}/members", Some(Verb::Manage)),
            (Method::POST, "/api/v1/projects/{id}/something-new", None),
            (Method::POST, "/api/v1/projects/{id}/backups", Some(Verb::Operate)),
            (Method::GET, "/api/v1/projects/{id}/backups/escrow", None),
            (Method::DELETE, "/api/v1/projects/{id}/backups/{backup}", None),
            (Method::PATCH, "/api/v1/projects/{id}", None),
            (Method::POST, "/api/v1/accounts/{id}/tokens", None),
            (Method::GET, "/api/v1/accounts/{id}/tokens", None),
            (Method::POST, "/api/v1/accounts/{id}/sign-out", None),
            (Method::POST, "/api/v1/keys/rotate", None),
            (Method::POST, "/api/v1/join-tokens", None),
            (Method::POST, "/api/v1/hosts/{id}/withdraw", None),
        ] {
            assert_eq!(verb_of(&method, route), verb, "{method} {route}");
        }
    }
}
