//! `cocalc backup …`

use std::{io::Write, os::unix::fs::OpenOptionsExt, path::Path, time::Duration};

use serde_json::{Value, json};

use super::{confirm, settle_within, size, snapshot::changes};
use crate::{
    api::{Api, encoded},
    args::{Backup, BackupPolicy, Output, Restore},
    failure::{Exit, Failure, While},
    output::print,
};

/// How long a verb waits for work that may take hours, before it leaves it to
/// go on.
const LIMIT: Duration = Duration::from_secs(24 * 3600);
/// How many entries are asked for at once.
const PAGE: usize = 1000;

pub(super) fn run(api: &Api, output: Output, verb: Backup) -> Result<(), Failure> {
    match verb {
        Backup::Create { project } => {
            let done = work(api, &format!("/projects/{project}/backups"), &json!({}))?;
            let row = |seen: &Value| {
                json!({ "backup": seen["backup_id"], "files": seen["files"], "size": bytes(&seen["bytes"]),
                        "added": bytes(&seen["added_bytes"]) })
            };
            report(output, &done, row, &["backup", "files", "size", "added"]);
        }
        Backup::List { project } => list(api, output, &project)?,
        Backup::Ls { project, backup, path } => {
            let backup = named(api, &project, &backup)?;
            let path = path.filter(|path| !path.is_empty());
            let query =
                path.map_or_else(String::new, |path| format!("&path={}", encoded(path.trim_matches('/'))));
            entries(
                api,
                output,
                &format!("/projects/{project}/backups/{backup}/ls?limit={PAGE}{query}"),
                true,
            )?;
        }
        Backup::Find { project, backup, text } => {
            let backup = named(api, &project, &backup)?;
            let query = format!("?limit={PAGE}&text={}", encoded(&text));
            entries(api, output, &format!("/projects/{project}/backups/{backup}/find{query}"), false)?;
        }
        Backup::Diff { project, backup, path } => {
            let backup = named(api, &project, &backup)?;
            let below = path.map_or_else(String::new, |path| format!("&path={}", encoded(&path)));
            changes(api, output, &format!("/projects/{project}/backups/{backup}/diff"), &below)?;
        }
        Backup::Restore(restore) => match &restore.all_of {
            Some(host) => restore_all(api, output, host, &restore)?,
            None => restore_one(api, output, &restore)?,
        },
        Backup::Delete { project, backup } => {
            let backup = named(api, &project, &backup)?;
            let begun = api.delete(&format!("/projects/{project}/backups/{backup}"))?;
            let done = settle_within(api, &begun, LIMIT)?;
            report(output, &done, Value::clone, &["left"]);
        }
        Backup::Prune { project } => {
            let done = work(api, &format!("/projects/{project}/backups/prune"), &json!({}))?;
            let row = |seen: &Value| {
                json!({ "forgotten": seen["forgotten"], "left": seen["left"], "freed": bytes(&seen["freed_bytes"]),
                        "freed_later": bytes(&seen["marked_bytes"]), "kept": bytes(&seen["kept_bytes"]) })
            };
            report(output, &done, row, &["forgotten", "left", "freed", "freed_later", "kept"]);
        }
        Backup::Check { project, read_data } => {
            let done =
                work(api, &format!("/projects/{project}/backups/check"), &json!({ "read_data": read_data }))?;
            check(output, &done)?;
        }
        Backup::Drill { project, host } => {
            let done = work(api, "/backups/drill", &json!({ "project": project, "host": host }))?;
            let row = |seen: &Value| {
                json!({ "project": done["project_id"], "against": seen["against"], "files": seen["entries"],
                        "size": bytes(&seen["bytes"]) })
            };
            report(output, &done, row, &["project", "against", "files", "size"]);
        }
        Backup::Policy(policy) => keep(api, output, &policy)?,
        Backup::Escrow { project, file } => {
            let answer = api.get(&format!("/projects/{project}/backups/escrow"))?;
            let text = super::project::text(&answer, "file")?;
            match (file, output) {
                (Some(file), _) => write_secret(&file, &text)?,
                (None, Output::Json) => print(output, &answer, &[]),
                // A closed pipe is not an error of ours.
                (None, Output::Table) => drop(std::io::stdout().write_all(text.as_bytes())),
            }
        }
        Backup::Erase { project, yes } => {
            let question = format!("Delete every backup of project {project}, and the key, for good?");
            confirm(yes, &question, "erase", "--yes")?;
            let done = work(api, &format!("/projects/{project}/backups/erase"), &json!({}))?;
            let row = |seen: &Value| json!({ "objects": seen["objects"], "freed": bytes(&seen["freed_bytes"]), "left": seen["left"] });
            report(output, &done, row, &["objects", "freed", "left"]);
        }
    }
    Ok(())
}

/// Begins work, and waits until it is done.
fn work(api: &Api, path: &str, body: &Value) -> Result<Value, Failure> {
    settle_within(api, &api.post(path, body)?, LIMIT)
}

/// Shows what came of an operation: itself, or a row of it.
fn report(output: Output, done: &Value, row: impl FnOnce(&Value) -> Value, columns: &[&str]) {
    match output {
        Output::Json => print(output, done, &[]),
        Output::Table => print(output, &row(&done["progress"]), columns),
    }
}

fn bytes(value: &Value) -> Value {
    value.as_u64().map_or(Value::Null, |bytes| size(bytes).into())
}

/// The id of the backup that is meant: itself, one that begins so, or the newest.
fn named(api: &Api, project: &str, text: &str) -> Result<String, Failure> {
    let list = api.get(&format!("/projects/{project}/backups"))?;
    let ids: Vec<&str> = items(&list).iter().filter_map(|one| one["id"].as_str()).collect();
    pick(&ids, text)
}

fn items(list: &Value) -> &[Value] {
    list["backups"].as_array().map_or(&[], Vec::as_slice)
}

/// Of `ids`, oldest first.
fn pick(ids: &[&str], text: &str) -> Result<String, Failure> {
    let missing = |what: String| Failure::new(Exit::NotFound, what);
    if text == "latest" {
        let latest = ids
            .last()
            .ok_or_else(|| missing("the project has no backup: cocalc backup create".to_owned()))?;
        return Ok((*latest).to_owned());
    }
    let mut fit = ids.iter().filter(|id| !text.is_empty() && id.starts_with(text));
    match (fit.next(), fit.next()) {
        (Some(id), None) => Ok((*id).to_owned()),
        (Some(_), Some(_)) => Err(Failure::new(
            Exit::Usage,
            format!("several backups begin with {text:?}: give more of the id"),
        )),
        // One that the list leaves out is named in full.
        _ if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(text.to_owned()),
        _ => Err(missing(format!("there is no backup {text:?}: look at cocalc backup list"))),
    }
}

fn list(api: &Api, output: Output, project: &str) -> Result<(), Failure> {
    let answer = api.get(&format!("/projects/{project}/backups"))?;
    if output == Output::Json {
        print(output, &answer, &[]);
        return Ok(());
    }
    let row = |one: &Value| {
        let id = one["id"].as_str().unwrap_or_default();
        json!({
            "id": id.chars().take(12).collect::<String>(), "taken": one["taken"], "kind": one["kind"],
            "files": one["files"], "size": bytes(&one["bytes"]), "added": bytes(&one["added_bytes"]),
        })
    };
    let rows: Vec<Value> = items(&answer).iter().map(row).collect();
    print(output, &rows.into(), &["id", "taken", "kind", "files", "size", "added"]);
    for remark in remarks(&answer) {
        eprintln!("cocalc: {}", remark.chars().filter(|c| !c.is_control()).collect::<String>());
    }
    Ok(())
}

/// What people should know besides.
fn remarks(answer: &Value) -> Vec<String> {
    let mut all = Vec::new();
    if answer["truncated"] == true {
        all.push("older ones are left out".to_owned());
    }
    let state = &answer["state"];
    if state["pending"] == true {
        let since = state["pending_since"].as_str().unwrap_or("a while ago");
        all.push(format!("something has changed since {since} that no backup has"));
    }
    all.extend(state["failure"].as_str().map(str::to_owned));
    let damage = answer["damage"].as_array().into_iter().flatten().filter_map(Value::as_str);
    all.extend(damage.map(|what| format!("damaged: {what}")));
    all
}

/// Prints what is in a backup, page after page where there are pages.
fn entries(api: &Api, output: Output, path: &str, paged: bool) -> Result<(), Failure> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let mut page = api.get(&format!("{path}{after}"))?;
        let list = page["entries"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let next = list.last().and_then(|last| last["path"].as_str()).map(encoded);
        match output {
            Output::Json => all.extend(list),
            Output::Table => {
                let text: String = list.iter().map(line).collect();
                if std::io::stdout().write_all(text.as_bytes()).is_err() {
                    // `cocalc backup ls … | head`
                    return Ok(());
                }
            }
        }
        match next {
            Some(next) if page["truncated"] == true && paged => after = format!("&after={next}"),
            _ => {
                let truncated = page["truncated"] == true && !paged;
                if truncated && output == Output::Table {
                    eprintln!("cocalc: there are more: look for a longer text");
                }
                if output == Output::Json {
                    print(output, &json!({ "entries": all, "truncated": truncated }), &[]);
                }
                return Ok(());
            }
        }
    }
}

/// One entry for people. Paths of the API have no control characters.
fn line(entry: &Value) -> String {
    let text = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    let size = match entry["kind"].as_str() {
        Some("file") => size(entry["bytes"].as_u64().unwrap_or(0)),
        _ => "-".to_owned(),
    };
    let slash = if entry["kind"] == "directory" { "/" } else { "" };
    let modified = entry["modified"].as_str().unwrap_or("-");
    format!("{:<9}  {size:>10}  {modified:<24}  {}{slash}\n", text("kind"), text("path"))
}

fn restore_one(api: &Api, output: Output, asked: &Restore) -> Result<(), Failure> {
    let project = asked.project.as_deref().unwrap_or_default();
    let backup = named(api, project, &asked.backup)?;
    let mut body = match (&asked.path, &asked.new) {
        (Some(path), _) => json!({ "to": "path", "path": path.trim_matches('/'), "replace": asked.replace }),
        (None, Some(name)) => json!({ "to": "new_project", "name": name }),
        (None, None) => {
            let question = format!(
                "Replace all files of project {project} by those of backup {backup}? Its present state is kept as a \
                 snapshot, and it is restarted if it runs."
            );
            confirm(asked.yes, &question, "yes", "--yes")?;
            json!({ "to": "in_place" })
        }
    };
    if let Some(target) = &asked.target {
        body["target"] = target.trim_matches('/').into();
    }
    if let Some(host) = &asked.host {
        body["host"] = host.as_str().into();
    }
    let begun = api.post(&format!("/projects/{project}/backups/{backup}/restore"), &body)?;
    if asked.no_wait {
        print(output, &begun, &["operation_id"]);
        return Ok(());
    }
    let done = settle_within(api, &begun, LIMIT)?;
    let row = |seen: &Value| {
        json!({ "project": begun["project"]["id"], "backup": seen["backup_id"], "taken": seen["taken"],
                "files": seen["entries"], "size": bytes(&seen["bytes"]), "kept_as": seen["former"] })
    };
    report(output, &done, row, &["project", "backup", "taken", "files", "size", "kept_as"]);
    Ok(())
}

fn restore_all(api: &Api, output: Output, host: &str, asked: &Restore) -> Result<(), Failure> {
    let begun = api.post(&format!("/hosts/{host}/restore-all"), &json!({ "to": asked.to }))?;
    if asked.no_wait {
        print(output, &begun, &["operation_id"]);
        return Ok(());
    }
    let done = settle_within(api, &begun, LIMIT);
    // Also if some failed, what became of each is said.
    let id = super::project::text(&begun, "operation_id")?;
    let seen = api.get(&format!("/operations/{id}"))?;
    match output {
        Output::Json => print(output, &seen, &[]),
        Output::Table => {
            let projects = seen["progress"]["projects"].as_array().cloned().unwrap_or_default();
            let rows: Vec<Value> = projects.iter().map(outcome).collect();
            print(output, &rows.into(), &["project", "name", "outcome", "host", "what"]);
        }
    }
    done.map(|_| ())
}

/// What became of one project: of one that is up again, what was lost.
fn outcome(project: &Value) -> Value {
    let what = match project["outcome"].as_str() {
        Some("restored") => &project["lost"]["text"],
        _ => &project["detail"],
    };
    json!({ "project": project["project_id"], "name": project["name"], "outcome": project["outcome"],
            "host": project["host_id"], "what": what })
}

/// Shows what a check found; damage is a failure.
fn check(output: Output, done: &Value) -> Result<(), Failure> {
    let found = &done["progress"];
    let list = |key: &str| found[key].as_array().cloned().unwrap_or_default();
    match output {
        Output::Json => print(output, done, &[]),
        Output::Table => {
            let count = |key: &str| list(key).len();
            let row =
                json!({ "sound": found["sound"], "damage": count("damage"), "affected": count("affected") });
            print(output, &row, &["sound", "damage", "affected"]);
        }
    }
    if found["sound"] == true {
        return Ok(());
    }
    let words: Vec<String> = list("damage").iter().filter_map(|what| what.as_str().map(tame)).collect();
    Err(Failure::failed(format!("the repository is damaged: {}", words.join("; "))))
}

fn tame(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Shows a policy, or changes what the command says of it.
fn keep(api: &Api, output: Output, policy: &BackupPolicy) -> Result<(), Failure> {
    let path = format!("/projects/{}/backups/policy", policy.project);
    let wanted = serde_json::to_value(&policy.fields).during("cannot write the policy")?;
    let mut wanted = wanted.as_object().cloned().unwrap_or_default();
    if !policy.fields.exclude.is_empty() {
        let patterns: Vec<&String> = policy.fields.exclude.iter().filter(|one| !one.is_empty()).collect();
        wanted.insert("excludes".to_owned(), json!(patterns));
    }
    if policy.reset {
        api.delete(&path)?;
    } else if !wanted.is_empty() {
        let mut fields = api.get(&path)?["policy"].as_object().cloned().unwrap_or_default();
        fields.extend(wanted);
        api.put(&path, &Value::Object(fields))?;
    }
    let shown = api.get(&path)?;
    let row = match output {
        Output::Json => shown,
        Output::Table => {
            let mut row = shown["policy"].clone();
            row["from"] = shown["from"].clone();
            row
        }
    };
    const COLUMNS: [&str; 9] =
        ["from", "enabled", "rpo_secs", "hourly", "daily", "weekly", "monthly", "manual", "excludes"];
    print(output, &row, &COLUMNS);
    Ok(())
}

/// Writes a secret to a new file that only the caller may read.
fn write_secret(path: &Path, text: &str) -> Result<(), Failure> {
    let shown = path.display();
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.during(format!("cannot make {shown}"))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).during(format!("cannot write {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_named_by_the_beginning_of_its_id() {
        let ids = ["abcd1234", "abff0000", "00112233"];
        assert_eq!(pick(&ids, "latest").unwrap(), "00112233");
        assert_eq!(pick(&ids, "abc").unwrap(), "abcd1234");
        assert_eq!(pick(&ids, "ab").unwrap_err().exit, Exit::Usage);
        assert_eq!(pick(&ids, "7").unwrap_err().exit, Exit::NotFound);
        assert_eq!(pick(&ids, "").unwrap_err().exit, Exit::NotFound);
        assert_eq!(pick(&[], "latest").unwrap_err().exit, Exit::NotFound);
        assert_eq!(pick(&ids, &"e".repeat(64)).unwrap(), "e".repeat(64));
    }

    #[test]
    fn what_people_should_know_is_said() {
        let answer = json!({ "truncated": false, "damage": ["pack x is lost"],
            "state": { "pending": true, "pending_since": "2026-11-27T10:00:00Z", "failure": "no credentials" } });
        assert_eq!(
            remarks(&answer),
            [
                "something has changed since 2026-11-27T10:00:00Z that no backup has",
                "no credentials",
                "damaged: pack x is lost",
            ]
        );
        assert!(remarks(&json!({ "state": null })).is_empty());
    }

    #[test]
    fn of_a_project_it_is_said_what_was_lost_or_why_it_is_not_up() {
        let restored = outcome(&json!({ "outcome": "restored", "lost": { "text": "two minutes" } }));
        assert_eq!(restored["what"], "two minutes");
        let failed =
            outcome(&json!({ "outcome": "no_backup", "detail": "it has none", "lost": { "text": "x" } }));
        assert_eq!(failed["what"], "it has none");
    }
}
