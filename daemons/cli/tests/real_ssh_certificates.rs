//! SSH certificates with real daemons and OpenSSH's own ssh and ssh-keygen:
//! through the host and through the proxy, without a registered key and
//! without a question about a fingerprint.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use federation::{COCALC, Federation};
use serde_json::{Value, json};

/// Every wait has an end; none is what is measured.
const LIMIT: Duration = Duration::from_secs(90);

/// A federation, and a user's `.ssh`.
struct World {
    federation: Federation,
    home: tempfile::TempDir,
    project: String,
    direct: String,
    proxy: String,
}

fn keygen(dir: &Path, arguments: &[&str]) {
    let output = Command::new("ssh-keygen").current_dir(dir).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn new_key(dir: &Path, name: &str) {
    keygen(dir, &["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", name]);
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl World {
    fn new(base_port: u16, storage: &str, runner: &str) -> Self {
        let federation =
            Federation::up(base_port, &["--storage", storage, "--runner", runner, "--hosts", "1"]);
        let project = federation.project();
        let home = tempfile::Builder::new().prefix("cocalc-ssh-").tempdir().unwrap();
        let ssh = |peer: &Value| peer["ssh"].as_str().unwrap().rsplit('@').next().unwrap().to_owned();
        let (direct, proxy) = (ssh(&federation.json["hosts"][0]), ssh(&federation.json["proxy"]));
        let world = Self { federation, home, project, direct, proxy };
        let known = world.federation.cocalc(&["ssh-known-hosts"]);
        assert!(known.status.success(), "{known:?}");
        assert!(out(&known).starts_with("@cert-authority 127.0.0.1,[127.0.0.1]:* ssh-ed25519 "), "{known:?}");
        std::fs::write(world.path("known_hosts"), &known.stdout).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Has `name` certified for the project by `token`'s account.
    fn certify(&self, token: Option<&str>, name: &str, options: &[&str]) -> Value {
        if !self.path(name).exists() {
            new_key(self.home.path(), name);
        }
        let file = self.path(&format!("{name}.pub")).display().to_string();
        let arguments =
            [&["project", "ssh-certificate", &self.project, &file, "--output", "json"], options].concat();
        let output = self.cocalc(token, &arguments);
        assert!(output.status.success(), "{output:?}\n{}", self.federation.log());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn cocalc(&self, token: Option<&str>, arguments: &[&str]) -> Output {
        let admin = self.federation.json["master"]["admin_token"].as_str().unwrap();
        Command::new(COCALC)
            .args(arguments)
            .env("COCALC_URL", self.federation.json["master"]["url"].as_str().unwrap())
            .env("COCALC_TOKEN", token.unwrap_or(admin))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// OpenSSH's client, which knows the authority and nothing else.
    fn command(&self, server: &str, user: &str, key: &str, arguments: &[&str]) -> Command {
        let (name, port) = server.rsplit_once(':').unwrap();
        let known = format!("UserKnownHostsFile={}", self.path("known_hosts").display());
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-p", port, "-l", user, "-i"]).arg(self.path(key));
        for option in [
            known.as_str(),
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
            "UpdateHostKeys=no",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "PreferredAuthentications=publickey",
            "ConnectTimeout=20",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args(arguments).arg(name);
        ssh
    }

    fn ssh(&self, server: &str, key: &str, arguments: &[&str], line: &str) -> Output {
        let mut ssh = self.command(server, &self.project, key, arguments);
        ssh.arg(line).stdin(Stdio::null()).output().unwrap()
    }

    fn opens(&self, server: &str, key: &str) {
        let output = self.ssh(server, key, &[], "echo in");
        assert_eq!(out(&output), "in\n", "{}\n{}", err(&output), self.federation.log());
    }

    fn refused(&self, server: &str, key: &str) {
        let output = self.ssh(server, key, &[], "echo in");
        assert_eq!(output.status.code(), Some(255), "{output:?}");
        assert!(err(&output).contains("Permission denied"), "{}", err(&output));
    }

    /// A session that stays, and says when it has begun.
    fn stay(&self, server: &str, key: &str) -> Child {
        use std::io::Read;
        let mut ssh = self.command(server, &self.project, key, &[]);
        ssh.arg("echo in; sleep 1000").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = ssh.spawn().unwrap();
        let mut word = [0; 3];
        let read = child.stdout.as_mut().unwrap().read_exact(&mut word);
        if read.is_err() || &word != b"in\n" {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the session did not begin: {read:?}\n{}", self.federation.log());
        }
        child
    }

    fn ends(&self, mut child: Child, why: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            match child.try_wait().unwrap() {
                Some(status) => return assert!(!status.success(), "{why}: {status}"),
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                None => {
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!("it was not ended: {why}\n{}", self.federation.log());
                }
            }
        }
    }

    fn until(&self, what: &str, look: impl FnMut() -> bool) {
        self.federation.wait_for(what, LIMIT, look);
    }

    /// The audit events of the host.
    fn audit(&self) -> Vec<Value> {
        let mut events = Vec::new();
        let mut folders = vec![self.federation.data()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.file_name().is_some_and(|name| name == "audit.log") {
                    let text = std::fs::read_to_string(path).unwrap_or_default();
                    let json = |line: &str| serde_json::from_str(line.split_once(' ')?.1).ok();
                    events.extend(text.lines().filter_map(json));
                }
            }
        }
        events
    }

    fn logged(&self, kind: &str, reason: &str) -> bool {
        let is = |event: &Value| {
            event["kind"] == kind && event["reason"].as_str().is_some_and(|said| said.contains(reason))
        };
        self.audit().iter().any(is)
    }

    /// A new account with its token, as a collaborator.
    fn collaborator(&self, name: &str) -> (String, String) {
        let account = self.federation.json(&["account", "create", name]);
        let (id, token) = (account["id"].as_str().unwrap(), account["token"].as_str().unwrap());
        self.federation.json(&["collaborator", "add", &self.project, id]);
        (id.to_owned(), token.to_owned())
    }
}

#[test]
fn certificates_open_projects_and_prove_hosts() {
    scenario(&World::new(19100, "directory", "process"));
}

#[test]
fn the_same_with_btrfs_and_podman() {
    scenario(&World::new(19300, "btrfs", "podman"));
}

fn scenario(world: &World) {
    let ways = [world.direct.clone(), world.proxy.clone()];

    // Both servers get their certificates soon after they have joined.
    let signed = world.certify(None, "id", &[]);
    for server in &ways {
        world.until("the server's certificate", || out(&world.ssh(server, "id", &[], "echo in")) == "in\n");
        let output = world.ssh(server, "id", &["-v"], "echo in");
        let said = err(&output);
        assert!(said.contains("Server host certificate: ssh-ed25519-cert-v01@openssh.com"), "{said}");
        assert!(said.contains("ED25519-CERT"), "{said}");
    }
    let (serial, key_id) = (signed["serial"].as_str().unwrap(), signed["key_id"].as_str().unwrap());
    assert!(key_id.contains(&world.project), "{key_id}");
    world.until("the audit event", || world.logged("login", &format!("certificate {serial} \"{key_id}\"")));
    world.until("the proxy's", || world.logged("login", "by proxy"));
    // Whoever does not know the authority is asked, as ever.
    std::fs::rename(world.path("known_hosts"), world.path("aside")).unwrap();
    let output = world.ssh(&world.direct, "id", &[], "echo in");
    assert!(err(&output).contains("Host key verification failed"), "{}", err(&output));
    std::fs::rename(world.path("aside"), world.path("known_hosts")).unwrap();

    the_command_line_needs_no_key(world);
    a_written_configuration_leads_through_the_proxy(world);
    what_is_wrong_is_refused(world, &ways);
    what_it_permits_is_all_it_opens(world, &ways);
    who_may_no_more_is_out(world, &ways);
    keys_inside_the_project(world, &ways);
    registered_keys_have_options(world, &ways);
    the_authority_is_withdrawn(world, &ways);
}

fn the_command_line_needs_no_key(world: &World) {
    for way in [&[][..], &["--via-proxy"]] {
        let arguments = [&["project", "ssh"], way, &[&world.project, "echo cli; exit 4"]].concat();
        let output = world.cocalc(None, &arguments);
        assert_eq!((out(&output).as_str(), output.status.code()), ("cli\n", Some(4)), "{}", err(&output));
    }
    let keys = world.federation.json(&["key", "list"]);
    assert_eq!(keys.as_array().map(Vec::len), Some(0), "{keys}");
}

/// End to end: the proxy passes the connection on, and the host proves itself.
fn a_written_configuration_leads_through_the_proxy(world: &World) {
    use std::io::Write;
    let key = world.path("id").display().to_string();
    // Another name, which is known at host and proxy.
    let named = world.federation.json(&["project", "alias", &world.project, "thesis"]);
    assert_eq!(named["alias"], "thesis", "{named}");
    for bad in ["project-5", "x", "jump", "Thesis"] {
        let refused = world.cocalc(None, &["project", "alias", &world.project, bad]);
        assert_eq!(refused.status.code(), Some(2), "{bad}: {}", err(&refused));
    }
    let written = world.cocalc(None, &["ssh-config", "--identity", &key]);
    assert!(written.status.success(), "{}", err(&written));
    let known = world.path("known_hosts");
    let all = format!(
        "{}Host *\n  UserKnownHostsFile {}\n  StrictHostKeyChecking yes\n  BatchMode yes\n  IdentityAgent none\n",
        out(&written),
        known.display()
    );
    assert!(all.contains("ProxyJump jump@"), "{all}");
    std::fs::write(world.path("config"), all).unwrap();
    let ssh = |arguments: &[&str]| {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(world.path("config")).args(arguments).stdin(Stdio::null());
        ssh.output().unwrap()
    };
    let output = ssh(&[&world.project, "echo in; exit 5"]);
    assert_eq!((out(&output).as_str(), output.status.code()), ("in\n", Some(5)), "{}", err(&output));
    let output = ssh(&["cocalc-thesis", "echo by name"]);
    assert_eq!(out(&output), "by name\n", "{}", err(&output));
    for address in [&world.direct, &world.proxy] {
        let (server, port) = address.rsplit_once(':').unwrap();
        let output = ssh(&["-i", &key, "-p", port, &format!("thesis@{server}"), "echo by name"]);
        assert_eq!(out(&output), "by name\n", "{}", err(&output));
    }
    // Ports of the project lead to the user, through the helper inside.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"hello");
        }
    });
    let there = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let remote = format!("{there}:127.0.0.1:{here}");
    let line = format!("bash -c 'exec 3<>/dev/tcp/127.0.0.1/{there}; cat <&3'");
    let output = ssh(&["-R", &remote, &world.project, &line]);
    assert_eq!(out(&output), "hello", "{}", err(&output));
    // A project that nobody knows leads to a host that refuses, too.
    let nobody = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b";
    let (host, _) = world.direct.rsplit_once(':').unwrap();
    let (proxy, port) = world.proxy.rsplit_once(':').unwrap();
    let jump = format!("jump@{proxy}:{port}");
    let alias = format!("HostKeyAlias={host}");
    let output = ssh(&["-J", &jump, "-o", &alias, "-i", &key, &format!("{nobody}@{nobody}"), "true"]);
    assert!(err(&output).contains("Permission denied"), "{}", err(&output));
    world.until("the begin", || world.logged("begin", "visit"));
    world.until("the end", || world.logged("end", "bytes out"));
}

fn what_is_wrong_is_refused(world: &World, ways: &[String]) {
    let dir = world.home.path();
    // Another authority, which says everything right.
    new_key(dir, "theirs");
    new_key(dir, "forged");
    let account = world.federation.json(&["account", "list"])[0]["id"].as_str().unwrap().to_owned();
    let project = &world.project;
    let key_id = format!("{account}/{project}/5");
    let grant = "extension:grant@cocalc.com=0 0";
    keygen(
        dir,
        &[
            "-q",
            "-s",
            "theirs",
            "-I",
            &key_id,
            "-z",
            "5",
            "-n",
            project,
            "-V",
            "-1m:+4m",
            "-O",
            grant,
            "forged.pub",
        ],
    );
    // A second project, for which the first one's certificate is nothing.
    let other = world.federation.json(&["project", "create", "other"]);
    let other = other["id"].as_str().or(other["project"]["id"].as_str()).unwrap().to_owned();
    world.certify(None, "far", &["--source-address", "10.0.0.0/8"]);
    world.certify(None, "near", &["--source-address", "127.0.0.0/8,::1"]);
    world.certify(None, "brief", &["--ttl", "1"]);
    new_key(dir, "bare");
    for server in ways {
        world.refused(server, "bare");
        world.refused(server, "forged");
        world.refused(server, "far");
        world.opens(server, "near");
        let output =
            world.command(server, &other, "near", &[]).arg("echo in").stdin(Stdio::null()).output().unwrap();
        assert!(err(&output).contains("Permission denied"), "{output:?}");
        world.until("the end of a certificate", || {
            err(&world.ssh(server, "brief", &[], "echo in")).contains("Permission denied")
        });
    }
    world.until("the denial", || world.logged("deny", "the certificate is of no authority that is trusted"));
    world.until("the denial", || world.logged("deny", "the certificate is not accepted from that address"));
    for (options, said) in [
        (&["--ttl", "3601"][..], "1 to 3600"),
        (&["--source-address", "10.0.0.*"], "source_address"),
        (&["--force-command", "a\nb"], "force_command"),
    ] {
        let file = world.path("bare.pub").display().to_string();
        let output = world.cocalc(None, &[&["project", "ssh-certificate", project, &file], options].concat());
        assert!(!output.status.success() && err(&output).contains(said), "{output:?}");
    }
}

fn what_it_permits_is_all_it_opens(world: &World, ways: &[String]) {
    world.certify(
        None,
        "forced",
        &["--force-command", "echo \"forced: $SSH_ORIGINAL_COMMAND\"", "--no-pty", "--no-port-forwarding"],
    );
    for server in ways {
        let output = world.ssh(server, "forced", &[], "cat /etc/shadow");
        assert_eq!(out(&output), "forced: cat /etc/shadow\n", "{}", err(&output));
        let output = world.ssh(server, "forced", &["-tt"], "id");
        assert!(err(&output).contains("PTY allocation request failed"), "{}", err(&output));
        let there = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let there = there.local_addr().unwrap().to_string();
        let mut ssh = world.command(server, &world.project, "forced", &["-W", &there]);
        let output = ssh.stdin(Stdio::null()).output().unwrap();
        assert!(!output.status.success() && err(&output).contains("open failed"), "{output:?}");
    }
}

fn who_may_no_more_is_out(world: &World, ways: &[String]) {
    for (at, server) in ways.iter().enumerate() {
        // Banned: what is open ends, and the certificate with it.
        let (id, token) = world.collaborator(&format!("bob-{at}"));
        let name = format!("bob-{at}");
        world.certify(Some(&token), &name, &[]);
        let open = world.stay(server, &name);
        world.federation.json(&["account", "ban", &id, "--wait"]);
        world.ends(open, "banned");
        world.refused(server, &name);
        // Signed out everywhere: the same, until they are certified again.
        let (id, token) = world.collaborator(&format!("carol-{at}"));
        let name = format!("carol-{at}");
        world.certify(Some(&token), &name, &[]);
        let open = world.stay(server, &name);
        world.federation.json(&["account", "sign-out", &id, "--wait"]);
        world.ends(open, "signed out");
        world.refused(server, &name);
        world.certify(Some(&token), &name, &[]);
        world.opens(server, &name);
        // No member any more: no certificate, and the old one is worth nothing.
        world.federation.json(&["collaborator", "remove", &world.project, &id, "--wait"]);
        world.refused(server, &name);
        let file = world.path(&format!("{name}.pub")).display().to_string();
        let output = world.cocalc(Some(&token), &["project", "ssh-certificate", &world.project, &file]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
    }
    // A viewer has no shell, whatever is certified.
    let account = world.federation.json(&["account", "create", "vera"]);
    let (id, token) = (account["id"].as_str().unwrap(), account["token"].as_str().unwrap());
    world.federation.json(&["collaborator", "add", &world.project, id, "--role", "viewer"]);
    new_key(world.home.path(), "vera");
    let file = world.path("vera.pub").display().to_string();
    let output = world.cocalc(Some(token), &["project", "ssh-certificate", &world.project, &file]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
}

fn keys_inside_the_project(world: &World, ways: &[String]) {
    new_key(world.home.path(), "inside");
    let key = std::fs::read_to_string(world.path("inside.pub")).unwrap().trim().to_owned();
    let list = |line: &str| {
        let line = line.replace('\'', "'\\''");
        let script = format!(
            "umask 077; mkdir -p ~/.ssh && chmod go-w ~ ~/.ssh && printf '%s\\n' '{line}' > ~/.ssh/authorized_keys"
        );
        let output = world.federation.exec(&script);
        assert!(output.status.success(), "{output:?}");
    };
    list(&key);
    let let_in = |yes: &str| {
        world.federation.json(&["project", "access", &world.project, "--authorized-keys", yes, "--wait"])
    };
    for server in ways {
        let_in("false");
        list(&key);
        world.refused(server, "inside");
        assert_eq!(let_in("true")["authorized_keys"], json!(true));
        world.opens(server, "inside");
        list(&format!("command=\"echo \\\"only: $SSH_ORIGINAL_COMMAND\\\"\",no-pty {key}"));
        let output = world.ssh(server, "inside", &[], "id");
        assert_eq!(out(&output), "only: id\n", "{}", err(&output));
        for refused in ["from=\"10.0.0.0/8\"", "expiry-time=\"20200101\"", "tunnel=\"0\"", "unheard-of"] {
            list(&format!("{refused} {key}"));
            world.refused(server, "inside");
        }
        list(&format!("from=\"127.0.0.0/8\" {key}"));
        let open = world.stay(server, "inside");
        let_in("false");
        world.ends(open, "its owner lets that list count no more");
    }
    world.until("the audit event", || world.logged("login", "authorized_keys SHA256:"));
    world.until("the reason", || world.logged("deny", "option `tunnel` is not supported here"));
    let event = world.audit().into_iter().find(|event| {
        event["kind"] == "login" && event["reason"].as_str().unwrap().starts_with("authorized_keys")
    });
    assert_eq!(event.unwrap()["account"], Value::Null);
}

fn registered_keys_have_options(world: &World, ways: &[String]) {
    new_key(world.home.path(), "mine");
    let key = std::fs::read_to_string(world.path("mine.pub")).unwrap();
    let file = world.path("line").display().to_string();
    let add = |options: &str| {
        std::fs::write(&file, format!("{options} {key}")).unwrap();
        world.cocalc(None, &["key", "add", &file, "--output", "json"])
    };
    let refused = add("tunnel=\"0\"");
    assert!(!refused.status.success(), "{refused:?}");
    assert!(err(&refused).contains("option `tunnel` is not supported here"), "{}", err(&refused));
    let added = add("command=\"echo registered\",no-pty");
    assert!(added.status.success(), "{added:?}");
    let added: Value = serde_json::from_slice(&added.stdout).unwrap();
    assert_eq!(added["options"], "command=\"echo registered\",no-pty");
    for server in ways {
        world.until("the key", || out(&world.ssh(server, "mine", &[], "id")) == "registered\n");
    }
    // The same key with other options is the same entry.
    let changed: Value = serde_json::from_slice(&add("from=\"10.0.0.0/8\"").stdout).unwrap();
    assert_eq!(changed["id"], added["id"]);
    for server in ways {
        world
            .until("the change", || err(&world.ssh(server, "mine", &[], "id")).contains("Permission denied"));
    }
    world.federation.json(&["key", "remove", added["id"].as_str().unwrap()]);
}

fn the_authority_is_withdrawn(world: &World, ways: &[String]) {
    let current = |kind: &str| {
        let keys = world.federation.json(&["keys", "list", "--ssh-ca"]);
        let is = |key: &&Value| key["kind"] == kind && key["state"] == "current";
        keys.as_array().unwrap().iter().find(is).unwrap()["fingerprint"].as_str().unwrap().to_owned()
    };
    world.certify(None, "last", &[]);
    let open = world.stay(&ways[0], "last");
    let proxied = world.stay(&ways[1], "last");
    // Rotation drops nobody.
    world.federation.json(&["keys", "rotate", "--ssh-ca", "user", "--force", "--wait"]);
    for server in ways {
        world.opens(server, "last");
    }
    world.certify(None, "newer", &[]);
    let keys = world.federation.json(&["keys", "list", "--ssh-ca"]);
    let former =
        keys.as_array().unwrap().iter().find(|key| key["kind"] == "user" && key["state"] == "former");
    let former = former.unwrap()["fingerprint"].as_str().unwrap().to_owned();
    world.federation.json(&["keys", "withdraw", &former, "--wait"]);
    world.ends(open, "the authority was withdrawn");
    world.ends(proxied, "the authority was withdrawn");
    for server in ways {
        world.refused(server, "last");
        world.opens(server, "newer");
    }

    // The authority of hosts: the servers come with certificates of another
    // key, which was published before.
    let withdrawn = current("host");
    world.federation.json(&["keys", "withdraw", &withdrawn, "--wait"]);
    let known = world.federation.cocalc(&["ssh-known-hosts"]);
    assert!(out(&known).contains("@revoked * ssh-ed25519 "), "{known:?}");
    std::fs::write(world.path("known_hosts"), &known.stdout).unwrap();
    for server in ways {
        world.until("the new certificate", || out(&world.ssh(server, "newer", &[], "echo in")) == "in\n");
    }
}
