//! This machine's sshd, in a container of the projects' image, and before that
//! another one to jump over.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use super::LIMIT;
use crate::{
    Result,
    container::{self, Image},
    federation::Federation,
    processes,
    tool::{Server, attached, run, text, wait_for},
};

const SSHD: &str = "/usr/sbin/sshd";
/// Where the container has it.
const INSIDE: &str = "/opt/bench-sshd";
/// Of the container.
const NUMBER: u32 = 0;

/// Both servers, which end with the value.
#[derive(Debug)]
pub(super) struct Sshd {
    pub(super) dir: PathBuf,
    pub(super) port: u16,
    pub(super) jump_port: u16,
    pub(super) known_hosts: PathBuf,
    container: u32,
    jump: Server,
    /// Where root of the container is at home: on the same Btrfs as projects.
    _home: Home,
    _image: Image,
}

impl Sshd {
    pub(super) fn start(federation: &Federation) -> Result<Self> {
        let dir = federation.dir.join("ssh");
        std::fs::create_dir_all(&dir)?;
        let image = Image::import(federation)?;
        let home = Home::make(&federation.hosts()?[0].volume)?;
        let (port, jump_port) = (federation.base_port + 3, federation.base_port + 4);
        let host_key = dir.join("host_key");
        let mut keygen = Command::new("ssh-keygen");
        run(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&host_key), LIMIT)?;
        let public = std::fs::read_to_string(host_key.with_extension("pub"))?;
        let known_hosts = dir.join("peers_known");
        let line = |port: u16| format!("[127.0.0.1]:{port} {public}");
        std::fs::write(&known_hosts, line(port) + &line(jump_port))?;

        let inside = dir.join("sshd");
        collect(&inside, &host_key, &federation.key(), &image)?;
        std::fs::write(inside.join("config"), configuration(Path::new(INSIDE), port, "/root"))?;
        let outside = dir.join("sshd_config");
        std::fs::write(&outside, configuration(&inside, jump_port, &dir.display().to_string()))?;

        container::remove(NUMBER)?;
        let mut podman = image.podman(&["run", "--detach"], NUMBER);
        podman
            .args(["--network", "host", "--tmpfs", "/run/sshd:rw,mode=0755"])
            .args(["--env", &format!("LD_LIBRARY_PATH={INSIDE}/lib")]);
        for (source, target) in [
            (&inside, INSIDE),
            (&inside.join("passwd"), "/etc/passwd"),
            (&inside.join("group"), "/etc/group"),
        ] {
            podman.arg("--volume").arg(format!("{}:{target}:ro", source.display()));
        }
        podman.arg("--volume").arg(format!("{}:/root", home.0.display()));
        podman.args([image.name(), &format!("{INSIDE}/sshd"), "-D", "-e", "-f", &format!("{INSIDE}/config")]);
        run(&mut podman, LIMIT)?;
        // Its package leaves this to the init system.
        std::fs::create_dir_all("/run/sshd")?;
        let mut jump = attached(SSHD);
        jump.args(["-D", "-e", "-f"]).arg(&outside);
        let jump = Server::start(jump)?;
        for port in [port, jump_port] {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            wait_for("sshd", Duration::from_secs(20), || {
                Ok(TcpStream::connect(address).is_ok().then_some(()))
            })
            .map_err(|error| format!("{error}: {}", logs()))?;
        }
        let container = container::first_process(&container::name(NUMBER))?;
        Ok(Self { dir, port, jump_port, known_hosts, container, jump, _home: home, _image: image })
    }

    /// The processes of the server in the container, its users' not.
    pub(super) fn servers(&self) -> Result<Vec<u32>> {
        processes::named(self.container, "sshd")
    }

    /// The processes of the server before it.
    pub(super) fn jumps(&self) -> Result<Vec<u32>> {
        processes::named(self.jump.pid(), "sshd")
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if let Err(error) = container::remove(NUMBER) {
            eprintln!("{error}");
        }
    }
}

fn logs() -> String {
    let mut podman = Command::new("podman");
    text(podman.args(["logs", "--tail", "5", &container::name(NUMBER)]), LIMIT).unwrap_or_default()
}

/// As `ssh` into a project is: by key, no PAM; and room for many.
fn configuration(place: &Path, port: u16, home: &str) -> String {
    let place = place.display();
    format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host_key\n\
         AuthorizedKeysFile {place}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n\
         PasswordAuthentication no\nPermitRootLogin prohibit-password\nLogLevel ERROR\nUseDNS no\n\
         MaxStartups 1000:30:2000\nMaxSessions 1000\nSetEnv HOME={home}\n\
         Subsystem sftp /usr/lib/openssh/sftp-server\n"
    )
}

/// The server with what it needs, in a directory: its libraries but the C
/// library, which the image has, its keys, and a list of users that knows it.
fn collect(place: &Path, host_key: &Path, key: &Path, image: &Image) -> Result<()> {
    let libraries = place.join("lib");
    std::fs::create_dir_all(&libraries)?;
    // Through programs of their own: nobody else may have them open to write
    // when they are executed.
    let copy = |from: &Path, to: &Path| run(Command::new("cp").arg("-L").args([from, to]), LIMIT).map(drop);
    copy(Path::new(SSHD), &place.join("sshd"))?;
    let needs = text(Command::new("ldd").arg(SSHD), LIMIT)?;
    let own: BTreeSet<&str> = ["libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"].into();
    for line in needs.lines() {
        let Some((name, path)) = line.trim().split_once(" => ") else { continue };
        let path = path.split(' ').next().unwrap_or_default();
        if !own.contains(name) && path.starts_with('/') {
            copy(Path::new(path), &libraries.join(name))?;
        }
    }
    copy(host_key, &place.join("host_key"))?;
    copy(&key.with_extension("pub"), &place.join("authorized_keys"))?;
    let users = image.once("cat /etc/passwd")?;
    std::fs::write(place.join("passwd"), users + "sshd:x:65533:65533::/run/sshd:/usr/sbin/nologin\n")?;
    let groups = image.once("cat /etc/group")?;
    Ok(std::fs::write(place.join("group"), groups + "sshd:x:65533:\n")?)
}

/// A subvolume beside the projects, which goes with the value.
#[derive(Debug)]
struct Home(PathBuf);

impl Home {
    fn make(volume: &Path) -> Result<Self> {
        let home = Self(volume.join("bench-ssh"));
        run(Command::new("btrfs").args(["subvolume", "create"]).arg(&home.0), LIMIT)?;
        Ok(home)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // The container that has it is gone by now or goes with its image.
        let mut delete = Command::new("btrfs");
        if let Err(error) = run(delete.args(["subvolume", "delete"]).arg(&self.0), LIMIT) {
            eprintln!("{error}");
        }
    }
}
