//! A federation by `cocalc up`, and the ways to use it.

use std::{
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    Result,
    container::first_process,
    tool::{attached, end, finish, first_byte, run, text, wait_for},
};

/// The app that is measured.
const APP: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/app"));
/// The port in the project that it listens on.
pub(crate) const APP_PORT: u16 = 8000;
/// A cold federation builds its image first.
const UP_LIMIT: Duration = Duration::from_secs(600);
/// An operation of the master.
pub(crate) const OPERATION_LIMIT: Duration = Duration::from_secs(300);

/// What a host lets one address or account do.
const LIMITS: [&str; 12] = [
    "SOURCE_PER_SEC",
    "SOURCE_BURST",
    "ACCOUNT_PER_SEC",
    "ACCOUNT_BURST",
    "PROJECT_PER_SEC",
    "PROJECT_BURST",
    "HOST_PER_SEC",
    "HOST_BURST",
    "CONNECTIONS",
    "CONNECTIONS_PER_SOURCE",
    "SSH_CONNECTIONS",
    "SSH_CONNECTIONS_PER_SOURCE",
];

/// A running federation, which ends with the value.
#[derive(Debug)]
pub(crate) struct Federation {
    child: Child,
    /// The directory of the bench, and below it the federation's.
    pub(crate) dir: PathBuf,
    pub(crate) base_port: u16,
    described: Described,
    agent: ureq::Agent,
}

/// What federation.json says.
#[derive(Debug, Default, Deserialize)]
struct Described {
    master: Master,
    proxy: Proxy,
    hosts: Vec<Host>,
    project: Project,
}

#[derive(Debug, Default, Deserialize)]
struct Master {
    url: String,
    admin_token: String,
}

#[derive(Debug, Default, Deserialize)]
struct Proxy {
    pid: u32,
}

/// A host of the federation.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Host {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) storage: String,
    pub(crate) volume: PathBuf,
    pub(crate) pid: u32,
}

#[derive(Debug, Default, Deserialize)]
struct Project {
    id: String,
}

/// A token and where to show it.
#[derive(Debug)]
pub(crate) struct Connect {
    pub(crate) token: String,
    /// Addresses of the app, directly and through the proxy.
    pub(crate) direct: String,
    pub(crate) proxy: String,
    /// `user@host` and port.
    pub(crate) ssh: (String, String),
    /// The same at the proxy, as one text.
    pub(crate) proxy_ssh: String,
}

impl Federation {
    /// Starts it, and waits until its project runs.
    pub(crate) fn up(dir: &Path, base_port: u16) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let dir = std::fs::canonicalize(dir)?;
        let log = std::fs::File::create(dir.join("up.log"))?;
        eprintln!("starting a federation, see {}", dir.join("up.log").display());
        let child = attached(&cocalc()?)
            .args(["up", "--base-port", &base_port.to_string(), "--dir"])
            .arg(dir.join("data"))
            .args(["--storage", "btrfs", "--runner", "podman"])
            // One user at one address is all the load here: what the ingresses
            // cost is measured, not whom they slow down.
            .envs(LIMITS.map(|limit| (format!("COCALC_HOST_LIMITS_{limit}"), "1000000")))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(30)))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        let mut federation = Self { child, dir, base_port, described: Described::default(), agent };
        let path = federation.data().join("federation.json");
        wait_for("federation.json", UP_LIMIT, || {
            if let Some(status) = federation.child.try_wait()? {
                let log = std::fs::read_to_string(federation.dir.join("up.log")).unwrap_or_default();
                return Err(format!("cocalc up ended with {status}:\n{log}").into());
            }
            std::thread::sleep(Duration::from_millis(100));
            Ok(path.exists().then_some(()))
        })?;
        federation.described = serde_json::from_slice(&std::fs::read(&path)?)?;
        Ok(federation)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The sample project, which has an app after [`install_app`](Self::install_app).
    pub(crate) fn project(&self) -> &str {
        &self.described.project.id
    }

    /// Two hosts, the sample project on the first.
    pub(crate) fn hosts(&self) -> Result<[&Host; 2]> {
        match self.described.hosts.as_slice() {
            [first, second, ..] => Ok([first, second]),
            _ => Err("a federation without two hosts".into()),
        }
    }

    /// The process of the proxy.
    pub(crate) fn proxy_pid(&self) -> u32 {
        self.described.proxy.pid
    }

    /// The first process of a running project, as this machine numbers it.
    pub(crate) fn first_process(&self, project: &str) -> Result<u32> {
        let mut podman = Command::new("podman");
        podman.args(["ps", "--quiet", "--filter", &format!("label=cocalc.project={project}")]);
        let found = text(&mut podman, Duration::from_secs(60))?;
        first_process(found.split_whitespace().next().ok_or("the project has no container that runs")?)
    }

    /// Calls the master: without a body to read, with one to change.
    pub(crate) fn api(&self, path: &str, body: Option<Value>) -> Result<Value> {
        for _ in 0..30 {
            match self.call(path, body.clone())? {
                Some(answer) => return Ok(answer),
                // Only when thousands of projects are made.
                None => std::thread::sleep(Duration::from_secs(1)),
            }
        }
        Err(format!("{path}: the master lets nobody in for half a minute").into())
    }

    /// `None` if it was one call too many.
    fn call(&self, path: &str, body: Option<Value>) -> Result<Option<Value>> {
        let master = &self.described.master;
        let url = format!("{}/api/v1{path}", master.url);
        let bearer = format!("Bearer {}", master.admin_token);
        let answer = match body {
            Some(body) => self.agent.post(&url).header("authorization", &bearer).send_json(body),
            None => self.agent.get(&url).header("authorization", &bearer).call(),
        };
        let mut answer = answer.map_err(|error| format!("{path}: {error}"))?;
        let text = answer.body_mut().read_to_string()?;
        if answer.status().is_success() {
            Ok(Some(serde_json::from_str(&text)?))
        } else if answer.status() == 429 {
            Ok(None)
        } else {
            Err(format!("{path}: {} {text}", answer.status()).into())
        }
    }

    /// Waits for the operation that a call began, and returns it.
    pub(crate) fn wait(&self, begun: &Value) -> Result<Value> {
        let id = field(begun, "operation_id")?;
        let since = Instant::now();
        wait_for("an operation", OPERATION_LIMIT, || {
            let seen = self.api(&format!("/operations/{id}"), None)?;
            match seen["state"].as_str() {
                Some("done") => Ok(Some(seen)),
                Some("running") => {
                    // What takes long need not be known to the millisecond.
                    let pause =
                        (since.elapsed() / 50).clamp(Duration::from_millis(8), Duration::from_millis(100));
                    std::thread::sleep(pause);
                    Ok(None)
                }
                _ => Err(format!("operation {id} ended so: {seen}").into()),
            }
        })
    }

    /// Changes a project and waits until that is done.
    pub(crate) fn change(&self, project: &str, what: &str) -> Result<()> {
        self.wait(&self.api(&format!("/projects/{project}/{what}"), Some(json!({})))?).map(drop)
    }

    /// Deletes a project and waits until it is gone.
    pub(crate) fn delete(&self, project: &str) -> Result<()> {
        let mut cocalc = self.cocalc()?;
        run(cocalc.args(["project", "delete", project]), OPERATION_LIMIT).map(drop)
    }

    /// The command line, as the administrator.
    fn cocalc(&self) -> Result<Command> {
        let mut command = Command::new(cocalc()?);
        command
            .env("COCALC_URL", &self.described.master.url)
            .env("COCALC_TOKEN", &self.described.master.admin_token);
        Ok(command)
    }

    /// Changes what a project may use, with the options of `cocalc project limits`.
    pub(crate) fn limits(&self, project: &str, options: &[&str]) -> Result<()> {
        let mut cocalc = self.cocalc()?;
        run(cocalc.args(["project", "limits", project]).args(options), OPERATION_LIMIT).map(drop)
    }

    /// A token for the project, for five minutes.
    pub(crate) fn connect(&self, project: &str) -> Result<Connect> {
        let answer = self
            .api(&format!("/projects/{project}/connect"), Some(json!({ "ttl_secs": 300, "use": "multi" })))?;
        let app = |way: &str| {
            Ok::<_, crate::Error>(format!("{}port/{APP_PORT}/", field(&answer[way], "path_url")?))
        };
        let ssh = field(&answer["direct"], "ssh")?;
        let (user, port) = ssh.rsplit_once(':').ok_or("an SSH address without a port")?;
        Ok(Connect {
            token: field(&answer, "token")?,
            direct: app("direct")?,
            proxy: app("proxy")?,
            ssh: (user.to_owned(), port.to_owned()),
            proxy_ssh: field(&answer["proxy"], "ssh")?,
        })
    }

    /// The cookie of a browser's session, for which the token is redeemed.
    pub(crate) fn session(&self, connect: &Connect) -> Result<String> {
        let url = format!("{}?cocalc_token={}", connect.direct, connect.token);
        let request = self.agent.get(&url).config().max_redirects(0).build();
        let answer = request.call().map_err(|error| format!("a session: {error}"))?;
        let cookie = answer.headers().get("set-cookie").and_then(|cookie| cookie.to_str().ok());
        let cookie = cookie.and_then(|cookie| cookie.split(';').next());
        Ok(cookie.ok_or_else(|| format!("a session: {} without a cookie", answer.status()))?.to_owned())
    }

    /// Runs a line of shell in a project.
    pub(crate) fn exec(&self, project: &str, line: &str, limit: Duration) -> Result<String> {
        text(self.cocalc()?.args(["project", "exec", project, "--", "sh", "-c", line]), limit)
    }

    /// A program of OpenSSH, as the owner of the sample project.
    pub(crate) fn openssh(&self, program: &str) -> Command {
        let data = self.data();
        openssh(program, &data.join("demo_key"), &data.join("known_hosts"))
    }

    /// The key of the owner of the sample project.
    pub(crate) fn key(&self) -> PathBuf {
        self.data().join("demo_key")
    }

    /// Puts the app into the sample project, where it runs from now on whenever
    /// the project runs, and waits until it answers.
    pub(crate) fn install_app(&self) -> Result<()> {
        let app = self.app()?;
        let connect = self.connect(self.project())?;
        let mut child = self
            .openssh("ssh")
            .args(["-p", &connect.ssh.1, &connect.ssh.0])
            .arg(format!(
                "mkdir -p ~/.cocalc && cat >~/bench-app && chmod +x ~/bench-app \
                 && printf '#!/bin/sh\\nexec ~/bench-app {APP_PORT}\\n' >~/.cocalc/startup \
                 && chmod +x ~/.cocalc/startup && setsid -f ~/.cocalc/startup </dev/null >/dev/null 2>&1"
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&std::fs::read(app)?)?;
        }
        finish("ssh", child, Duration::from_secs(60))?;
        self.wait_for_app()
    }

    /// Waits until the app of the sample project answers.
    pub(crate) fn wait_for_app(&self) -> Result<()> {
        let connect = self.connect(self.project())?;
        let (address, path) = split(&connect.direct)?;
        first_byte(address, &path, Some(&connect.token), Duration::from_secs(60))
    }

    /// The app as a file on this machine.
    pub(crate) fn app(&self) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.join("bench-app");
        if !path.exists() {
            std::fs::write(&path, APP)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        }
        Ok(path)
    }

    /// The network namespace of the sample project.
    pub(crate) fn namespace(&self) -> Result<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let namespace = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .find(|path| path.contains(&self.described.hosts[0].id) && path.ends_with(self.project()))
            .ok_or("the network namespace of the project is not to be found")?;
        Ok(namespace.into())
    }

    /// A command that runs in the network namespace of the sample project.
    pub(crate) fn inside(&self, program: &str) -> Result<Command> {
        let mut command = attached("nsenter");
        command.arg(format!("--net={}", self.namespace()?.display())).arg(program);
        Ok(command)
    }
}

impl Drop for Federation {
    fn drop(&mut self) {
        eprintln!("tearing down");
        end(&mut self.child, Duration::from_secs(90));
        let Ok(cocalc) = cocalc() else { return };
        let down =
            run(Command::new(cocalc).args(["down", "--dir"]).arg(self.data()), Duration::from_secs(90));
        if let Err(error) = down {
            eprintln!("{error}");
        }
    }
}

/// A program of OpenSSH with nothing of this user's configuration.
pub(crate) fn openssh(program: &str, key: &Path, known_hosts: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .args(["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"])
        .args(["-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=20", "-o", "Compression=no"])
        .arg("-o")
        .arg(format!("UserKnownHostsFile={}", known_hosts.display()))
        .arg("-i")
        .arg(key)
        .stdin(Stdio::null());
    command
}

/// A text that the API promises.
pub(crate) fn field(value: &Value, key: &str) -> Result<String> {
    let text = value[key].as_str().ok_or_else(|| format!("no {key:?} in {value}"))?;
    Ok(text.to_owned())
}

/// Address and path of an `http` URL on this machine.
pub(crate) fn split(url: &str) -> Result<(SocketAddr, String)> {
    let rest = url.strip_prefix("http://").ok_or_else(|| format!("not http: {url}"))?;
    let (authority, path) = rest.split_once('/').ok_or_else(|| format!("no path: {url}"))?;
    Ok((authority.replace("localhost", "127.0.0.1").parse()?, format!("/{path}")))
}

/// The command line, which was built beside this program.
fn cocalc() -> Result<String> {
    let path = std::env::current_exe()?.with_file_name("cocalc");
    if !path.is_file() {
        return Err(format!("{} is missing: build all programs first", path.display()).into());
    }
    Ok(path.to_string_lossy().into_owned())
}
