//! SSH certificates for other clients: `project ssh-certificate` and
//! `ssh-known-hosts`.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Value, json};

use super::project::text;
use crate::{
    api::Api,
    args::Output,
    failure::{Exit, Failure, While},
    output::{items, print},
};

/// How many names stand in one line.
const NAMES_PER_LINE: usize = 32;

/// Has the key in `file` certified, and writes the certificate where ssh looks
/// for it.
pub(super) fn write(
    api: &Api,
    output: Output,
    id: &str,
    file: &Path,
    mut body: Value,
) -> Result<(), Failure> {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(".pub").filter(|stem| !stem.is_empty()) else {
        let what = format!("{}: expected a public key's file, whose name ends in .pub", file.display());
        return Err(Failure::new(Exit::Usage, what));
    };
    let key = std::fs::read_to_string(file).during(format!("cannot read {}", file.display()))?;
    body["public_key"] = key.trim().into();
    let mut answer = api.post(&format!("/projects/{id}/ssh-certificate"), &body)?;
    let beside = file.with_file_name(format!("{stem}-cert.pub"));
    let certificate = text(&answer, "certificate")?;
    std::fs::write(&beside, format!("{certificate}\n"))
        .during(format!("cannot write {}", beside.display()))?;
    answer["file"] = beside.display().to_string().into();
    print(output, &answer, &["file", "expires_at", "direct.ssh", "proxy.ssh"]);
    Ok(())
}

/// Prints what makes ssh trust the hosts that the master's authority certifies.
pub(super) fn known_hosts(api: &Api, output: Output, pattern: Vec<String>) -> Result<(), Failure> {
    let authority = api.get("/ssh-ca")?;
    let patterns = if pattern.is_empty() { names(api)? } else { pattern };
    if patterns.is_empty() {
        return Err(Failure::failed("there is no host yet: say for which names, with --pattern"));
    }
    let list = |field: &str| -> Vec<String> {
        let keys = authority[field].as_array().into_iter().flatten();
        keys.filter_map(|key| key.as_str().map(str::to_owned)).collect()
    };
    let lines = lines(&patterns, &list("host"), &list("withdrawn"));
    match output {
        Output::Json => print(output, &json!({ "known_hosts": lines }), &[]),
        Output::Table => lines.iter().for_each(|line| println!("{line}")),
    }
    Ok(())
}

/// Lines of known_hosts. A client that does not use port 22 looks for
/// `[name]:port`.
fn lines(patterns: &[String], trusted: &[String], withdrawn: &[String]) -> Vec<String> {
    let mut lines = Vec::new();
    for key in trusted {
        for names in patterns.chunks(NAMES_PER_LINE) {
            let names: Vec<_> = names.iter().map(|name| format!("{name},[{name}]:*")).collect();
            lines.push(format!("@cert-authority {} {key}", names.join(",")));
        }
    }
    // Whatever it says.
    lines.extend(withdrawn.iter().map(|key| format!("@revoked * {key}")));
    lines
}

/// The names by which hosts and proxies are reached now.
fn names(api: &Api) -> Result<Vec<String>, Failure> {
    let (hosts, proxies) = (api.get("/hosts")?, api.get("/proxies")?);
    let peers = items(&hosts, "hosts")
        .as_array()
        .into_iter()
        .flatten()
        .chain(items(&proxies, "proxies").as_array().into_iter().flatten());
    let names: BTreeSet<String> = peers
        .filter_map(|peer| {
            let (name, _) = peer["address"]["ssh"].as_str()?.rsplit_once(':')?;
            let name = name.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
            // What a host says of itself becomes a line of a file.
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
            (!name.is_empty() && name.bytes().all(plain)).then_some(name)
        })
        .collect();
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_hosts_with_and_without_their_port() {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let lines =
            lines(&owned(&["alpha.example", "::1"]), &owned(&["ssh-ed25519 A"]), &owned(&["ssh-ed25519 W"]));
        assert_eq!(
            lines,
            [
                "@cert-authority alpha.example,[alpha.example]:*,::1,[::1]:* ssh-ed25519 A",
                "@revoked * ssh-ed25519 W"
            ]
        );
    }
}
