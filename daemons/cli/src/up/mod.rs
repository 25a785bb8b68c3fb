//! `cocalc up`: a whole federation on this machine, one process per daemon.

mod configure;
mod exercise;
mod federation;
mod narrator;
mod pidfile;
mod plan;
mod slots;
mod supervise;
mod teardown;
mod volumes;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::{Value, json};

use self::{
    federation::Federation,
    narrator::{Narrator, done, told, wait_for},
    supervise::Supervisor,
};
pub(crate) use self::{
    plan::{Plan, btrfs_lack},
    teardown::down,
};
use crate::{
    api::Api,
    args::UpOptions,
    failure::{Exit, Failure, While},
    verbs::size,
};

/// How long a daemon may take until it answers.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long an operation may take.
const OPERATION_LIMIT: Duration = Duration::from_secs(120);

/// A running federation.
#[derive(Debug)]
pub(crate) struct Up {
    pub(crate) plan: Plan,
    pub(crate) supervisor: Supervisor,
    /// The sample account's API.
    pub(crate) user: Api,
    pub(crate) federation: Federation,
    /// The sample account's SSH key.
    pub(crate) key: PathBuf,
    pub(crate) known_hosts: PathBuf,
}

/// Runs `cocalc up`.
pub(crate) fn run(options: &UpOptions) -> Result<ExitCode, Failure> {
    let narrator = Narrator::new();
    let dir = prepare_dir(&options.dir.dir)?;
    // Held to the end: two federations must not share a directory.
    let _lock = cocalc_daemon::files::lock_directory(&dir).map_err(|e| {
        Failure::new(Exit::Conflict, format!("{} is in use by another `cocalc up` ({e})", dir.display()))
    })?;
    // What an earlier run left after a kill -9 is in the way.
    teardown::clear(&dir)?;
    // So that `cocalc down` ends this process first.
    configure::private_dir(&dir.join("up"))?;
    let own = dir.join("up").join("up.pid");
    pidfile::write(&own, std::process::id())?;
    let plan = Plan::new(options, dir.clone())?;
    check_ports(&plan)?;

    let interrupted = interrupts()?;
    let result = start(&plan, &narrator).and_then(|mut up| {
        if options.once {
            exercise::run(&mut up, &narrator)
        } else {
            welcome(&up);
            up.keep(interrupted)
        }
    });
    if let Err(failure) = &result {
        eprintln!("\ncocalc: {failure}");
        for log in std::fs::read_dir(plan.logs()).into_iter().flatten().flatten() {
            eprintln!("-- the end of {}:\n{}", log.path().display(), supervise::log_tail(&log.path(), 15));
        }
    }
    // `up` has been dropped: its daemons have drained and stopped.
    narrator.heading("Tearing down");
    let clean = teardown::verify(&plan, &narrator, options.once);
    pidfile::remove(&own);
    println!("{:.1} s in all", narrator.elapsed().as_secs_f64());
    match result.and(clean) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        // It was printed already, before the teardown.
        Err(failure) => Ok(failure.code()),
    }
}

/// Becomes true at Ctrl-C or SIGTERM; from then on the teardown runs, and a
/// second Ctrl-C does not cut it short.
fn interrupts() -> Result<&'static AtomicBool, Failure> {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                cocalc_daemon::shutdown_signal().await;
                INTERRUPTED.store(true, Ordering::Relaxed);
            }
        });
    });
    Ok(&INTERRUPTED)
}

fn prepare_dir(dir: &Path) -> Result<PathBuf, Failure> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .during(format!("cannot make {}", dir.display()))?;
    std::fs::canonicalize(dir).during(format!("cannot use {}", dir.display()))
}

/// Finds taken ports before anything is made.
fn check_ports(plan: &Plan) -> Result<(), Failure> {
    for port in plan.ports() {
        if let Err(error) = std::net::TcpListener::bind(("127.0.0.1", port)) {
            return Err(Failure::new(
                Exit::Conflict,
                format!("port {port} cannot be used ({error}); choose others with --base-port"),
            ));
        }
    }
    Ok(())
}

/// Brings everything up to a running sample project.
fn start(plan: &Plan, narrator: &Narrator) -> Result<Up, Failure> {
    narrator.heading("Starting a federation");
    for weaker in &plan.weaker {
        println!("weaker than it could be: {weaker}");
    }
    let image = narrator.step("project image", || volumes::image(plan))?;
    narrator.step("volumes", || volumes::make(plan))?;

    let supervisor = Supervisor::new();
    let admin_token = narrator.step("master", || {
        supervisor.start(configure::master(plan)?)?;
        let token = configure::admin_token(plan)?;
        wait_ready(&supervisor, "master", &plan.master_url())?;
        told(token, plan.master_url())
    })?;
    let admin = Api::new(&plan.master_url(), &admin_token);

    narrator.step("hosts and proxy, joined with one-use tokens", || {
        for host in &plan.hosts {
            let token = join_token(&admin, "host")?;
            supervisor.start(configure::host(plan, host, image.as_deref(), &token)?)?;
        }
        let token = join_token(&admin, "proxy")?;
        supervisor.start(configure::proxy(plan, &token)?)?;
        for host in &plan.hosts {
            wait_ready(&supervisor, &host.name, &format!("http://127.0.0.1:{}", host.port))?;
        }
        wait_ready(&supervisor, "proxy", &plan.proxy_url())?;
        told((), plan.hosts.iter().map(|h| h.name.as_str()).collect::<Vec<_>>().join(", "))
    })?;
    let hosts = connected(&admin, "hosts", plan.hosts.len())?;
    let proxies = connected(&admin, "proxies", 1)?;

    let key = plan.dir.join("demo_key");
    let user_token = narrator.step("account with an SSH key", || {
        let account = admin.post("/accounts", &json!({ "name": "demo" }))?;
        let id = string(&account, "id")?;
        let token = string(&admin.post(&format!("/accounts/{id}/tokens"), &json!({}))?, "token")?;
        configure::ssh_key(&key)?;
        let public = std::fs::read_to_string(key.with_extension("pub"))?;
        Api::new(&plan.master_url(), &token).post("/ssh-keys", &json!({ "key": public.trim() }))?;
        told(token, id)
    })?;
    let user = Api::new(&plan.master_url(), &user_token);

    let first = &plan.hosts[0].name;
    let project = narrator.step("project", || {
        let answer = user.post("/projects", &json!({ "name": "sample", "host": first }))?;
        user.wait(&string(&answer, "operation_id")?, OPERATION_LIMIT, |_| {})?;
        let id = string(&answer["project"], "id")?;
        // The administrator's token, which the commands to try next use, opens
        // no project by itself.
        let administrator = string(&admin.get("/account")?, "id")?;
        user.post(
            &format!("/projects/{id}/members"),
            &json!({ "account_id": administrator, "role": "owner" }),
        )?;
        told(id.clone(), format!("{id} on {first}"))
    })?;
    narrator.step("start", || {
        let answer = user.post(&format!("/projects/{project}/start"), &json!({}))?;
        user.wait(&string(&answer, "operation_id")?, OPERATION_LIMIT, |_| {})?;
        done()
    })?;

    let known_hosts = plan.dir.join("known_hosts");
    configure::known_hosts(plan, &hosts, &proxies, &known_hosts)?;
    let federation = describe(plan, &supervisor, &hosts, admin_token, project)?;
    federation.write(&plan.dir)?;
    Ok(Up { plan: plan.clone(), supervisor, user, federation, key, known_hosts })
}

fn describe(
    plan: &Plan,
    supervisor: &Supervisor,
    known: &[Value],
    admin_token: String,
    project: String,
) -> Result<Federation, Failure> {
    let pid = |name: &str| wait_for(format!("{name} to run"), READY_LIMIT, || Ok(supervisor.pid(name)));
    let hosts = plan
        .hosts
        .iter()
        .map(|host| {
            let row = known
                .iter()
                .find(|row| row["name"] == host.name.as_str())
                .ok_or_else(|| Failure::failed(format!("the master does not know {}", host.name)))?;
            Ok(federation::Host {
                id: string(row, "id")?,
                name: host.name.clone(),
                url: format!("http://127.0.0.1:{}", host.port),
                ssh: format!("127.0.0.1:{}", host.port + 1),
                storage: if plan.btrfs { "btrfs" } else { "directory" }.to_owned(),
                volume: host.volume(),
                pid: pid(&host.name)?,
            })
        })
        .collect::<Result<_, Failure>>()?;
    Ok(Federation {
        master: federation::Master { url: plan.master_url(), admin_token, pid: pid("master")? },
        proxy: federation::Proxy { url: plan.proxy_url(), ssh: plan.proxy_ssh(), pid: pid("proxy")? },
        hosts,
        project: federation::Project { id: project },
    })
}

impl Up {
    /// Stays up until `interrupted`, and keeps federation.json true when a
    /// daemon was started again.
    fn keep(&mut self, interrupted: &AtomicBool) -> Result<(), Failure> {
        let mut restarts = self.supervisor.restarts();
        while !interrupted.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.supervisor.restarts();
            if now != restarts {
                restarts = now;
                self.refresh()?;
            }
        }
        println!("\nstopping");
        Ok(())
    }

    /// Writes the process ids anew, after a daemon was started again. One that
    /// is down at this moment keeps its old id until it has a new one.
    pub(crate) fn refresh(&mut self) -> Result<(), Failure> {
        let renew = |pid: &mut u32, name: &str| *pid = self.supervisor.pid(name).unwrap_or(*pid);
        renew(&mut self.federation.master.pid, "master");
        renew(&mut self.federation.proxy.pid, "proxy");
        for host in &mut self.federation.hosts {
            renew(&mut host.pid, &host.name);
        }
        self.federation.write(&self.plan.dir)
    }
}

fn welcome(up: &Up) {
    let project = &up.federation.project.id;
    let dir = up.plan.dir.display();
    println!("\nThe federation is up.");
    println!("  master  {}", up.federation.master.url);
    println!("  proxy   {}  ssh {}", up.federation.proxy.url, up.federation.proxy.ssh);
    for host in &up.federation.hosts {
        println!("  {:<7} {}  ssh {}", host.name, host.url, host.ssh);
    }
    println!("  admin token  {}", up.federation.master.admin_token);
    println!("  everything else is in {dir}/federation.json");
    let cocalc = std::env::args().next().unwrap_or_else(|| "cocalc".to_owned());
    let (host, port) = up.federation.hosts[0].ssh.rsplit_once(':').unwrap_or(("127.0.0.1", "7811"));
    println!("\nTry next:");
    println!(
        "  export COCALC_URL={} COCALC_TOKEN={}",
        up.federation.master.url, up.federation.master.admin_token
    );
    println!("  {cocalc} project list");
    println!("  {cocalc} project exec {project} -- uname -a");
    println!("  ssh -i {dir}/demo_key -o UserKnownHostsFile={dir}/known_hosts -p {port} {project}@{host}");
    println!("  {cocalc} project open {project} --port 8000");
    if let Some(other) = up.federation.hosts.get(1) {
        println!("  {cocalc} project move {project} --to {}", other.name);
    }
    println!("\nCtrl-C stops everything and tears it down.");
}

/// Waits until so many hosts or proxies are connected, and lists them.
fn connected(admin: &Api, kind: &str, count: usize) -> Result<Vec<Value>, Failure> {
    wait_for(format!("{count} {kind} to connect"), READY_LIMIT, || {
        let answer = admin.get(&format!("/{kind}"))?;
        let rows = crate::output::items(&answer, kind).as_array().cloned().unwrap_or_default();
        let ready = rows.iter().filter(|row| row["state"] == "connected").count();
        Ok((ready == count).then_some(rows))
    })
}

fn join_token(admin: &Api, kind: &str) -> Result<String, Failure> {
    string(&admin.post("/join-tokens", &json!({ "kind": kind, "ttl_secs": 600 }))?, "token")
}

/// Waits until a daemon says that it works.
fn wait_ready(supervisor: &Supervisor, name: &str, url: &str) -> Result<(), Failure> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(2)))
        .http_status_as_error(false)
        .build()
        .into();
    let restarts = supervisor.restarts();
    wait_for(format!("{name} to be ready"), READY_LIMIT, || {
        if supervisor.restarts() > restarts + 2 {
            return Err(Failure::failed(format!("{name} keeps ending; see its log")));
        }
        Ok(agent.get(format!("{url}/readyz")).call().ok().filter(|r| r.status() == 200).map(|_| ()))
    })
}

/// A text field that the API promises.
pub(crate) fn string(value: &Value, key: &str) -> Result<String, Failure> {
    value[key]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::failed(format!("the master's answer has no {key:?}: {value}")))
}

/// Bytes and time as a rate, for people.
pub(crate) fn rate(bytes: u64, time: Duration) -> String {
    let per_second = (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64;
    format!("{} in {:.2} s, {}/s", size(bytes), time.as_secs_f64(), size(per_second))
}
