//! `cocalc project …`

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{reach, settle};
use crate::{
    api::Api,
    args::{Output, Project},
    failure::{Exit, Failure},
    output::{items, print},
};

const COLUMNS: [&str; 5] = ["id", "name", "state", "host_id", "epoch"];

pub(super) fn run(api: &Api, output: Output, verb: Project) -> Result<ExitCode, Failure> {
    match verb {
        Project::Create { name, host, image, start } => {
            let mut body = json!({ "name": name });
            if let Some(host) = host {
                body["host"] = host.into();
            }
            if let Some(image) = image {
                body["image"] = image.into();
            }
            let answer = api.post("/projects", &body)?;
            let id = text(&answer["project"], "id")?;
            settle(api, &answer)?;
            if start {
                settle(api, &api.post(&format!("/projects/{id}/start"), &json!({}))?)?;
            }
            print(output, &api.get(&format!("/projects/{id}"))?, &COLUMNS);
        }
        Project::List => print(output, items(&api.get("/projects")?, "projects"), &COLUMNS),
        Project::Show { id } => print(output, &api.get(&format!("/projects/{id}"))?, &COLUMNS),
        Project::Start { id } => act(api, output, &id, "start", &json!({}))?,
        Project::Stop { id } => act(api, output, &id, "stop", &json!({}))?,
        Project::Move { id, to } => act(api, output, &id, "move", &json!({ "to": to }))?,
        Project::Delete { id } => {
            let answer = api.delete(&format!("/projects/{id}"))?;
            settle(api, &answer)?;
            if output == Output::Json {
                print(output, &answer, &[]);
            }
        }
        Project::Access { id, viewable_ports, grace, proxy_ssh, wait } => {
            let path = format!("/projects/{id}/access");
            let body = access(viewable_ports, grace, proxy_ssh)?;
            let columns = ["viewable_ports", "grace_secs", "proxy_ssh"];
            if body == json!({}) {
                print(output, &api.get(&path)?, &columns);
            } else {
                let answer = api.patch(&path, &body)?;
                if output == Output::Table {
                    print(output, &answer, &columns);
                }
                super::receipt::finish(api, output, answer, wait)?;
            }
        }
        Project::Why { id } => print(output, &api.get(&format!("/projects/{id}/why"))?, &["state", "reason"]),
        Project::Token { id, scopes, ttl, once } => {
            let mut body = json!({});
            if !scopes.is_empty() {
                body["scopes"] = scopes.into();
            }
            if let Some(ttl) = ttl {
                body["ttl_secs"] = ttl.into();
            }
            if once {
                body["use"] = "once".into();
            }
            let answer = api.post(&format!("/projects/{id}/connect"), &body)?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => println!("{}", text(&answer, "token")?),
            }
        }
        Project::Open { id, port, via_proxy } => {
            let mut body = json!({ "scopes": ["http", "ws", "files"], "use": "once" });
            if let Some(port) = port {
                body["port"] = port.into();
            }
            let answer = api.post(&format!("/projects/{id}/connect"), &body)?;
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => println!("{}", reach::browser_url(&answer, via_proxy)?),
            }
        }
        Project::Exec { id, via_proxy, command } => return reach::exec(api, &id, via_proxy, command),
        Project::Ssh { id, via_proxy, command } => return reach::ssh(api, &id, via_proxy, &command),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be changed of how a project may be reached.
fn access(
    ports: Option<Vec<String>>,
    grace: Option<String>,
    proxy_ssh: Option<bool>,
) -> Result<Value, Failure> {
    let usage = |what: String| Failure::new(Exit::Usage, what);
    let mut body = json!({});
    if let Some(ports) = ports {
        let ports: Vec<u16> = match ports.as_slice() {
            [none] if none == "none" => Vec::new(),
            ports => ports
                .iter()
                .map(|port| port.parse().map_err(|_| usage(format!("--viewable-ports: {port:?} is no port"))))
                .collect::<Result<_, _>>()?,
        };
        body["viewable_ports"] = ports.into();
    }
    match grace.as_deref() {
        None => {}
        Some("default") => body["grace_secs"] = Value::Null,
        Some(secs) => {
            let secs: u64 = secs.parse().map_err(|_| usage(format!("--grace: {secs:?} are no seconds")))?;
            body["grace_secs"] = secs.into();
        }
    }
    if let Some(proxy_ssh) = proxy_ssh {
        body["proxy_ssh"] = proxy_ssh.into();
    }
    Ok(body)
}

/// Starts an operation on a project, waits for it and shows the project.
fn act(api: &Api, output: Output, id: &str, action: &str, body: &Value) -> Result<(), Failure> {
    let answer = api.post(&format!("/projects/{id}/{action}"), body)?;
    settle(api, &answer)?;
    print(output, &api.get(&format!("/projects/{id}"))?, &COLUMNS);
    Ok(())
}

/// A text field that the API promises.
pub(super) fn text(value: &Value, key: &str) -> Result<String, Failure> {
    value[key]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::failed(format!("the master's answer has no {key:?}")))
}
