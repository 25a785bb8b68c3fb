//! The peers' containers: the image of the projects, in podman's own storage.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use crate::{
    Result,
    federation::{APP_PORT, Federation},
    tool::{run, text},
};

const LIMIT: Duration = Duration::from_secs(120);
const IMAGE: &str = "localhost/cocalc-bench";
/// Containers are named so and numbered: what a killed run left is found again.
const NAME: &str = "cocalc-bench";
/// What root may do in a project, too.
const CAPABILITIES: &str = "CHOWN,DAC_OVERRIDE,FOWNER,FSETID,KILL,SETGID,SETUID,SETPCAP,\
    NET_BIND_SERVICE,SYS_CHROOT,SETFCAP,AUDIT_WRITE";
/// The app as the first process would not end when it is told to: the kernel
/// delivers to that one only what it handles.
const FIRST: &str = "trap 'kill $app; exit 0' TERM; \"$@\" & app=$!; wait $app";

/// The image, until the value goes, and all containers of it with it.
#[derive(Debug)]
pub(crate) struct Image {
    app: PathBuf,
}

impl Image {
    /// Imports what the hosts have imported their image from.
    pub(crate) fn import(federation: &Federation) -> Result<Self> {
        let image = Self { app: federation.app()? };
        image.remove();
        let tar = image_tar(federation)?;
        run(
            Command::new("podman").args(["import", "--quiet"]).arg(tar).arg(IMAGE),
            Duration::from_secs(600),
        )?;
        Ok(image)
    }

    /// A call of podman that makes (`run --detach`, `create`) a container as
    /// projects are made: with their limits and capabilities, seccomp, files of
    /// its own, a log. Not with their range of user ids, for which podman would
    /// copy the image.
    pub(crate) fn podman(&self, verb: &[&str], number: u32) -> Command {
        let mut podman = Command::new("podman");
        podman
            .args(["--runtime", "runc", "--log-level", "error"])
            .args(verb)
            .args(["--quiet", "--name", &name(number), "--hostname", "bench", "--cgroupns", "private"])
            .args(["--cap-drop", "all", "--cap-add", CAPABILITIES, "--log-driver", "k8s-file"])
            .args(["--memory", "1g", "--cpus", "2", "--pids-limit", "4096", "--shm-size", "64m"])
            // Its defaults need more than this machine may allow.
            .args(["--ulimit", "nofile=8192:8192", "--ulimit", "nproc=4096:4096", "--ulimit", "core=0:0"]);
        podman
    }

    /// Adds the app of the projects and its port, and where that is reached.
    pub(crate) fn with_app(&self, mut podman: Command, address: SocketAddr) -> Command {
        podman
            .arg("--publish")
            .arg(format!("{address}:{APP_PORT}"))
            .arg("--volume")
            .arg(format!("{}:/bench-app:ro", self.app.display()))
            .args([IMAGE, "/bin/sh", "-c", FIRST, "sh", "/bench-app", &APP_PORT.to_string()]);
        podman
    }

    /// Runs a line in a container that goes at once.
    pub(crate) fn once(&self, line: &str) -> Result<String> {
        let mut podman = Command::new("podman");
        podman.args(["--runtime", "runc", "run", "--rm", "--network", "none"]);
        podman.args(["--ulimit", "nofile=8192:8192", "--ulimit", "nproc=4096:4096"]);
        text(podman.args([IMAGE, "/bin/sh", "-c", line]), LIMIT)
    }

    /// The name of the image.
    pub(crate) fn name(&self) -> &'static str {
        IMAGE
    }

    fn remove(&self) {
        // There may be nothing.
        let filter = format!("name=^{NAME}-[0-9]+$");
        let mut list = Command::new("podman");
        list.args(["ps", "--all", "--quiet", "--filter", &filter]);
        for id in text(&mut list, LIMIT).unwrap_or_default().split_whitespace() {
            let _ = run(Command::new("podman").args(["rm", "--force", "--time", "0", id]), LIMIT);
        }
        let _ = run(Command::new("podman").args(["rmi", "--force", IMAGE]), LIMIT);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The name of a peer's container.
pub(crate) fn name(number: u32) -> String {
    format!("{NAME}-{number}")
}

/// Removes a container, if it is there.
pub(crate) fn remove(number: u32) -> Result<()> {
    let mut podman = Command::new("podman");
    run(podman.args(["rm", "--force", "--ignore", "--time", "0", &name(number)]), LIMIT).map(drop)
}

/// The first process of a running container, as this machine numbers it.
pub(crate) fn first_process(container: &str) -> Result<u32> {
    let mut podman = Command::new("podman");
    podman.args(["container", "inspect", "--format", "{{.State.Pid}}", container]);
    Ok(text(&mut podman, LIMIT)?.trim().parse()?)
}

/// Where the app of a peer's container is published.
pub(crate) fn published(federation: &Federation, number: u32) -> Result<SocketAddr> {
    let port = u32::from(federation.base_port) + 100 + number;
    Ok((Ipv4Addr::LOCALHOST, u16::try_from(port)?).into())
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
