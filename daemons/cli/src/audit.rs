//! `cocalc audit …`: reads a host's audit log, without its daemon.

use std::{path::Path, str::FromStr};

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
        Audit::Verify { folder, host } => {
            let mut hashes = Hashes { wanted: None, found: None };
            if let Some(host) = host {
                let told = api()?.get(&format!("/hosts/{host}/audit-head"))?;
                hashes.wanted = told["count"].as_u64().zip(told["head"].as_str().map(str::to_owned));
            }
            let (count, head) = verify(folder, &mut hashes)?;
            if let Some((told, expected)) = &hashes.wanted
                && *told > 0
                && hashes.found.as_ref() != Some(expected)
            {
                return Err(Failure::failed(format!(
                    "the log has {count} lines, and does not agree with line {told} that the host told the master of: it was cut or replaced"
                )));
            }
            print(output, &json!({ "lines": count, "head": head }), &["lines", "head"]);
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

/// The hash of the line that the master was told of.
struct Hashes {
    wanted: Option<(u64, String)>,
    found: Option<String>,
}

fn verify(folder: &Path, hashes: &mut Hashes) -> Result<(u64, String), Failure> {
    let failed = |error| Failure::failed(cocalc_daemon::chain(&error));
    let end = AuditLog::verify(folder).map_err(failed)?;
    if let Some((line, _)) = hashes.wanted {
        hashes.found = AuditLog::hash_of(folder, line).map_err(failed)?;
    }
    Ok(end)
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
