//! `cocalc project limits` and `cocalc project isolation`.

use serde_json::{Map, Value, json};

use crate::{
    api::Api,
    args::Output,
    failure::{Exit, Failure},
    output::print,
};

/// Shows or changes what a project may use.
#[derive(Debug, clap::Args)]
pub(crate) struct Limits {
    id: String,
    /// Memory, for instance 2G; `default` here and below for its plan's or its
    /// host's.
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Swap beyond the memory.
    #[arg(long, value_name = "SIZE")]
    swap: Option<String>,
    /// Cores, for instance 1.5.
    #[arg(long, value_name = "CORES")]
    cpu: Option<String>,
    /// Its part of the CPU while others want it too; 100 is everybody's.
    #[arg(long, value_name = "1..10000")]
    cpu_weight: Option<String>,
    /// Processes and threads.
    #[arg(long, value_name = "NUMBER")]
    pids: Option<String>,
    /// Open files per process.
    #[arg(long, value_name = "NUMBER")]
    nofile: Option<String>,
    /// Its part of the disks' time while others want it too; 100 is everybody's.
    #[arg(long, value_name = "1..10000")]
    io_weight: Option<String>,
    /// The size of /tmp, then in memory; otherwise /tmp is among its files.
    #[arg(long, value_name = "SIZE")]
    tmp: Option<String>,
    /// The size of /dev/shm.
    #[arg(long, value_name = "SIZE")]
    shm: Option<String>,
    /// The size of its log on the host.
    #[arg(long, value_name = "SIZE")]
    log: Option<String>,
    /// What its owner may ask for at most, rather than what it has.
    /// Administrators.
    #[arg(long)]
    max: bool,
    /// Take back all that was said, before what this command says.
    #[arg(long)]
    reset: bool,
}

const COLUMNS: [&str; 10] = [
    "memory_bytes",
    "swap_bytes",
    "cpu_millis",
    "cpu_weight",
    "pids",
    "nofile",
    "io_weight",
    "tmp_bytes",
    "shm_bytes",
    "log_bytes",
];

/// `limits`.
pub(super) fn limits(api: &Api, output: Output, asked: &Limits) -> Result<(), Failure> {
    let path = format!("/projects/{}/limits", asked.id);
    let said = said(asked)?;
    let part = if asked.max { "max" } else { "limits" };
    let answer = if said.is_empty() && !asked.reset {
        api.get(&path)?
    } else {
        let mut fields = Map::new();
        if !asked.reset {
            // What is not said stays.
            let before = api.get(&path)?[part].as_object().cloned().unwrap_or_default();
            fields.extend(before.into_iter().filter(|(_, value)| !value.is_null()));
        }
        for (name, value) in said {
            if value.is_null() {
                fields.remove(name);
            } else {
                fields.insert(name.to_owned(), value);
            }
        }
        api.put(&if asked.max { format!("{path}-max") } else { path }, &Value::Object(fields))?
    };
    if output == Output::Json {
        print(output, &answer, &[]);
        return Ok(());
    }
    let mut row = answer[part].clone();
    for name in COLUMNS {
        if row[name].is_null() {
            row[name] = "default".into();
        }
    }
    print(output, &row, &COLUMNS);
    let later: Vec<&str> =
        answer["later"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !later.is_empty() {
        eprintln!("from its next start: {}", later.join(", "));
    }
    Ok(())
}

/// What the command says, by the names of the API; null for the default.
fn said(asked: &Limits) -> Result<Vec<(&'static str, Value)>, Failure> {
    type Asked<'a> = (&'static str, &'a str, &'a Option<String>, fn(&str) -> Option<u64>);
    let all: [Asked<'_>; 10] = [
        ("memory_bytes", "--memory", &asked.memory, bytes),
        ("swap_bytes", "--swap", &asked.swap, bytes),
        ("cpu_millis", "--cpu", &asked.cpu, thousandths),
        ("cpu_weight", "--cpu-weight", &asked.cpu_weight, number),
        ("pids", "--pids", &asked.pids, number),
        ("nofile", "--nofile", &asked.nofile, number),
        ("io_weight", "--io-weight", &asked.io_weight, number),
        ("tmp_bytes", "--tmp", &asked.tmp, bytes),
        ("shm_bytes", "--shm", &asked.shm, bytes),
        ("log_bytes", "--log", &asked.log, bytes),
    ];
    let mut said = Vec::new();
    for (name, option, text, parse) in all {
        match text.as_deref() {
            None => {}
            Some("default") => said.push((name, Value::Null)),
            Some(text) => match parse(text) {
                Some(value) => said.push((name, value.into())),
                None => {
                    let reason = format!("{option}: {text:?} makes no sense; for instance 512M, 1.5 or 100");
                    return Err(Failure::new(Exit::Usage, reason));
                }
            },
        }
    }
    Ok(said)
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// Cores, in thousandths: digits, perhaps with three after a point.
fn thousandths(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    if part.is_empty() || part.len() > 3 || !part.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let part: u64 = format!("{part:0<3}").parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(part)
}

/// A number of bytes, with a unit of powers of 1024.
fn bytes(text: &str) -> Option<u64> {
    let text = text.trim_end_matches('B').trim_end_matches('i');
    let (digits, shift) = match text.chars().last()?.to_ascii_uppercase() {
        'K' => (&text[..text.len() - 1], 10),
        'M' => (&text[..text.len() - 1], 20),
        'G' => (&text[..text.len() - 1], 30),
        'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Shows or changes how a project is kept apart, from its next start.
#[derive(Debug, clap::Args)]
pub(crate) struct Isolation {
    id: String,
    /// No process in it gains privileges: no sudo, no setuid.
    #[arg(long)]
    strict: Option<bool>,
    /// What it reaches outside.
    #[arg(long, value_parser = ["full", "none", "only"])]
    network: Option<String>,
    /// With `--network only`: NAME, ADDRESS or NETWORK, each also with `:PORT`; again
    /// for each.
    #[arg(long, value_name = "DESTINATION", required_if_eq("network", "only"))]
    allow: Vec<String>,
    /// Whether only an administrator may change it from now on. Administrators.
    #[arg(long)]
    fixed: Option<bool>,
}

/// `isolation`.
pub(super) fn isolation(api: &Api, output: Output, asked: &Isolation) -> Result<(), Failure> {
    let path = format!("/projects/{}/isolation", asked.id);
    let mut body = json!({});
    if let Some(strict) = asked.strict {
        body["strict"] = strict.into();
    }
    if let Some(fixed) = asked.fixed {
        body["fixed"] = fixed.into();
    }
    match asked.network.as_deref() {
        Some("only") => body["network"] = json!({ "policy": "only", "allow": asked.allow }),
        _ if !asked.allow.is_empty() => {
            return Err(Failure::new(Exit::Usage, "--allow goes with --network only"));
        }
        Some(policy) => body["network"] = json!({ "policy": policy }),
        None => {}
    }
    let answer = if body == json!({}) { api.get(&path)? } else { api.put(&path, &body)? };
    if output == Output::Json {
        print(output, &answer, &[]);
        return Ok(());
    }
    let allowed = answer["network"]["allow"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let row = json!({
        "strict": answer["strict"],
        "network": answer["network"]["policy"],
        "allow": allowed.collect::<Vec<_>>().join(" "),
        "fixed": answer["fixed"],
    });
    print(output, &row, &["strict", "network", "allow", "fixed"]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_cores_are_read() {
        for (text, size) in
            [("512M", Some(512 << 20)), ("2GiB", Some(2 << 30)), ("7", Some(7)), ("1k", Some(1024))]
        {
            assert_eq!(bytes(text), size, "{text}");
        }
        for text in ["", "M", "1.5G", "-1", "99999999999T", "ü"] {
            assert_eq!(bytes(text), None, "{text}");
        }
        for (text, millis) in [("1.5", Some(1500)), ("2", Some(2000)), ("0.25", Some(250)), ("0.0001", None)]
        {
            assert_eq!(thousandths(text), millis, "{text}");
        }
        for text in ["", ".", "1.", "x", "1.-5"] {
            assert_eq!(thousandths(text), None, "{text}");
        }
    }
}
