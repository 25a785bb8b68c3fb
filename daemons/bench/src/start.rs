//! From `project start` to the first byte of an app in the project, against
//! `podman run` of the same image with the same app.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Effort, Result,
    federation::{APP_PORT, Federation, split},
    table::{Better, Table, median},
    tool::{first_byte, run},
};

const LIMIT: Duration = Duration::from_secs(60);
const IMAGE: &str = "localhost/cocalc-bench";
const CONTAINER: &str = "cocalc-bench";

pub(crate) fn measure(federation: &Federation, effort: Effort, table: &mut Table) -> Result<()> {
    let project = federation.project();
    let peer = Peer::new(federation)?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    // The first of each warms caches and is not counted.
    for round in 0..=effort.runs {
        federation.change(project, "stop")?;
        let connect = federation.connect(project)?;
        let (address, path) = split(&connect.direct)?;
        let begun = Instant::now();
        let operation = federation.api(&format!("/projects/{project}/start"), Some(json!({})))?;
        first_byte(address, &path, Some(&connect.token), LIMIT)?;
        let took = begun.elapsed();
        federation.wait(&operation)?;
        let run = peer.once()?;
        if round > 0 {
            ours.push(took.as_secs_f64());
            peers.push(run.as_secs_f64());
            let shown = federation.api(&format!("/projects/{project}"), None)?;
            for phase in shown["phases"].as_array().into_iter().flatten() {
                if let (Some(name), Some(millis)) = (phase[0].as_str(), phase[1].as_f64()) {
                    phases.entry(name.to_owned()).or_default().push(millis);
                }
            }
        }
    }
    let unit = ("s", Better::Less);
    table.add("start to first byte", "podman run, published port", unit, &ours, &peers);
    let phases: Vec<String> =
        phases.iter().map(|(name, millis)| format!("{name} {:.0} ms", median(millis))).collect();
    table.note(format!("phases of a start, medians as the host reports them: {}", phases.join(", ")));
    Ok(())
}

/// The same image in podman's own storage.
struct Peer {
    app: PathBuf,
    address: SocketAddr,
}

impl Peer {
    fn new(federation: &Federation) -> Result<Self> {
        let peer =
            Self { app: federation.app()?, address: (Ipv4Addr::LOCALHOST, federation.base_port + 4).into() };
        peer.remove();
        let tar = image_tar(federation)?;
        run(
            Command::new("podman").args(["import", "--quiet"]).arg(tar).arg(IMAGE),
            Duration::from_secs(300),
        )?;
        Ok(peer)
    }

    fn once(&self) -> Result<Duration> {
        let mut podman = Command::new("podman");
        podman
            .args(["--runtime", "runc", "run", "--detach", "--quiet", "--name", CONTAINER, "--publish"])
            .arg(format!("{}:{APP_PORT}", self.address))
            // Its defaults need more than this machine may allow.
            .args(["--ulimit", "nofile=8192:8192", "--ulimit", "nproc=4096:4096"])
            .arg("--volume")
            .arg(format!("{}:/bench-app:ro", self.app.display()))
            .args([IMAGE, "/bench-app", &APP_PORT.to_string()]);
        let begun = Instant::now();
        let started =
            std::thread::spawn(move || run(&mut podman, LIMIT).map(drop).map_err(|e| e.to_string()));
        let answered = first_byte(self.address, "/", None, LIMIT);
        let took = begun.elapsed();
        started.join().map_err(|_| "a thread failed")??;
        answered?;
        self.remove_container()?;
        Ok(took)
    }

    fn remove_container(&self) -> Result<()> {
        let mut podman = Command::new("podman");
        run(podman.args(["rm", "--force", "--ignore", "--time", "0", CONTAINER]), LIMIT).map(drop)
    }

    fn remove(&self) {
        // There may be nothing.
        let _ = self.remove_container();
        let _ = run(Command::new("podman").args(["rmi", "--force", IMAGE]), LIMIT);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The file that the hosts imported their image from.
fn image_tar(federation: &Federation) -> Result<PathBuf> {
    let config = federation.dir.join("data/hosts").join(&federation.hosts()?[0].name).join("host.toml");
    let config = std::fs::read_to_string(config)?;
    let path = config
        .lines()
        .find_map(|line| line.strip_prefix("default_image_tar = "))
        .ok_or("the host has no image")?;
    Ok(serde_json::from_str::<PathBuf>(path)?)
}
