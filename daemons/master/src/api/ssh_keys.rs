//! Public SSH keys.

use std::sync::Arc;

use axum::{Json, extract::State};
use cocalc_auth_ssh::KeyLine;
use cocalc_ids::{Action, KeyId, ProjectId, Scope};
use cocalc_sqlite::master::StoredSshKey;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    caller::Caller,
    input::{Asked, Body, Id, acts},
    problem::{Answer, Problem},
    receipts::Wait,
    view::time,
};
use crate::{bus::streams::Target, receipts::Receipt, shared::Shared};

pub(super) fn routes() -> OpenApiRouter<Arc<Shared>> {
    OpenApiRouter::new().routes(routes!(add, list)).routes(routes!(remove))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewKey {
    /// A line of a public key file or of `authorized_keys`:
    /// `[options] algorithm base64 comment`. A key with an option that is not
    /// honoured is refused.
    key: String,
    /// The only project it opens; default: all of the account's.
    #[schema(value_type = Option<String>)]
    project_id: Option<ProjectId>,
}

#[derive(Serialize, ToSchema)]
struct KeyView {
    id: String,
    key: String,
    /// What its sessions are limited to, as in `authorized_keys`.
    options: String,
    comment: String,
    project_id: Option<String>,
    created: String,
}

impl From<StoredSshKey> for KeyView {
    fn from(key: StoredSshKey) -> Self {
        Self {
            id: key.id.to_string(),
            key: key.key,
            options: key.options,
            comment: key.comment,
            project_id: key.project.map(|id| id.to_string()),
            created: time(key.created),
        }
    }
}

/// A key with its options, as hosts will read them, and its comment.
fn parse_key(line: &str) -> Answer<KeyLine> {
    let parsed = KeyLine::parse(line).map_err(|error| Problem::invalid(format!("key: {error}")))?;
    if acts(&parsed.comment) {
        return Err(Problem::invalid("key: its comment holds characters that are not shown as they are"));
    }
    Ok(parsed)
}

/// Adds a public SSH key to the caller's account.
#[utoipa::path(post, path = "/ssh-keys", tag = "ssh-keys",
    request_body = NewKey,
    responses((status = 201, body = KeyView), (status = "default", body = Problem)))]
async fn add(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Body(new): Body<NewKey>,
) -> Answer<(StatusCode, Json<KeyView>)> {
    let KeyLine { options_text: options, key, comment, .. } = parse_key(new.key.trim())?;
    if let Some(project) = new.project_id {
        caller.project(&shared, project, Some(Action::Use(Scope::Ssh))).await?;
    }
    let id = KeyId::from_random_bytes(caller.new_id("ssh-key"));
    let row = StoredSshKey {
        id,
        account: caller.id,
        project: new.project_id,
        key,
        options,
        comment,
        created: shared.now(),
    };
    let stored = shared.db(move |store| store.add_ssh_key(&row)).await?;
    announce(&shared, &stored).await?;
    Ok((StatusCode::CREATED, Json(stored.into())))
}

async fn announce(shared: &Shared, key: &StoredSshKey) -> Answer<Vec<Target>> {
    Ok(match key.project {
        Some(project) => shared.announce_project(project).await?,
        None => shared.announce_account(key.account).await?,
    })
}

#[derive(Serialize, ToSchema)]
struct Keys {
    keys: Vec<KeyView>,
}

/// Lists the caller's keys.
#[utoipa::path(get, path = "/ssh-keys", tag = "ssh-keys",
    responses((status = 200, body = Keys), (status = "default", body = Problem)))]
async fn list(State(shared): State<Arc<Shared>>, caller: Caller) -> Answer<Json<Keys>> {
    let account = caller.id;
    let keys = shared.db(move |store| store.ssh_keys(account)).await?;
    Ok(Json(Keys { keys: keys.into_iter().map(Into::into).collect() }))
}

#[derive(Serialize, ToSchema)]
struct Removed {
    id: String,
    /// Where it is in force; with `wait`, when it is so everywhere.
    receipt: Option<Receipt>,
}

/// Removes one of the caller's keys.
#[utoipa::path(delete, path = "/ssh-keys/{id}", tag = "ssh-keys", params(("id" = String, Path), Wait),
    responses((status = 200, body = Removed), (status = "default", body = Problem)))]
async fn remove(
    State(shared): State<Arc<Shared>>,
    caller: Caller,
    Id(id): Id<KeyId>,
    Asked(wait): Asked<Wait>,
) -> Answer<Json<Removed>> {
    let account = caller.id;
    let removed = shared.db(move |store| store.remove_ssh_key(account, id)).await?;
    let targets = announce(&shared, &removed).await?;
    let receipt = wait.receipt(&shared, caller.change("key.remove", id), targets).await?;
    Ok(Json(Removed { id: id.to_string(), receipt }))
}

#[cfg(test)]
mod tests {
    use base64::Engine;

    use super::parse_key;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    #[test]
    fn keys_are_split_and_checked() {
        let plain = parse_key(KEY).unwrap();
        assert_eq!((plain.key.as_str(), plain.comment.as_str()), (KEY, ""));
        let named = parse_key(&format!("from=\"10.0.0.0/8\",no-pty {KEY} me at home")).unwrap();
        assert_eq!((named.key.as_str(), named.comment.as_str()), (KEY, "me at home"));
        assert_eq!(named.options_text, "from=\"10.0.0.0/8\",no-pty");
        for bad in [
            "",
            "ssh-ed25519 AAAA",
            &format!("tunnel=\"0\" {KEY}"),
            &format!("unheard-of {KEY}"),
            &format!("{KEY} a\u{202e}b"),
        ] {
            assert!(parse_key(bad).is_err(), "{bad}");
        }
        // Anybody can sign for a point of small order.
        for weak in [[0_u8; 32], std::array::from_fn(|at| u8::from(at == 0))] {
            for algorithm in ["ssh-ed25519", "sk-ssh-ed25519@openssh.com"] {
                let field =
                    |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
                let blob = [field(algorithm.as_bytes()), field(&weak), field(b"ssh:")].concat();
                let line = format!("{algorithm} {}", base64::engine::general_purpose::STANDARD.encode(blob));
                assert!(parse_key(&line).is_err(), "{line}");
            }
        }
    }
}
