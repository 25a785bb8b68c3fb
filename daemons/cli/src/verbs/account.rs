//! `cocalc account …`, `key …`, `keys …` and `collaborator …`

use serde_json::json;

use super::receipt;
use crate::{
    api::Api,
    args::{Account, ApiKey, Collaborator, Identity, Key, Keys, Output, SshCaKind, WaitOptions},
    browser,
    failure::{Failure, While},
    output::{items, print},
};

pub(super) fn run(api: &Api, output: Output, verb: Account) -> Result<(), Failure> {
    match verb {
        Account::Create { name } => {
            let mut account = api.post("/accounts", &json!({ "name": name }))?;
            let id = super::project::text(&account, "id")?;
            let token = api.post(&format!("/accounts/{id}/tokens"), &json!({}))?;
            account["token"] = token["token"].clone();
            print(output, &account, &["id", "name", "token"]);
        }
        Account::List => {
            let answer = api.get("/accounts")?;
            print(output, items(&answer, "accounts"), &["id", "name", "banned", "session_epoch"]);
        }
        Account::SignOut { id, wait } => change(api, output, &format!("/accounts/{id}/sign-out"), wait)?,
        Account::Ban { id, wait } => change(api, output, &format!("/accounts/{id}/ban"), wait)?,
        Account::Unban { id } => {
            let answer = api.post(&format!("/accounts/{id}/unban"), &json!({}))?;
            if output == Output::Json {
                print(output, &answer, &[]);
            }
        }
        Account::ApiKey(verb) => api_key(api, output, verb)?,
        Account::Identity(verb) => identity(api, output, verb)?,
        Account::Password { login, account } => {
            let path = format!("/accounts/{}/password", whose(api, account)?);
            let current = std::env::var("COCALC_CURRENT_PASSWORD").ok();
            let password = crate::profile::password()?;
            let body = json!({ "login": login, "password": password, "current": current });
            api.put(&path, &body)?;
        }
    }
    Ok(())
}

/// The account that is named, or the caller's own.
fn whose(api: &Api, account: Option<String>) -> Result<String, Failure> {
    match account {
        Some(account) => Ok(account),
        None => super::project::text(&api.get("/account")?, "id"),
    }
}

fn api_key(api: &Api, output: Output, verb: ApiKey) -> Result<(), Failure> {
    match verb {
        ApiKey::Create { name, account, projects, verbs, ttl } => {
            let mut body = json!({ "name": name, "ttl_secs": ttl });
            for (field, list) in [("projects", projects), ("verbs", verbs)] {
                if !list.is_empty() {
                    body[field] = list.into();
                }
            }
            let answer = api.post(&format!("/accounts/{}/tokens", whose(api, account)?), &body)?;
            print(output, &answer, &["id", "token", "expires_at"]);
        }
        ApiKey::List { account } => {
            let answer = api.get(&format!("/accounts/{}/tokens", whose(api, account)?))?;
            let columns = ["id", "name", "verbs", "projects", "expires_at"];
            print(output, items(&answer, "tokens"), &columns);
        }
        ApiKey::Revoke { id, account, wait } => {
            let path = format!("/accounts/{}/tokens/{id}", whose(api, account)?);
            if !wait.wait {
                api.delete(&path)?;
                return Ok(());
            }
            let answer = api.delete(&format!("{path}?wait=true&timeout_secs=1"))?;
            super::receipt::finish(api, output, answer, wait)?;
        }
    }
    Ok(())
}

fn identity(api: &Api, output: Output, verb: Identity) -> Result<(), Failure> {
    const COLUMNS: [&str; 5] = ["id", "provider", "issuer", "subject", "created"];
    match verb {
        Identity::List { account } => {
            let answer = api.get(&format!("/accounts/{}/identities", whose(api, account)?))?;
            print(output, items(&answer, "identities"), &COLUMNS);
        }
        Identity::Link { oidc, browser } => {
            // A bad token is found before somebody logs in for nothing.
            let path = format!("/accounts/{}/identities", whose(api, None)?);
            let shown = browser::show_who(api.url(), api, &oidc, true, &browser)?;
            let answer = api.post(&path, &shown)?;
            print(output, items(&answer, "identities"), &COLUMNS);
        }
        Identity::Unlink { id, account } => {
            api.delete(&format!("/accounts/{}/identities/{id}", whose(api, account)?))?;
        }
    }
    Ok(())
}

pub(super) fn keys(api: &Api, output: Output, verb: Keys) -> Result<(), Failure> {
    let (answer, wait) = match verb {
        Keys::List { ssh_ca: true } => {
            let answer = api.get("/ssh-ca")?;
            print(output, items(&answer, "keys"), &["kind", "state", "fingerprint", "since"]);
            return Ok(());
        }
        Keys::List { ssh_ca: false } => {
            let answer = api.get("/keys")?;
            print(output, items(&answer, "keys"), &["kid", "state", "alg", "since", "until"]);
            return Ok(());
        }
        Keys::Rotate { force, ssh_ca: Some(kind), wait } => {
            let kind = match kind {
                SshCaKind::User => "user",
                SshCaKind::Host => "host",
            };
            (api.post(&format!("/ssh-ca/rotate?force={force}"), &json!({ "kind": kind }))?, wait)
        }
        Keys::Withdraw { kid, wait } if kid.starts_with("SHA256:") => {
            (api.post("/ssh-ca/withdraw", &json!({ "fingerprint": kid }))?, wait)
        }
        Keys::Rotate { force, ssh_ca: None, wait } => {
            (api.post(&format!("/keys/rotate?force={force}"), &json!({}))?, wait)
        }
        Keys::Withdraw { kid, wait } => (api.post(&format!("/keys/{kid}/withdraw"), &json!({}))?, wait),
    };
    if output == Output::Table {
        print(output, &answer, &["version", "current"]);
    }
    receipt::finish(api, output, answer, wait)
}

pub(super) fn key(api: &Api, output: Output, verb: Key) -> Result<(), Failure> {
    const COLUMNS: [&str; 4] = ["id", "key", "project_id", "options"];
    match verb {
        Key::Add { file, project } => {
            let text = std::fs::read_to_string(&file).during(format!("cannot read {}", file.display()))?;
            let body = json!({ "key": text.trim(), "project_id": project });
            print(output, &api.post("/ssh-keys", &body)?, &COLUMNS);
        }
        Key::List => print(output, items(&api.get("/ssh-keys")?, "keys"), &COLUMNS),
        Key::Remove { id } => {
            api.delete(&format!("/ssh-keys/{id}"))?;
        }
    }
    Ok(())
}

pub(super) fn collaborator(api: &Api, output: Output, verb: Collaborator) -> Result<(), Failure> {
    match verb {
        Collaborator::Add { project, account, role } => {
            let body = json!({ "account_id": account, "role": role });
            let answer = api.post(&format!("/projects/{project}/members"), &body)?;
            print(output, &answer, &["account_id", "role"]);
        }
        Collaborator::Remove { project, account, wait } => {
            let answer = api.delete(&format!("/projects/{project}/members/{account}"))?;
            receipt::finish(api, output, answer, wait)?;
        }
        Collaborator::List { project } => {
            let answer = api.get(&format!("/projects/{project}/members"))?;
            print(output, items(&answer, "members"), &["account_id", "role"]);
        }
    }
    Ok(())
}

fn change(api: &Api, output: Output, path: &str, wait: WaitOptions) -> Result<(), Failure> {
    let answer = api.post(path, &json!({}))?;
    receipt::finish(api, output, answer, wait)
}
