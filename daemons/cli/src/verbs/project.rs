//! `cocalc project …`

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{reach, settle, size};
use crate::{
    api::Api,
    args::{Output, Project},
    failure::{Exit, Failure},
    output::{items, print},
};

const COLUMNS: [&str; 5] = ["id", "name", "state", "host_id", "epoch"];

/// Projects as people see them: one that is stopped and whose last changes are
/// in no backup yet says so.
fn shown(output: Output, mut projects: Value) -> Value {
    let mark = |project: &mut Value| {
        if project["state"] == "stopped" && project["backup"]["pending"] == true {
            project["state"] = "stopped (backup pending)".into();
        }
    };
    match &mut projects {
        Value::Array(list) if output == Output::Table => list.iter_mut().for_each(mark),
        one if output == Output::Table => mark(one),
        _ => {}
    }
    projects
}

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
            print(output, &shown(output, api.get(&format!("/projects/{id}"))?), &COLUMNS);
        }
        Project::List => {
            print(output, &shown(output, items(&api.get("/projects")?, "projects").clone()), &COLUMNS)
        }
        Project::Show { id } => print(output, &shown(output, api.get(&format!("/projects/{id}"))?), &COLUMNS),
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
        Project::Access { id, viewable_ports, grace, proxy_ssh, authorized_keys, wait } => {
            let path = format!("/projects/{id}/access");
            let body = access(viewable_ports, grace, proxy_ssh, authorized_keys)?;
            let columns = ["viewable_ports", "grace_secs", "proxy_ssh", "authorized_keys"];
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
        Project::Copy { source, destination, snapshot, replace } => {
            let (from, from_path) = place(&source)?;
            let (to, mut to_path) = place(&destination)?;
            if to_path.is_empty() || destination.ends_with('/') {
                let name = from_path.rsplit('/').next().unwrap_or_default();
                to_path = if to_path.is_empty() { name.to_owned() } else { format!("{to_path}/{name}") };
            }
            let mut body = json!({
                "from_project": from, "from_path": from_path, "to_path": to_path, "replace": replace,
            });
            if let Some(snapshot) = snapshot {
                body["from_snapshot"] = snapshot.into();
            }
            let done = settle(api, &api.post(&format!("/projects/{to}/copy"), &body)?)?;
            if output == Output::Json {
                print(output, &done, &[]);
            }
        }
        Project::Clone { id, name, snapshot } => {
            let mut body = json!({});
            if let Some(name) = name {
                body["name"] = name.into();
            }
            if let Some(snapshot) = snapshot {
                body["snapshot"] = snapshot.into();
            }
            let answer = api.post(&format!("/projects/{id}/clone"), &body)?;
            let id = text(&answer["project"], "id")?;
            settle(api, &answer)?;
            print(output, &shown(output, api.get(&format!("/projects/{id}"))?), &COLUMNS);
        }
        Project::Usage { id, du } => {
            let usage = api.get(&format!("/projects/{id}/usage?du={du}"))?;
            match output {
                Output::Json => print(output, &usage, &[]),
                Output::Table => print(output, &readable(usage), &USAGE[..if du { 7 } else { 4 }]),
            }
        }
        Project::Exec { id, via_proxy, command } => return reach::exec(api, &id, via_proxy, command),
        Project::SshCertificate {
            id,
            file,
            ttl,
            source_address,
            force_command,
            no_pty,
            no_port_forwarding,
        } => {
            let body = json!({
                "ttl_secs": ttl,
                "source_address": source_address,
                "force_command": force_command,
                "permit_pty": !no_pty,
                "permit_port_forwarding": !no_port_forwarding,
            });
            super::certificate::write(api, output, &id, &file, body)?;
        }
        Project::Ssh { id, via_proxy, command } => return reach::ssh(api, &id, via_proxy, &command),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be changed of how a project may be reached.
fn access(
    ports: Option<Vec<String>>,
    grace: Option<String>,
    proxy_ssh: Option<bool>,
    authorized_keys: Option<bool>,
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
    if let Some(authorized_keys) = authorized_keys {
        body["authorized_keys"] = authorized_keys.into();
    }
    Ok(body)
}

const USAGE: [&str; 7] = ["charged", "limit", "plan", "allowance", "du.total", "du.exclusive", "du.shared"];

/// What a project takes, in units for people; a notice goes to standard error.
fn readable(usage: Value) -> Value {
    if let Some(notice) = usage["notice"].as_str() {
        let tame: String = notice.chars().filter(|c| !c.is_control()).collect();
        eprintln!("cocalc: {tame}");
    }
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "none".to_owned(), size);
    json!({
        "charged": bytes(&usage["charged_bytes"]),
        "limit": bytes(&usage["limit_bytes"]),
        "plan": bytes(&usage["plan_bytes"]),
        "allowance": bytes(&usage["allowance_bytes"]),
        "du": {
            "total": bytes(&usage["du"]["total_bytes"]),
            "exclusive": bytes(&usage["du"]["exclusive_bytes"]),
            "shared": bytes(&usage["du"]["shared_bytes"]),
        },
    })
}

/// `ID:PATH`, the path without a slash at either end.
fn place(text: &str) -> Result<(&str, String), Failure> {
    let wrong = || Failure::new(Exit::Usage, format!("{text:?} is not ID:PATH, for instance …:home/data"));
    let (id, path) = text.split_once(':').ok_or_else(wrong)?;
    if id.is_empty() {
        return Err(wrong());
    }
    Ok((id, path.trim_matches('/').to_owned()))
}

/// Starts an operation on a project, waits for it and shows the project.
fn act(api: &Api, output: Output, id: &str, action: &str, body: &Value) -> Result<(), Failure> {
    let answer = api.post(&format!("/projects/{id}/{action}"), body)?;
    settle(api, &answer)?;
    print(output, &shown(output, api.get(&format!("/projects/{id}"))?), &COLUMNS);
    Ok(())
}

/// A text field that the API promises.
pub(super) fn text(value: &Value, key: &str) -> Result<String, Failure> {
    value[key]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::failed(format!("the master's answer has no {key:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_project_and_a_path() {
        assert_eq!(place("p:home/a:b").unwrap(), ("p", "home/a:b".to_owned()));
        assert_eq!(place("p:/home/").unwrap(), ("p", "home".to_owned()));
        assert!(place("home/a").is_err() && place(":home").is_err());
    }
}
