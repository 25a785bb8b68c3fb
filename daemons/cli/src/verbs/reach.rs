//! Reaching a project from the command line: `exec`, `ssh`, `open`.

use std::process::ExitCode;

use cocalc_ssh::client::{ClientKey, HostKeyCheck, Identity, Jump};
use serde_json::{Value, json};

use super::project::text;
use crate::{
    api::Api,
    failure::{Failure, While},
};

/// The exit status of our own failures, as ssh has it.
const OWN_FAILURE: u8 = 255;

/// Runs a command with its arguments, and exits with its status.
pub(super) fn exec(api: &Api, id: &str, via_proxy: bool, command: Vec<String>) -> Result<ExitCode, Failure> {
    Ok(run(api, id, via_proxy, Some(quote(&command))))
}

/// Opens a shell, or runs a command line.
pub(super) fn ssh(api: &Api, id: &str, via_proxy: bool, command: &[String]) -> Result<ExitCode, Failure> {
    Ok(run(api, id, via_proxy, (!command.is_empty()).then(|| command.join(" "))))
}

fn run(api: &Api, id: &str, via_proxy: bool, line: Option<String>) -> ExitCode {
    match connect_and_run(api, id, via_proxy, line) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("cocalc: {failure}");
            ExitCode::from(OWN_FAILURE)
        }
    }
}

fn connect_and_run(api: &Api, id: &str, via_proxy: bool, line: Option<String>) -> Result<u8, Failure> {
    // Never written anywhere: it is of no use without its certificate, and that
    // ends in minutes.
    let key = ClientKey::generate().during("cannot make a key")?;
    let answer =
        api.post(&format!("/projects/{id}/ssh-certificate"), &json!({ "public_key": key.public() }))?;
    let identity = Identity::Certificate(key, text(&answer, "certificate")?);
    let address = text(&answer["direct"], "ssh")?;
    // End to end also through a proxy, which only passes bytes on.
    let jump = if via_proxy {
        let proxy = text(&answer["proxy"], "ssh")?;
        let server = proxy.rsplit_once('@').map_or(proxy.as_str(), |(_, server)| server);
        let keys = host_keys(api, &answer, true)?;
        Some(Jump { address: server.to_owned(), host_keys: HostKeyCheck::Pinned(keys) })
    } else {
        None
    };
    let keys = host_keys(api, &answer, false)?;
    crate::ssh::run(&address, &identity, &keys, jump, line)
}

/// The keys that the master publishes for where we connect to.
fn host_keys(api: &Api, answer: &Value, via_proxy: bool) -> Result<Vec<String>, Failure> {
    let rows = if via_proxy {
        api.get("/proxies")?
    } else {
        api.get(&format!("/hosts/{}", text(answer, "host_id")?))?
    };
    let row = if via_proxy { crate::output::items(&rows, "proxies")[0].clone() } else { rows };
    Ok(row["ssh_host_keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|k| k.as_str().map(str::to_owned))
        .collect())
}

/// Quotes arguments for a POSIX shell.
fn quote(command: &[String]) -> String {
    let quoted: Vec<String> = command
        .iter()
        .map(|word| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', r"'\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

/// The address that opens the project, or the port that was asked for, in a
/// browser, with its one-use token: its own origin, which browsers resolve.
pub(super) fn browser_url(answer: &Value, via_proxy: bool) -> Result<String, Failure> {
    let base = text(&answer[if via_proxy { "proxy" } else { "direct" }], "url")?;
    Ok(format!("{base}?cocalc_token={}", text(answer, "token")?))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn arguments_survive_a_shell() {
        let words = ["sh", "-c", "echo \"$HOME\" it's", "", "a b", "--x=1"].map(str::to_owned);
        let line = format!("printf '%s\\n' {}", quote(&words));
        let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words.join("\n") + "\n");
    }
}
