//! By what names OpenSSH's client reaches a project, and by what keys it knows
//! who it has reached: through a host, through a proxy, and through a proxy that
//! only passes on; also while the master is away.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::{
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use world::{World, program, until};

struct Users {
    world: World,
    home: tempfile::TempDir,
    host: String,
    proxy: String,
}

impl Users {
    fn new(world: World) -> Self {
        let home = tempfile::Builder::new().prefix("cocalc-names-").tempdir().unwrap();
        let port = |name: &str| {
            let text = std::fs::read_to_string(world.dir.path().join(format!("{name}.toml"))).unwrap();
            let line = text.lines().find(|line| line.starts_with("ssh_listen")).unwrap();
            line.rsplit(':').next().unwrap().trim_end_matches('\'').to_owned()
        };
        let users = Self { host: port("alpha"), proxy: port("proxy"), world, home };
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(users.path("id"))
            .status()
            .unwrap();
        assert!(made.success());
        let key = std::fs::read_to_string(users.path("id.pub")).unwrap();
        users.world.ok("POST", "/ssh-keys", json!({ "key": key }));
        users.know();
        let config = format!(
            "Host *\n IdentityFile {}\n UserKnownHostsFile {}\n GlobalKnownHostsFile /dev/null\n \
             StrictHostKeyChecking yes\n UpdateHostKeys no\n IdentitiesOnly yes\n IdentityAgent none\n \
             BatchMode yes\n ConnectTimeout 60\n",
            users.path("id").display(),
            users.path("known").display(),
        );
        std::fs::write(users.path("config"), config).unwrap();
        users
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn cocalc(&self, arguments: &[&str]) -> Output {
        let mut cocalc = Command::new(program("cocalc"));
        cocalc.args(arguments).env("COCALC_URL", &self.world.url).env("COCALC_TOKEN", &self.world.admin);
        let output = cocalc.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.world.log());
        output
    }

    /// Knows the authority of hosts, and nothing else.
    fn know(&self) {
        std::fs::write(self.path("known"), self.cocalc(&["ssh-known-hosts"]).stdout).unwrap();
    }

    fn ssh(&self, arguments: &[&str]) -> Output {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(self.path("config")).args(arguments).arg("echo in").stdin(Stdio::null());
        ssh.output().unwrap()
    }

    /// Through the host, through the proxy, and through the proxy to the host.
    fn ways(&self, name: &str) -> [Vec<String>; 3] {
        let at = |port: &str| vec!["-p".to_owned(), port.to_owned(), format!("{name}@127.0.0.1")];
        let jump = format!("jump@127.0.0.1:{}", self.proxy);
        let passed = ["-J", &jump, "-o", "HostKeyAlias=127.0.0.1", &format!("{name}@{name}")];
        [at(&self.host), at(&self.proxy), passed.map(str::to_owned).to_vec()]
    }

    fn opens(&self, name: &str, options: &[&str]) {
        for way in self.ways(name) {
            let arguments: Vec<&str> =
                options.iter().copied().chain(way.iter().map(String::as_str)).collect();
            let mut last = None;
            until(&format!("{arguments:?}"), || {
                let output = self.ssh(&arguments);
                let good = output.stdout == b"in\n";
                last = Some(output);
                good.then_some(())
            });
        }
    }

    /// Whether there is such a name is not to be seen.
    fn refused(&self, name: &str) {
        for way in self.ways(name) {
            let arguments: Vec<&str> = way.iter().map(String::as_str).collect();
            let output = self.ssh(&arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("Permission denied"), "{arguments:?}: {said}\n{}", self.world.log());
        }
    }

    fn current_authority(&self) -> String {
        let output = self.cocalc(&["keys", "list", "--ssh-ca", "--output", "json"]);
        let keys: Value = serde_json::from_slice(&output.stdout).unwrap();
        let is = |key: &&Value| key["kind"] == "host" && key["state"] == "current";
        keys.as_array().unwrap().iter().find(is).unwrap()["fingerprint"].as_str().unwrap().to_owned()
    }
}

#[test]
fn names_lead_to_projects_and_keys_prove_their_hosts_also_without_a_master() {
    let mut world = World::new("");
    world.add_host("alpha", "");
    world.add_proxy("proxy");
    world.connected(1, 1);
    let begun = world.ok("POST", "/projects", json!({ "name": "thesis", "host": "alpha" }));
    world.settle(&begun);
    let project = begun["project"]["id"].as_str().unwrap().to_owned();
    world.settle(&world.ok("POST", &format!("/projects/{project}/start"), json!({})));
    world.ok("PUT", &format!("/projects/{project}/alias"), json!({ "alias": "thesis" }));
    let mut users = Users::new(world);

    let without_dashes = project.replace('-', "");
    for name in [&*project, &format!("project-{project}"), &without_dashes, "thesis"] {
        users.opens(name, &[]);
    }
    for nobody in ["nobody-here", "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b"] {
        users.refused(nobody);
    }

    // Clients that know no Ed25519 are shown an RSA key, with its certificate or,
    // if they have pinned it as it was published, without.
    let rsa = ["-o", "HostKeyAlgorithms=rsa-sha2-512-cert-v01@openssh.com"];
    users.opens(&project, &rsa);
    let mut pinned = String::new();
    for (list, kind, port) in [("/hosts", "hosts", &users.host), ("/proxies", "proxies", &users.proxy)] {
        let all = users.world.ok("GET", list, Value::Null);
        let keys = all[kind][0]["ssh_host_keys"].as_array().unwrap();
        let types: Vec<_> = keys.iter().map(|key| key.as_str().unwrap().split(' ').next().unwrap()).collect();
        assert_eq!(types, ["ssh-ed25519", "ssh-rsa"], "{list}");
        pinned += &format!("[127.0.0.1]:{port} {}\n", keys[1].as_str().unwrap());
        if kind == "hosts" {
            pinned += &format!("127.0.0.1 {}\n", keys[1].as_str().unwrap());
        }
    }
    std::fs::write(users.path("pinned"), pinned).unwrap();
    let known = format!("UserKnownHostsFile={}", users.path("pinned").display());
    for way in &users.ways(&project)[..2] {
        let plain = ["-o", &known, "-o", "HostKeyAlgorithms=rsa-sha2-512,rsa-sha2-256"];
        let arguments: Vec<&str> = plain.into_iter().chain(way.iter().map(String::as_str)).collect();
        let output = users.ssh(&arguments);
        assert_eq!(output.stdout, b"in\n", "{output:?}");
    }
    // The authority is replaced: keys of both types come with new certificates.
    users.cocalc(&["keys", "withdraw", &users.current_authority(), "--wait"]);
    users.know();
    users.opens(&project, &rsa);
    users.opens(&project, &["-o", "HostKeyAlgorithms=ssh-ed25519-cert-v01@openssh.com"]);

    // What was known goes on without the master, and what nobody knows is refused.
    users.world.kill("master");
    let full = std::env::var_os("COCALC_FULL").is_some();
    for round in 0..if full { 2 } else { 1 } {
        if round > 0 {
            // Until the answers of before are asked for again.
            std::thread::sleep(Duration::from_secs(35));
        }
        users.opens("thesis", &[]);
        users.opens(&project, &[]);
        users.refused("nobody-here");
    }
    users.world.start("master");
    until("the master", || users.world.call("GET", "/account", Value::Null).ok());
    users.world.connected(1, 1);
    users.opens("thesis", &[]);
}
