//! The daemons' configuration files, keys, and how to start them.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;

use super::{
    narrator::wait_for,
    plan::{HostPlan, Plan, program},
    slots,
    supervise::Spec,
};
use crate::failure::{Failure, While};

/// The demonstration's short leases, so that each tier can be seen.
pub(super) const KEEPALIVE: Duration = Duration::from_millis(500);
pub(super) const LEASE: Duration = Duration::from_secs(3);
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Writes the master's configuration.
pub(super) fn master(plan: &Plan) -> Result<Spec, Failure> {
    let dir = plan.master_dir();
    private_dir(&dir)?;
    let text = toml(&[
        ("listen", format!("127.0.0.1:{}", plan.base_port).into()),
        ("public_url", plan.master_url().into()),
        ("data_dir", dir.join("data").display().to_string().into()),
        ("keepalive_ms", millis(KEEPALIVE)),
        ("lease_ms", millis(LEASE)),
        ("grace_ms", millis(GRACE)),
    ]);
    // All daemons are on this machine, so a directory serves them.
    private_dir(&plan.backups())?;
    let text = format!(
        "{text}\n[backups.place]\n{}",
        toml(&[("kind", "directory".into()), ("path", plan.backups().display().to_string().into())])
    );
    spec(plan, "master", "cocalc-master", dir.join("master.toml"), &text)
}

/// Writes a host's configuration.
pub(super) fn host(
    plan: &Plan,
    host: &HostPlan,
    image: Option<&Path>,
    join_token: &str,
) -> Result<Spec, Failure> {
    let token_file = write_join_token(&host.dir, join_token)?;
    let mut keys: Vec<(&str, Value)> = vec![
        ("name", host.name.clone().into()),
        ("master_url", plan.master_url().into()),
        ("join_token_file", token_file.display().to_string().into()),
        ("data_dir", host.data().display().to_string().into()),
        ("listen", format!("127.0.0.1:{}", host.port).into()),
        ("ssh_listen", format!("127.0.0.1:{}", host.port + 1).into()),
        ("peer_listen", format!("127.0.0.1:{}", host.port + 2).into()),
        ("domain", format!("{}.localhost:{}", host.name, host.port).into()),
        ("storage", if plan.btrfs { "btrfs" } else { "directory" }.into()),
        ("volume", host.volume().display().to_string().into()),
        ("runner", if plan.podman { "podman" } else { "process" }.into()),
    ];
    if let Some(image) = image {
        keys.push(("default_image_tar", image.display().to_string().into()));
    }
    if plan.podman {
        // Hosts of one machine must not share user ids or addresses.
        keys.push(("machine_slot", slots::claim(&plan.dir)?.into()));
    }
    spec(plan, &host.name, "cocalc-host", host.config(), &toml(&keys))
}

/// Writes the proxy's configuration.
pub(super) fn proxy(plan: &Plan, join_token: &str) -> Result<Spec, Failure> {
    let dir = plan.proxy_dir();
    private_dir(&dir)?;
    let token_file = write_join_token(&dir, join_token)?;
    let text = toml(&[
        ("name", "proxy".into()),
        ("master_url", plan.master_url().into()),
        ("join_token_file", token_file.display().to_string().into()),
        ("data_dir", dir.join("data").display().to_string().into()),
        ("listen", format!("127.0.0.1:{}", plan.base_port + 1).into()),
        ("ssh_listen", format!("127.0.0.1:{}", plan.base_port + 2).into()),
        ("domain", format!("proxy.localhost:{}", plan.base_port + 1).into()),
    ]);
    spec(plan, "proxy", "cocalc-proxy", dir.join("proxy.toml"), &text)
}

fn spec(plan: &Plan, name: &str, binary: &str, config: PathBuf, text: &str) -> Result<Spec, Failure> {
    cocalc_daemon::files::write_atomic(&config, text.as_bytes())
        .during(format!("cannot write {}", config.display()))?;
    private_dir(&plan.logs())?;
    private_dir(&plan.dir.join("run"))?;
    Ok(Spec {
        name: name.to_owned(),
        program: program(binary)?,
        config,
        log: plan.logs().join(format!("{name}.log")),
        pidfile: plan.dir.join("run").join(format!("{name}.pid")),
    })
}

/// Flat TOML. JSON's strings, numbers and truth values are TOML's too.
fn toml(keys: &[(&str, Value)]) -> String {
    keys.iter().fold(String::new(), |mut text, (key, value)| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{key} = {value}");
        text
    })
}

fn millis(time: Duration) -> Value {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into()
}

fn write_join_token(dir: &Path, token: &str) -> Result<PathBuf, Failure> {
    private_dir(dir)?;
    let path = dir.join("join-token");
    cocalc_daemon::files::write_atomic(&path, token.as_bytes())
        .during(format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Makes a directory that only this user may enter.
pub(super) fn private_dir(dir: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .during(format!("cannot make {}", dir.display()))
}

/// The administrator's token, which the master writes at its first start.
pub(super) fn admin_token(plan: &Plan) -> Result<String, Failure> {
    let path = plan.master_dir().join("data").join("admin-token");
    wait_for("the master's admin token", Duration::from_secs(30), || {
        Ok(std::fs::read_to_string(&path).ok().map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()))
    })
}

/// Makes an SSH key for the sample account, with the system's own program.
pub(super) fn ssh_key(path: &Path) -> Result<(), Failure> {
    if path.exists() {
        return Ok(());
    }
    let output = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "cocalc demo", "-f"])
        .arg(path)
        .output()
        .during("cannot run ssh-keygen (package openssh-client)")?;
    if output.status.success() {
        Ok(())
    } else {
        Err(Failure::failed(format!("ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}

/// Writes the SSH host keys that the master publishes, so that no program has
/// to ask about a fingerprint.
pub(super) fn known_hosts(
    plan: &Plan,
    hosts: &[Value],
    proxies: &[Value],
    path: &Path,
) -> Result<(), Failure> {
    let mut text = String::new();
    let mut add = |port: u16, row: &Value| {
        for key in row["ssh_host_keys"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "[127.0.0.1]:{port} {key}");
        }
    };
    for host in &plan.hosts {
        if let Some(row) = hosts.iter().find(|row| row["name"] == host.name.as_str()) {
            add(host.port + 1, row);
        }
    }
    for row in proxies {
        add(plan.base_port + 2, row);
    }
    if text.is_empty() {
        return Err(Failure::failed("the master publishes no SSH host keys"));
    }
    cocalc_daemon::files::write_atomic(path, text.as_bytes())
        .during(format!("cannot write {}", path.display()))
}
