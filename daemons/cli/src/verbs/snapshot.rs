//! `cocalc snapshot …`

use std::io::Write;

use serde_json::{Value, json};

use super::{settle, size};
use crate::{
    api::{Api, encoded},
    args::{Output, Policy, Snapshot},
    failure::{Exit, Failure, While},
    output::{items, print},
};

pub(super) fn run(api: &Api, output: Output, verb: Snapshot) -> Result<(), Failure> {
    match verb {
        Snapshot::Create { project, name } => {
            let answer = api.post(&format!("/projects/{project}/snapshots"), &json!({ "name": name }))?;
            finish(api, output, &answer)
        }
        Snapshot::List { project } => {
            let answer = api.get(&format!("/projects/{project}/snapshots"))?;
            print(output, items(&answer, "snapshots"), &["name", "automatic", "created", "origin"]);
            Ok(())
        }
        Snapshot::Delete { project, name } => {
            let answer = api.delete(&format!("/projects/{project}/snapshots/{name}"))?;
            finish(api, output, &answer)
        }
        Snapshot::Restore { project, name, path } => {
            let body = path.map_or_else(|| json!({}), |path| json!({ "path": path }));
            let answer = api.post(&format!("/projects/{project}/snapshots/{name}/restore"), &body)?;
            finish(api, output, &answer)
        }
        Snapshot::Diff { project, name, to } => diff(api, output, &project, &name, to.as_deref()),
        Snapshot::Policy(policy) => keep(api, output, &policy),
    }
}

/// Prints what is different, page after page.
fn diff(api: &Api, output: Output, project: &str, name: &str, to: Option<&str>) -> Result<(), Failure> {
    let to = to.map_or_else(String::new, |to| format!("&to={}", encoded(to)));
    changes(api, output, &format!("/projects/{project}/snapshots/{name}/diff"), &to)
}

/// Prints the changes that `path` tells of, page after page.
pub(super) fn changes(api: &Api, output: Output, path: &str, fixed: &str) -> Result<(), Failure> {
    let mut query = fixed.to_owned();
    let mut all = Vec::new();
    loop {
        let mut page = api.get(&format!("{path}?limit=1000{query}"))?;
        let changes = page["changes"].as_array_mut().map(std::mem::take).unwrap_or_default();
        match output {
            Output::Json => all.extend(changes),
            Output::Table => {
                let mut text = String::new();
                for change in &changes {
                    text.push_str(&line(change));
                }
                if std::io::stdout().write_all(text.as_bytes()).is_err() {
                    // `cocalc snapshot diff … | head`
                    return Ok(());
                }
            }
        }
        let Some(next) = page["next"].as_str() else { break };
        query = format!("{fixed}&after={}", encoded(next));
    }
    if output == Output::Json {
        print(output, &json!({ "changes": all }), &[]);
    }
    Ok(())
}

/// One change for people. Paths of the API have no control characters.
fn line(change: &Value) -> String {
    let text = |key: &str| change[key].as_str().unwrap_or_default().to_owned();
    let size = match change["node"].as_str() {
        Some("file") => size(change["bytes"].as_u64().unwrap_or(0)),
        _ => "-".to_owned(),
    };
    let slash = if change["node"] == "directory" { "/" } else { "" };
    format!("{:<8}  {:<9}  {size:>10}  {}{slash}\n", text("kind"), text("node"), text("path"))
}

/// Shows a policy, or changes what the command says of it.
fn keep(api: &Api, output: Output, policy: &Policy) -> Result<(), Failure> {
    let path = format!("/projects/{}/snapshot-policy", policy.project);
    let wanted = serde_json::to_value(&policy.fields).during("cannot write the policy")?;
    let wanted = wanted.as_object().cloned().unwrap_or_default();
    if policy.reset {
        api.delete(&path)?;
    } else if !wanted.is_empty() {
        let mut fields = api.get(&path)?["policy"].as_object().cloned().ok_or_else(|| {
            Failure::new(Exit::Unreachable, "the project's host does not say what is in force now; try again")
        })?;
        fields.extend(wanted);
        api.put(&path, &Value::Object(fields))?;
    }
    let shown = api.get(&path)?;
    let mut row = shown["policy"].clone();
    if output == Output::Json || row.is_null() {
        row = shown;
    } else {
        row["from"] = shown["from"].clone();
    }
    const COLUMNS: [&str; 9] = [
        "from",
        "enabled",
        "interval_secs",
        "frequent",
        "hourly",
        "daily",
        "weekly",
        "monthly",
        "allowance_percent",
    ];
    print(output, &row, &COLUMNS);
    Ok(())
}

/// Waits if the answer is an operation, and prints the outcome.
fn finish(api: &Api, output: Output, answer: &Value) -> Result<(), Failure> {
    let outcome = if answer.get("operation_id").is_some() { settle(api, answer)? } else { answer.clone() };
    if output == Output::Json {
        print(output, &outcome, &[]);
    }
    Ok(())
}
