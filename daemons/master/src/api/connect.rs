//! Tokens and addresses, with which a user connects directly to the host.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use axum::{Json, extract::State};
use cocalc_auth::{
    mint::NewToken,
    token::{LoginTag, Usage},
};
use cocalc_core::{connector::Peer, router::HostAddress};
use cocalc_ids::{Action, ProjectId, Role, Scope, Timestamp};
use cocalc_sqlite::master::{Account, Project};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Body, Id},
    problem::{Answer, Problem},
    view::time,
};
use crate::shared::Shared;

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(connect))
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Connect {
    /// What the token opens, of `http ws files ssh bus`; default: all that is
    /// permitted.
    #[schema(value_type = Option<Vec<String>>)]
    scopes: Option<BTreeSet<Scope>>,
    /// `once` or `multi`, the default.
    #[serde(default, rename = "use")]
    usage: Use,
    /// How long it lives; 1 to 300, default 60.
    ttl_secs: Option<u64>,
    /// The addresses of this port in the project.
    port: Option<u16>,
    /// The origin that may embed the project.
    embed_origin: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Use {
    Once,
    #[default]
    Multi,
}

/// Ways to reach a project.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Way {
    /// The project's own origin; the path form where names cannot be had.
    pub(super) url: String,
    /// The path form, which works everywhere.
    path_url: String,
    /// `user@host:port`
    ssh: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Connected {
    pub(super) token: String,
    expires_at: String,
    /// What the caller is to the project: `owner`, `collaborator` or `viewer`.
    #[schema(value_type = String)]
    role: Role,
    #[serde(flatten)]
    pub(super) ways: Ways,
}

/// Where a project is.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Ways {
    /// Directly at the host.
    pub(super) direct: Way,
    /// Through a proxy, if there is one.
    pub(super) proxy: Option<Way>,
    host_id: String,
    epoch: u64,
}

/// Mints a connect token, and says where to show it.
#[utoipa::path(post, path = "/projects/{id}/connect", tag = "projects", params(("id" = String, Path)),
    request_body = Connect,
    responses((status = 200, body = Connected), (status = "default", body = Problem)))]
async fn connect(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<ProjectId>,
    Body(asked): Body<Connect>,
) -> Answer<Json<Connected>> {
    mint(&shared, &caller, id, asked).await.map(Json)
}

async fn mint(shared: &Shared, caller: &Caller, id: ProjectId, asked: Connect) -> Answer<Connected> {
    let ttl = asked.ttl_secs.unwrap_or(60);
    if !(1..=300).contains(&ttl) {
        return Err(Problem::invalid("ttl_secs: 1 to 300"));
    }
    if asked.port == Some(0) {
        return Err(Problem::invalid("port: 1 to 65535"));
    }
    if let Some(origin) = &asked.embed_origin {
        check_origin(origin)?;
    }
    let (Membership { project, role, account }, ways) = ways(shared, caller, id, asked.port).await?;
    let scopes = permitted(role, asked.scopes)?;
    // What the host would refuse is not promised.
    if let Some(port) = asked.port {
        let app = Action::App { scope: Scope::Http, port };
        if !role.permits_in(&project.viewable_ports, app) {
            return Err(Problem::denied());
        }
    }
    let new = NewToken::new(&shared.issuer, project.host, caller.id, id, project.epoch)
        .scopes(scopes)
        .session_epoch(account.session_epoch)
        .login(caller.key.map(LoginTag::of))
        .acl(project.acl_version)
        .usage(match asked.usage {
            Use::Once => Usage::Once,
            Use::Multi => Usage::Multi,
        })
        .embed_origin(asked.embed_origin)
        .ttl(Duration::from_secs(ttl));
    let minted = shared.signing.mint(&new, shared.now()).map_err(|error| Problem::internal(&error))?;
    let exp = i64::try_from(minted.claims.exp).unwrap_or(i64::MAX);
    Ok(Connected { token: minted.token, expires_at: time(Timestamp::from_secs(exp)), role, ways })
}

/// What the caller is to a project.
pub(super) struct Membership {
    pub(super) project: Project,
    pub(super) role: Role,
    pub(super) account: Account,
}

/// Where a project is, for a caller who is a member.
pub(super) async fn ways(
    shared: &Shared,
    caller: &Caller,
    id: ProjectId,
    port: Option<u16>,
) -> Answer<(Membership, Ways)> {
    let account_id = caller.id;
    let (project, role, account, host, proxies) = shared
        .db(move |store| {
            let project = store.project(id)?;
            let host = store.host(project.host)?;
            Ok((project, store.role(id, account_id)?, store.account(account_id)?, host, store.proxies()?))
        })
        .await?;
    // Hosts decide from members; administering the federation makes nobody one.
    let role = role.ok_or_else(|| match caller.admin {
        true => Problem::denied(),
        false => Problem::not_found("project"),
    })?;
    if !caller.covers(id) {
        return Err(Problem::not_found("project"));
    }
    if host.fenced.is_some() {
        return Err(Problem::unavailable(
            "host_fenced",
            "the project's host is lost: it is there again when its backup has been restored elsewhere, or its \
             host returns",
        ));
    }
    // One that is there, if any is.
    let proxy = proxies.iter().find(|proxy| shared.alive(Peer::Proxy(proxy.id))).or(proxies.first());
    let ways = Ways {
        direct: way(&host.address, id, port),
        proxy: proxy.map(|proxy| way(&proxy.address, id, port)),
        host_id: project.host.to_string(),
        epoch: project.epoch.number(),
    };
    Ok((Membership { project, role, account }, ways))
}

fn permitted(role: Role, asked: Option<BTreeSet<Scope>>) -> Answer<BTreeSet<Scope>> {
    let all: BTreeSet<Scope> = role.scopes().iter().copied().collect();
    match asked {
        None => Ok(all),
        Some(asked) if asked.is_empty() => Err(Problem::invalid("scopes: at least one")),
        Some(asked) if asked.is_subset(&all) => Ok(asked),
        Some(_) => Err(Problem::denied()),
    }
}

fn check_origin(origin: &str) -> Answer<()> {
    let refused = || Problem::invalid("embed_origin: expected scheme://host or scheme://host:port");
    let uri: http::Uri = origin.parse().map_err(|_| refused())?;
    let authority = uri.authority().ok_or_else(refused)?;
    let exact = format!("{}://{authority}", uri.scheme_str().unwrap_or_default());
    let plain = !authority.as_str().contains('@') && origin.len() <= 200;
    if matches!(uri.scheme_str(), Some("http" | "https")) && exact == origin && plain {
        Ok(())
    } else {
        Err(refused())
    }
}

fn way(address: &HostAddress, project: ProjectId, port: Option<u16>) -> Way {
    let path_url = match port {
        Some(port) => format!("{}/{project}/port/{port}/", address.url),
        None => format!("{}/{project}/", address.url),
    };
    let scheme = if address.url.starts_with("https:") { "https" } else { "http" };
    let url = match (address.domain.as_str(), port) {
        ("", _) => path_url.clone(),
        (domain, Some(port)) => format!("{scheme}://{port}--{project}.{domain}/"),
        (domain, None) => format!("{scheme}://{project}.{domain}/"),
    };
    Way { url, path_url, ssh: format!("{project}@{}", address.ssh) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_promised_form() {
        let project: ProjectId = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b".parse().unwrap();
        let mut address = HostAddress {
            url: "https://alpha.example".into(),
            domain: "alpha.apps.example:8443".into(),
            ssh: "alpha.example:2222".into(),
            ..HostAddress::default()
        };
        let plain = way(&address, project, None);
        assert_eq!(plain.url, format!("https://{project}.alpha.apps.example:8443/"));
        assert_eq!(plain.path_url, format!("https://alpha.example/{project}/"));
        assert_eq!(plain.ssh, format!("{project}@alpha.example:2222"));
        let port = way(&address, project, Some(8080));
        assert_eq!(port.url, format!("https://8080--{project}.alpha.apps.example:8443/"));
        assert_eq!(port.path_url, format!("https://alpha.example/{project}/port/8080/"));
        address.domain.clear();
        let nameless = way(&address, project, None);
        assert_eq!(nameless.url, nameless.path_url);
    }

    #[test]
    fn roles_bound_scopes() {
        assert_eq!(permitted(Role::Owner, None).unwrap().len(), Scope::ALL.len());
        assert_eq!(
            permitted(Role::Viewer, None).unwrap(),
            BTreeSet::from([Scope::Http, Scope::Ws, Scope::Files])
        );
        assert!(permitted(Role::Viewer, Some(BTreeSet::from([Scope::Ssh]))).is_err());
        assert!(permitted(Role::Owner, Some(BTreeSet::new())).is_err());
    }

    #[test]
    fn origins_are_exact() {
        for good in ["https://a.example", "http://localhost:3000"] {
            assert!(check_origin(good).is_ok(), "{good}");
        }
        for bad in ["a.example", "https://a.example/", "https://a/x", "ftp://a", "https://u@a", "null", ""] {
            assert!(check_origin(bad).is_err(), "{bad}");
        }
    }
}
