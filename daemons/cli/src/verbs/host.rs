//! `cocalc host …`

use serde_json::json;

use super::project::text;
use crate::{
    api::Api,
    args::{Host, Output},
    failure::Failure,
    output::{items, print},
};

const FENCED: [&str; 5] = ["id", "name", "state", "projects", "fence.last_heard"];
const COLUMNS: [&str; 5] = ["id", "name", "state", "cordoned", "address.url"];

pub(super) fn run(api: &Api, output: Output, verb: Host) -> Result<(), Failure> {
    match verb {
        Host::List => print(output, items(&api.get("/hosts")?, "hosts"), &COLUMNS),
        Host::Show { id } => print(output, &api.get(&format!("/hosts/{id}"))?, &COLUMNS),
        Host::JoinToken { proxy, ttl } => {
            let kind = if proxy { "proxy" } else { "host" };
            let answer = api.post("/join-tokens", &json!({ "kind": kind, "ttl_secs": ttl }))?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => println!("{}", text(&answer, "token")?),
            }
        }
        Host::RotateKey { id, proxy, ttl } => {
            let path = format!("/{}/{id}/rotate-key", kind(proxy));
            let answer = api.post(&path, &json!({ "ttl_secs": ttl }))?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => println!("{}", text(&answer, "token")?),
            }
        }
        Host::Withdraw { id, proxy, force, wait } => {
            let force = if proxy {
                ""
            } else if force {
                "?force=true"
            } else {
                "?force=false"
            };
            let answer = api.post(&format!("/{}/{id}/withdraw{force}", kind(proxy)), &json!({}))?;
            super::receipt::finish(api, output, answer, wait)?;
        }
        Host::Cordon { id } => {
            print(output, &api.post(&format!("/hosts/{id}/cordon"), &json!({}))?, &COLUMNS)
        }
        Host::Fence { id, reason, attest } => {
            let host = api.get(&format!("/hosts/{id}"))?;
            let name = text(&host, "name")?;
            let question = format!(
                "Is {name} dead for good: switched off, or never to run a project again? If it is only cut off, \
                 its projects go on there,\nand what they write is lost when they are restored elsewhere."
            );
            super::confirm(attest, &question, &name, "--attest")?;
            let body = json!({ "reason": reason, "attest": true });
            print(output, &api.post(&format!("/hosts/{id}/fence"), &body)?, &FENCED);
        }
        Host::Unfence { id } => {
            print(output, &api.post(&format!("/hosts/{id}/unfence"), &json!({}))?, &COLUMNS);
        }
        Host::Uncordon { id } => {
            print(output, &api.post(&format!("/hosts/{id}/uncordon"), &json!({}))?, &COLUMNS);
        }
    }
    Ok(())
}

fn kind(proxy: bool) -> &'static str {
    if proxy { "proxies" } else { "hosts" }
}
