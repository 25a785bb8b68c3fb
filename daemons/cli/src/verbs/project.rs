//! `cocalc project …`

use std::{
    io::{Read, Write},
    process::ExitCode,
    time::Duration,
};

use serde_json::{Value, json};

use super::{reach, settle, size};
use crate::{
    api::{Api, encoded},
    args::{Output, Project, Variable},
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
        Project::Start { id } => {
            act(api, output, &id, "start", &json!({}))?;
            receipt(api, output, &id)?;
        }
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
        Project::Limits(asked) => super::limits::limits(api, output, &asked)?,
        Project::Isolation(asked) => super::limits::isolation(api, output, &asked)?,
        Project::Why { id } => print(output, &api.get(&format!("/projects/{id}/why"))?, &["state", "reason"]),
        Project::Apps { id, restart: None } => {
            let answer = api.get(&format!("/projects/{id}/apps"))?;
            if let Some(complaint) = answer["complaint"].as_str() {
                eprintln!("cocalc: {}", tame(complaint));
            }
            let columns = ["name", "state", "port", "starts", "viewable", "command"];
            match output {
                Output::Json => print(output, &answer, &[]),
                Output::Table => print(output, items(&answer, "apps"), &columns),
            }
        }
        Project::Apps { id, restart: Some(name) } => {
            api.post(&format!("/projects/{id}/apps/{}/restart", encoded(&name)), &json!({}))?;
        }
        Project::Logs { id, app: Some(app), follow, lines: _ } => {
            let path = format!("/projects/{id}/apps/{}/logs", encoded(&app));
            follow_app(api, output, &path, follow)?;
        }
        Project::Logs { id, app: None, follow, lines } => {
            follow_logs(api, output, &format!("/projects/{id}/logs?lines={lines}"), follow)?;
        }
        Project::Stats { id } => {
            let stats = api.get(&format!("/projects/{id}/stats"))?;
            let columns = ["running", "cpu", "memory", "pids", "read", "written", "received", "sent", "disk"];
            match output {
                Output::Json => print(output, &stats, &[]),
                Output::Table => print(output, &readable_stats(&stats), &columns),
            }
        }
        Project::Env(verb) => variable(api, output, "env", verb)?,
        Project::Secret(verb) => variable(api, output, "secrets", verb)?,
        Project::Alias { id, name, remove: _ } => {
            let project = api.put(&format!("/projects/{id}/alias"), &json!({ "alias": name }))?;
            print(output, &project, &["id", "name", "alias"]);
        }
        Project::Keep { id, time } => {
            let secs = seconds(&time).ok_or_else(|| not_a_time("--for", &time))?;
            let answer = api.post(&format!("/projects/{id}/keep"), &json!({ "for_secs": secs }))?;
            print(output, &answer, &["keep_until"]);
        }
        Project::Idle { id, timeout, plan } => {
            let path = format!("/projects/{id}/idle");
            let mut body = json!({});
            for (name, option, text) in
                [("timeout_secs", "--timeout", timeout), ("plan_secs", "--plan", plan)]
            {
                let Some(text) = text else { continue };
                body[name] = match text.as_str() {
                    "default" => Value::Null,
                    "never" => 0.into(),
                    text => seconds(text).ok_or_else(|| not_a_time(option, text))?.into(),
                };
            }
            let answer = if body == json!({}) { api.get(&path)? } else { api.patch(&path, &body)? };
            print(output, &answer, &["timeout_secs", "plan_secs", "keep_until"]);
        }
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
        Project::Image { id, set: None, .. } => {
            print(output, &api.get(&format!("/projects/{id}"))?, &["id", "name", "state", "image"]);
        }
        Project::Image { id, set: Some(image), restart } => {
            let body = json!({ "image": image, "restart": restart });
            settle(api, &api.put(&format!("/projects/{id}/image"), &body)?)?;
            print(output, &api.get(&format!("/projects/{id}"))?, &["id", "name", "state", "image"]);
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

/// Sets, removes or lists variables or secrets.
fn variable(api: &Api, output: Output, kind: &str, verb: Variable) -> Result<(), Failure> {
    let changes = !matches!(verb, Variable::List { .. });
    let answer = match verb {
        Variable::Set { id, name, value } => {
            let value = match value {
                Some(value) => value,
                None => {
                    let mut text = String::new();
                    std::io::stdin()
                        .take(1 << 20)
                        .read_to_string(&mut text)
                        .map_err(|e| Failure::failed(format!("cannot read standard input: {e}")))?;
                    text
                }
            };
            api.put(&format!("/projects/{id}/{kind}/{}", encoded(&name)), &json!({ "value": value }))?
        }
        Variable::Unset { id, name } => api.delete(&format!("/projects/{id}/{kind}/{}", encoded(&name)))?,
        Variable::List { id } => api.get(&format!("/projects/{id}/{kind}"))?,
    };
    if changes && kind == "env" {
        eprintln!("the project has it so from its next start; what runs keeps the environment it has");
    }
    match (output, answer["env"].as_object()) {
        (Output::Table, Some(env)) => {
            for (name, value) in env {
                println!("{name}={}", tame(value.as_str().unwrap_or_default()));
            }
        }
        (Output::Table, None) => print(output, items(&answer, "secrets"), &["name", "updated"]),
        (Output::Json, _) => print(output, &answer, &[]),
    }
    Ok(())
}

/// Text of a project, as it may be shown in a terminal.
fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n' || *c == '\t').collect()
}

/// How often it is looked for more of a log.
const LOG_EVERY: Duration = Duration::from_millis(500);

fn show(output: Output, text: &str) {
    match output {
        Output::Table => print!("{}", tame(text)),
        Output::Json if text.is_empty() => {}
        Output::Json => println!("{}", json!({ "text": text })),
    }
    let _ = std::io::stdout().flush();
}

fn follow_app(api: &Api, output: Output, path: &str, follow: bool) -> Result<(), Failure> {
    let mut offset = 0;
    loop {
        let piece = api.get(&format!("{path}?offset={offset}"))?;
        let next = piece["next"].as_u64().unwrap_or(offset);
        show(output, piece["text"].as_str().unwrap_or_default());
        // A piece that is not the last is followed by the next at once.
        if next == offset {
            if !follow {
                return Ok(());
            }
            std::thread::sleep(LOG_EVERY);
        }
        offset = next;
    }
}

fn follow_logs(api: &Api, output: Output, path: &str, follow: bool) -> Result<(), Failure> {
    let mut before = String::new();
    loop {
        let answer = api.get(path)?;
        let now = answer["text"].as_str().unwrap_or_default();
        show(output, news(&before, now));
        if !follow {
            return Ok(());
        }
        now.clone_into(&mut before);
        std::thread::sleep(LOG_EVERY);
    }
}

/// What of a log's last lines comes after those that were there before.
fn news<'a>(before: &str, now: &'a str) -> &'a str {
    let lines: Vec<&str> = before.split_inclusive('\n').collect();
    let overlaps = (0..lines.len()).map(|from| lines[from..].concat());
    let known = overlaps.into_iter().find(|tail| now.starts_with(tail.as_str()));
    known.map_or(now, |tail| &now[tail.len()..])
}

/// What a project uses, in units for people.
fn readable_stats(stats: &Value) -> Value {
    let bytes = |name: &str| stats[name].as_u64().map_or_else(|| "none".to_owned(), size);
    let of = |used: &str, limit: &str| format!("{} of {}", bytes(used), bytes(limit));
    json!({
        "running": stats["running"],
        "cpu": format!("{:.1} s", stats["cpu_micros"].as_f64().unwrap_or(0.0) / 1e6),
        "memory": of("memory_bytes", "memory_limit_bytes"),
        "pids": stats["pids"],
        "read": bytes("read_bytes"),
        "written": bytes("written_bytes"),
        "received": bytes("received_bytes"),
        "sent": bytes("sent_bytes"),
        "disk": of("disk_bytes", "disk_limit_bytes"),
    })
}

fn not_a_time(option: &str, text: &str) -> Failure {
    let message = format!("{option}: {text:?} is no time; expected for instance 90s, 30m, 2h or 1d");
    Failure::new(Exit::Usage, message)
}

/// A time in seconds: a number with `s`, `m`, `h` or `d` behind it, or seconds.
fn seconds(text: &str) -> Option<u64> {
    let (number, unit) = match text.char_indices().last()? {
        (at, 's') => (&text[..at], 1),
        (at, 'm') => (&text[..at], 60),
        (at, 'h') => (&text[..at], 3600),
        (at, 'd') => (&text[..at], 86_400),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
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

/// Says, to people, how long the steps of the last start took.
fn receipt(api: &Api, output: Output, id: &str) -> Result<(), Failure> {
    if output == Output::Table {
        let project = api.get(&format!("/projects/{id}"))?;
        let steps: Vec<String> = project["phases"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|step| Some(format!("{} {} ms", step[0].as_str()?, step[1].as_u64()?)))
            .collect();
        if !steps.is_empty() {
            eprintln!("cocalc: {}", steps.join(", "));
        }
    }
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
    fn a_log_is_followed_by_what_is_new() {
        assert_eq!(news("", "a\nb\n"), "a\nb\n");
        assert_eq!(news("a\nb\n", "a\nb\nc\n"), "c\n");
        assert_eq!(news("a\nb\n", "b\nc\n"), "c\n", "older lines have gone");
        assert_eq!(news("a\nb\n", "x\ny\n"), "x\ny\n", "it was written so fast");
        assert_eq!(news("a\n", "a\n"), "");
    }

    #[test]
    fn times_have_units() {
        for (text, secs) in [("90", 90), ("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400), ("0", 0)] {
            assert_eq!(seconds(text), Some(secs));
        }
        for wrong in ["", "h", "-1h", "2w", "1.5h", "99999999999999999999d"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_place_is_a_project_and_a_path() {
        assert_eq!(place("p:home/a:b").unwrap(), ("p", "home/a:b".to_owned()));
        assert_eq!(place("p:/home/").unwrap(), ("p", "home".to_owned()));
        assert!(place("home/a").is_err() && place(":home").is_err());
    }
}
