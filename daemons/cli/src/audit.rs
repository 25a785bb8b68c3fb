//! `cocalc audit …`: reads an audit log, without its daemon.

use std::{collections::BTreeMap, path::Path, str::FromStr};

use cocalc_auth_live::{AuditLog, AuditQuery};
use cocalc_core::ids::Timestamp;
use serde_json::{Value, json};

use crate::{
    api::Api,
    args::{Audit, Output},
    failure::{Exit, Failure},
    output::print,
};

/// Runs a verb; `api` is asked for only if the master is.
pub(crate) fn run(
    api: impl FnOnce() -> Result<Api, Failure>,
    output: Output,
    verb: &Audit,
) -> Result<(), Failure> {
    match verb {
        Audit::Verify { folder, host, proxy, against_master } => {
            let heads = match (host, proxy, against_master) {
                (Some(host), ..) => Some(heads(&api()?, "hosts", host)?),
                (_, Some(proxy), _) => Some(heads(&api()?, "proxies", proxy)?),
                (.., true) => Some(heads_of_folder(&api()?, folder)?),
                _ => None,
            };
            let shown = verify(folder, heads.as_ref())?;
            print(output, &shown, &["lines", "head", "heads_compared"]);
        }
        Audit::Heads { id, proxy } => {
            let known = heads(&api()?, if *proxy { "proxies" } else { "hosts" }, id)?;
            if output == Output::Json {
                print(output, &known, &[]);
            } else {
                print(output, &known["heads"], &["time", "count", "head", "received_at"]);
                if !known["contradiction"].is_null() {
                    eprintln!("{}", contradicted(&known["contradiction"]));
                }
            }
        }
        Audit::Query { folder, project, account, since, until } => {
            let query = AuditQuery {
                project: parsed("--project", project.as_deref())?,
                account: parsed("--account", account.as_deref())?,
                since: time("--since", since.as_deref())?,
                until: time("--until", until.as_deref())?,
            };
            let mut events = Vec::new();
            AuditLog::query(folder, &query, |event| {
                let mut shown = serde_json::to_value(&event).unwrap_or(Value::Null);
                shown["time"] = cocalc_daemon::time::rfc3339(event.time).into();
                events.push(shown);
            })
            .map_err(|error| Failure::failed(cocalc_daemon::chain(&error)))?;
            let columns = ["time", "kind", "account", "project", "action", "reason"];
            print(output, &Value::Array(events), &columns);
        }
    }
    Ok(())
}

/// What the master knows of a log.
fn heads(api: &Api, kind: &str, id: &str) -> Result<Value, Failure> {
    api.get(&format!("/{kind}/{id}/audit-heads"))
}

/// The same for the daemon in whose data directory the log is.
fn heads_of_folder(api: &Api, folder: &Path) -> Result<Value, Failure> {
    let unknown = |why: &str| {
        let text = format!("{}: {why}; say --host or --proxy", folder.display());
        Failure::new(Exit::Usage, text)
    };
    let whole = folder.canonicalize().map_err(|error| unknown(&error.to_string()))?;
    let path = whole.parent().map(|data| data.join("membership.json")).unwrap_or_default();
    let text = std::fs::read_to_string(&path);
    let text = text
        .map_err(|error| unknown(&format!("whose it is cannot be read from {}: {error}", path.display())))?;
    let membership: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    let id = membership["id"].as_str().ok_or_else(|| unknown("its daemon's membership has no id"))?;
    match heads(api, "hosts", id) {
        Err(failure) if failure.exit == Exit::NotFound => heads(api, "proxies", id),
        found => found,
    }
}

fn contradicted(head: &Value) -> String {
    format!(
        "at {} it signed {} lines ending with {}, which contradicts what it had signed before: the log was cut, or written anew",
        head["received_at"].as_str().unwrap_or_default(),
        head["count"],
        head["head"].as_str().unwrap_or_default()
    )
}

/// Verifies the chain, and compares it with every head that was signed.
fn verify(folder: &Path, known: Option<&Value>) -> Result<Value, Failure> {
    let mut wanted: BTreeMap<u64, &Value> = BTreeMap::new();
    for head in known.iter().flat_map(|known| known["heads"].as_array()).flatten() {
        wanted.extend(head["count"].as_u64().map(|count| (count, head)));
    }
    let compared = wanted.len();
    let mut wrong = None;
    let (count, hash) = AuditLog::verify_each(folder, |line, hash| {
        if let Some(head) = wanted.remove(&line)
            && head["head"].as_str() != Some(hash)
        {
            wrong = wrong.or(Some((line, head)));
        }
    })
    .map_err(|error| Failure::failed(cocalc_daemon::chain(&error)))?;
    let signed = |head: &Value| head["time"].as_str().unwrap_or_default().to_owned();
    if let Some((line, head)) = wrong {
        return Err(Failure::failed(format!(
            "line {line} is another than the one that was signed at {}: the log was written anew at or before it",
            signed(head)
        )));
    }
    if let Some((line, head)) = wanted.last_key_value() {
        return Err(Failure::failed(format!(
            "the log has {count} lines, and had {line} when its head was signed at {}: it was cut",
            signed(head)
        )));
    }
    if let Some(head) = known.map(|known| &known["contradiction"]).filter(|head| !head.is_null()) {
        return Err(Failure::failed(contradicted(head)));
    }
    Ok(json!({ "lines": count, "head": hash, "heads_compared": compared }))
}

fn usage(option: &str, text: &str, what: &str) -> Failure {
    Failure::new(Exit::Usage, format!("{option}: {text:?} is no {what}"))
}

fn parsed<T: FromStr>(option: &str, text: Option<&str>) -> Result<Option<T>, Failure> {
    text.map(|text| text.parse().map_err(|_| usage(option, text, "id"))).transpose()
}

fn time(option: &str, text: Option<&str>) -> Result<Option<Timestamp>, Failure> {
    text.map(|text| cocalc_daemon::time::parse(text).ok_or_else(|| usage(option, text, "time in RFC 3339")))
        .transpose()
}
