//! `ssh-config`: entries for `~/.ssh/config`.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    api::Api,
    args::Output,
    failure::Failure,
    output::{items, print},
};

/// How many projects are asked for at a time.
const PAGE: usize = 500;

/// Prints an entry for each of the caller's projects.
pub(super) fn show(api: &Api, output: Output, direct: bool, identity: Option<&Path>) -> Result<(), Failure> {
    let hosts = servers(&api.get("/hosts")?, "hosts");
    let proxies = servers(&api.get("/proxies")?, "proxies");
    let jump = (!direct).then(|| proxies.into_iter().next()).flatten();
    let mut entries = Vec::new();
    let mut after = String::new();
    loop {
        let answer = api.get(&format!("/projects?limit={PAGE}{after}"))?;
        let page: Vec<Value> = items(&answer, "projects").as_array().cloned().unwrap_or_default();
        for project in &page {
            let (Some(id), Some(host)) = (project["id"].as_str(), project["host_id"].as_str()) else {
                continue;
            };
            let Some(server) = hosts.iter().find(|server| server.id == host) else { continue };
            let names = [project["name"].as_str(), project["alias"].as_str()].into_iter().flatten();
            let names: Vec<&str> = names.collect();
            entries.push(entry(id, &names, server, jump.as_ref(), identity));
        }
        match page.last().and_then(|project| project["id"].as_str()) {
            Some(last) if page.len() == PAGE => after = format!("&after={last}"),
            _ => break,
        }
    }
    match output {
        Output::Json => print(output, &json!({ "ssh_config": entries }), &[]),
        Output::Table => entries.iter().for_each(|entry| println!("{entry}")),
    }
    Ok(())
}

struct Server {
    id: String,
    name: String,
    port: u16,
}

/// Where SSH servers are. What one says of itself becomes a line of a file.
fn servers(answer: &Value, list: &str) -> Vec<Server> {
    let rows = items(answer, list).as_array().into_iter().flatten();
    rows.filter_map(|row| {
        let (name, port) = row["address"]["ssh"].as_str()?.rsplit_once(':')?;
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
        let sane = !name.is_empty() && !name.starts_with('-') && name.bytes().all(plain);
        sane.then_some(())?;
        Some(Server { id: row["id"].as_str()?.to_owned(), name: name.to_owned(), port: port.parse().ok()? })
    })
    .collect()
}

/// OpenSSH's client would rather have ChaCha20, for machines without instructions for
/// AES; with them, that takes both ends several times the processor time.
const AES_FIRST: &str = "aes256-gcm@openssh.com,aes128-gcm@openssh.com,chacha20-poly1305@openssh.com";

/// Whether this machine, whose client reads the entries, has such instructions.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

/// An entry. The names are their owners', so each counts only where it can be
/// one for ssh, and never without what tells it from the user's other hosts.
fn entry(id: &str, names: &[&str], host: &Server, jump: Option<&Server>, identity: Option<&Path>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let usable = |name: &str| !name.is_empty() && !name.starts_with(['-', '.']) && name.chars().all(plain);
    let mut first = format!("Host {id}");
    for (at, name) in names.iter().enumerate() {
        if usable(name) && !names[..at].contains(name) {
            first.push_str(" cocalc-");
            first.push_str(name);
        }
    }
    let mut lines = vec![first, format!("  User {id}")];
    match jump {
        Some(proxy) => {
            // The proxy knows where the project is; its host proves itself by
            // the certificate of the host's name.
            let name =
                if proxy.name.contains(':') { format!("[{}]", proxy.name) } else { proxy.name.clone() };
            lines.push(format!("  HostName {id}"));
            lines.push(format!("  HostKeyAlias {}", host.name));
            lines.push(format!("  ProxyJump jump@{name}:{}", proxy.port));
        }
        None => {
            lines.push(format!("  HostName {}", host.name));
            lines.push(format!("  Port {}", host.port));
        }
    }
    if let Some(identity) = identity {
        lines.push(format!("  IdentityFile {}", identity.display()));
        lines.push("  IdentitiesOnly yes".to_owned());
    }
    if has_aes() {
        lines.push(format!("  Ciphers {AES_FIRST}"));
    }
    // A connection is kept for what comes next, and a dead one is noticed.
    lines.push("  ServerAliveInterval 30".to_owned());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_leads_through_the_proxy() {
        let server = |name: &str, port| Server { id: "h".into(), name: name.into(), port };
        let host = server("alpha.example", 2222);
        let through = entry("id-1", &["My-project", "mine"], &host, Some(&server("::1", 22)), None);
        assert!(through.starts_with("Host id-1 cocalc-My-project cocalc-mine\n  User id-1\n"), "{through}");
        assert!(through.contains("HostKeyAlias alpha.example\n  ProxyJump jump@[::1]:22"), "{through}");
        let direct = entry("id-1", &["two words\nProxyCommand x"], &host, None, Some(Path::new("/k")));
        assert!(direct.starts_with("Host id-1\n"), "{direct}");
        assert!(direct.contains("HostName alpha.example\n  Port 2222\n  IdentityFile /k"), "{direct}");
        assert!(!direct.contains("ProxyCommand"));
        assert_eq!(direct.contains("\n  Ciphers aes256-gcm@openssh.com,"), has_aes(), "{direct}");
    }

    #[test]
    fn what_a_host_says_is_a_name_or_nothing() {
        let rows = json!([
            { "id": "a", "address": { "ssh": "a.example:22" } },
            { "id": "b", "address": { "ssh": "-oProxyCommand=x:22" } },
            { "id": "c", "address": { "ssh": "c d:22" } },
            { "id": "d", "address": { "ssh": "[::1]:7" } },
        ]);
        let names: Vec<_> = servers(&rows, "hosts").into_iter().map(|server| server.name).collect();
        assert_eq!(names, ["a.example", "::1"]);
    }
}
