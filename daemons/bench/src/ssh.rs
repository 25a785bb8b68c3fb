//! Files through the SSH ingress, against the system's sshd with keys and a
//! configuration of its own. The client, the file and its file system are the
//! same; a cipher is what the client and each server agree on.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    Effort, Result,
    federation::{Federation, openssh},
    table::{Better, Table},
    tool::{Server, attached, finish, run, time, wait_for},
};

const LIMIT: Duration = Duration::from_secs(120);

/// Where a client goes.
struct Target {
    key: PathBuf,
    known_hosts: PathBuf,
    user: String,
    port: String,
    /// The directory with the file, as the server names it.
    home: PathBuf,
    upload: &'static str,
}

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let dir = federation.dir.join("ssh");
    std::fs::create_dir_all(&dir)?;
    let connect = federation.connect(federation.project())?;
    let line = format!("head -c {}M /dev/urandom >~/blob && sync && pwd", effort.ssh_mib);
    let home = federation.exec(federation.project(), &line, LIMIT)?;
    let ours = Target {
        key: federation.key(),
        known_hosts: federation.dir.join("data/known_hosts"),
        user: connect.ssh.0,
        port: connect.ssh.1,
        home: home.trim().into(),
        upload: "up-ours",
    };
    let volume = &federation.hosts()?[0].volume;
    let port = federation.base_port + 3;
    let (_sshd, known_hosts) = sshd(&dir, &ours.key, port)?;
    let peer = Target {
        key: ours.key.clone(),
        known_hosts,
        user: "root@127.0.0.1".to_owned(),
        port: port.to_string(),
        home: volume.join("projects").join(federation.project()).join("home"),
        upload: "up-peer",
    };
    let local = dir.join("blob");
    std::fs::copy(peer.home.join("blob"), &local)?;

    let mib = f64::from(effort.ssh_mib);
    for (what, measure) in [
        ("ssh cat, down", cat_down as fn(&Target, &Path) -> Result<Duration>),
        ("ssh cat, up", cat_up),
        ("sftp get", get),
        ("sftp put", put),
    ] {
        let (mut rates, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..effort.runs {
            rates.push(mib / measure(&ours, &local)?.as_secs_f64());
            peers.push(mib / measure(&peer, &local)?.as_secs_f64());
        }
        table.add(format!("{what}, {} MiB", effort.ssh_mib), "sshd", ("MiB/s", Better::More), &rates, &peers);
    }
    let (mut connects, mut peers) = (Vec::new(), Vec::new());
    for _ in 0..effort.runs * 2 {
        connects.push(time(&mut command(&ours, "true"), LIMIT)?.as_secs_f64());
        peers.push(time(&mut command(&peer, "true"), LIMIT)?.as_secs_f64());
    }
    table.add("ssh true", "sshd", ("s", Better::Less), &connects, &peers);
    table.note(format!("cipher with our ingress {}; with sshd {}", cipher(&ours)?, cipher(&peer)?));
    Ok(())
}

/// A client that runs `line` at the target.
fn command(target: &Target, line: &str) -> Command {
    let mut ssh = openssh("ssh", &target.key, &target.known_hosts);
    ssh.args(["-p", &target.port, &target.user, line]);
    ssh
}

/// Runs a client whose output is thrown away.
fn timed(mut client: Command) -> Result<Duration> {
    let begun = Instant::now();
    let child = client.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    finish("ssh", child, LIMIT)?;
    Ok(begun.elapsed())
}

fn cat_down(target: &Target, _: &Path) -> Result<Duration> {
    timed(command(target, &format!("cat {}", target.home.join("blob").display())))
}

fn cat_up(target: &Target, local: &Path) -> Result<Duration> {
    let mut ssh = command(target, "cat >/dev/null");
    ssh.stdin(std::fs::File::open(local)?);
    timed(ssh)
}

fn get(target: &Target, _: &Path) -> Result<Duration> {
    sftp(target, &format!("get {} /dev/null", target.home.join("blob").display()))
}

fn put(target: &Target, local: &Path) -> Result<Duration> {
    let remote = target.home.join(target.upload);
    let took = sftp(target, &format!("put {} {}", local.display(), remote.display()))?;
    run(&mut command(target, &format!("rm {} && sync", remote.display())), LIMIT)?;
    Ok(took)
}

fn sftp(target: &Target, line: &str) -> Result<Duration> {
    let batch = tempfile::NamedTempFile::new()?;
    std::fs::write(batch.path(), format!("{line}\n"))?;
    let mut sftp = openssh("sftp", &target.key, &target.known_hosts);
    sftp.args(["-q", "-P", &target.port, "-b"]).arg(batch.path()).arg(&target.user);
    timed(sftp)
}

/// The cipher of what comes down.
fn cipher(target: &Target) -> Result<String> {
    let mut ssh = openssh("ssh", &target.key, &target.known_hosts);
    let output = run(ssh.args(["-v", "-p", &target.port, &target.user, "true"]), LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let found = said.split("server->client cipher: ").nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok(found.unwrap_or("unknown").to_owned())
}

/// Starts an sshd that lets the key in, and says where its own is known.
fn sshd(dir: &Path, key: &Path, port: u16) -> Result<(Server, PathBuf)> {
    let host_key = dir.join("host_key");
    let mut keygen = Command::new("ssh-keygen");
    run(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&host_key), LIMIT)?;
    let known_hosts = dir.join("known_hosts");
    let public = std::fs::read_to_string(host_key.with_extension("pub"))?;
    std::fs::write(&known_hosts, format!("[127.0.0.1]:{port} {public}"))?;
    let authorized = dir.join("authorized_keys");
    std::fs::copy(key.with_extension("pub"), &authorized)?;
    let config = dir.join("sshd_config");
    std::fs::write(
        &config,
        format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n\
             LogLevel QUIET\nSetEnv HOME={}\n\
             Subsystem sftp /usr/lib/openssh/sftp-server\n",
            host_key.display(),
            authorized.display(),
            // What root's shell does at its start is no part of sshd.
            dir.display(),
        ),
    )?;
    // Its package leaves this to the init system.
    std::fs::create_dir_all("/run/sshd")?;
    let mut sshd = attached("/usr/sbin/sshd");
    sshd.args(["-D", "-e", "-f"]).arg(&config);
    let server = Server::start(sshd)?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    wait_for("sshd", Duration::from_secs(10), || Ok(TcpStream::connect(address).is_ok().then_some(())))?;
    Ok((server, known_hosts))
}
