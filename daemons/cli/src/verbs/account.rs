//! `cocalc account …`, `key …`, `keys …` and `collaborator …`

use serde_json::{Value, json};

use crate::{
    api::Api,
    args::{Account, Collaborator, Key, Keys, Output},
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
        Account::Unban { id } => change(api, output, &format!("/accounts/{id}/unban"), false)?,
    }
    Ok(())
}

pub(super) fn keys(api: &Api, output: Output, verb: Keys) -> Result<(), Failure> {
    let answer = match verb {
        Keys::Rotate => api.post("/keys/rotate", &json!({}))?,
        Keys::Withdraw { kid } => api.post(&format!("/keys/{kid}/withdraw"), &json!({}))?,
    };
    print(output, &answer, &["version", "current"]);
    Ok(())
}

pub(super) fn key(api: &Api, output: Output, verb: Key) -> Result<(), Failure> {
    const COLUMNS: [&str; 3] = ["id", "key", "project_id"];
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
            let answer = api.delete(&format!("/projects/{project}/members/{account}?wait={wait}"))?;
            receipt(output, &answer);
        }
        Collaborator::List { project } => {
            let answer = api.get(&format!("/projects/{project}/members"))?;
            print(output, items(&answer, "members"), &["account_id", "role"]);
        }
    }
    Ok(())
}

fn change(api: &Api, output: Output, path: &str, wait: bool) -> Result<(), Failure> {
    let answer = api.post(&format!("{path}?wait={wait}"), &json!({}))?;
    receipt(output, &answer);
    Ok(())
}

/// Who acknowledged a revocation, if it was waited for.
fn receipt(output: Output, answer: &Value) {
    match answer.get("receipt").filter(|receipt| !receipt.is_null()) {
        Some(receipt) if output == Output::Table => {
            print(output, items(receipt, "peers"), &["peer", "outcome", "millis"]);
        }
        _ if output == Output::Json => print(output, answer, &[]),
        _ => {}
    }
}
