//! A federation under bad input and faults: it recovers by itself, and nobody
//! else notices.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{
    collections::BTreeSet,
    io::Write,
    net::TcpStream,
    process::Command,
    time::{Duration, Instant},
};

use federation::{Federation, throw};
use serde_json::json;

/// One federation for all of it: starting one costs more than each fault.
#[test]
fn faults_are_survived() {
    let mut federation = Federation::up(18600, &["--storage", "btrfs", "--runner", "podman"]);
    works(&federation, "to begin with");

    garbage(&federation);
    works(&federation, "after garbage at every listener");

    startup(&federation);

    // While there is room: what is freed is not there again at once.
    volumes_within(&federation);

    full_volume(&federation);
    works(&federation, "after a full volume");

    full_quota(&federation);

    for victim in ["proxy", "host", "master"] {
        kill(&mut federation, victim);
        works(&federation, &format!("after kill -9 of the {victim}"));
    }

    move_under_kill(&mut federation);
    works(&federation, "after kill -9 of the master in the middle of a move");

    let started = federation.exec("cat ~/started").stdout;
    assert_eq!(started.iter().filter(|b| **b == b'\n').count(), 2, "once at each start: {started:?}");
    down_beside(&mut federation);
}

/// The tenant's start-up program runs once when the project starts; here and,
/// later, at the destination of the move.
fn startup(federation: &Federation) {
    let line = "mkdir -p ~/.cocalc; printf '#!/bin/sh\\necho started >>~/started\\n' >~/.cocalc/startup; \
        chmod +x ~/.cocalc/startup";
    assert!(federation.exec(line).status.success());
    let project = federation.project();
    federation.json(&["project", "stop", &project]);
    federation.json(&["project", "start", &project]);
    federation.wait_for("the start-up program", Duration::from_secs(30), || {
        federation.exec("cat ~/started").stdout == b"started\n"
    });
}

/// `cocalc down` while `cocalc up` runs ends that first, so that nothing is
/// started again behind its back.
fn down_beside(federation: &mut Federation) {
    let output =
        Command::new(federation::COCALC).args(["down", "--dir"]).arg(federation.data()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let deadline = Instant::now() + Duration::from_secs(30);
    while matches!(federation.child.try_wait(), Ok(None)) {
        assert!(Instant::now() < deadline, "cocalc up does not end: {}", federation.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let left = federation::leftovers(&federation.data());
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// The project answers a command, over SSH, within a deadline.
fn works(federation: &Federation, when: &str) {
    let mut last = None;
    federation.wait_for(&format!("the project to work {when}: {last:?}"), Duration::from_secs(90), || {
        let output = federation.exec("echo alive");
        let good = output.status.success() && output.stdout == b"alive\n";
        last = Some(output);
        good
    });
}

/// Random bytes, half handshakes and enormous headers, at every listener.
fn garbage(federation: &Federation) {
    let strip = |url: &serde_json::Value| url.as_str().unwrap().trim_start_matches("http://").to_owned();
    let json = &federation.json;
    let mut http = vec![strip(&json["master"]["url"]), strip(&json["proxy"]["url"])];
    let mut ssh = vec![strip(&json["proxy"]["ssh"])];
    let mut peers = Vec::new();
    for host in json["hosts"].as_array().unwrap() {
        http.push(strip(&host["url"]));
        ssh.push(strip(&host["ssh"]));
        let (address, port) = host["url"].as_str().unwrap().rsplit_once(':').unwrap();
        let port: u16 = port.parse().unwrap();
        peers.push(format!("{}:{}", address.trim_start_matches("http://"), port + 2));
    }
    let noise: Vec<u8> = (0..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut header = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ".to_vec();
    header.resize(10 << 20, b'a');
    let limit = Duration::from_secs(5);
    // Half-open connections stay while the others are tried.
    let half: Vec<TcpStream> = http
        .iter()
        .chain(&ssh)
        .chain(&peers)
        .map(|address| {
            let mut stream = TcpStream::connect(address).unwrap();
            let _ = stream.write_all(b"\x16\x03");
            stream
        })
        .collect();
    for address in http.iter().chain(&ssh).chain(&peers) {
        throw(address, &noise, limit);
    }
    for address in &http {
        let answer = throw(address, &header, limit);
        let status = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || status.starts_with("HTTP/1.1 4"),
            "{address} took 10 MB of header: {status}"
        );
    }
    for address in &ssh {
        throw(address, b"SSH-2.0-half\r\n", Duration::from_secs(1));
    }
    drop(half);
}

/// The project fills its host's volume: it is told so, and the host goes on.
fn full_volume(federation: &Federation) {
    let output = federation.exec("head -c 20G /dev/zero > ~/fill; sync ~/fill; echo status $?");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        said.contains("No space left on device") || said.contains("quota exceeded"),
        "20 GiB fitted into the volume? {said}"
    );
    let output = federation.exec("rm ~/fill && sync && echo freed");
    assert!(String::from_utf8_lossy(&output.stdout).contains("freed"), "{output:?}");
}

/// Uploads into a project with a limit of 20 MB, which never runs: what does not
/// fit is refused with its reason, leaves nothing behind, and harms no file.
fn full_quota(federation: &Federation) {
    let api = |method: &str, path: &str, body| api(federation, method, path, body);
    let begun = api("POST", "/projects", json!({ "name": "small", "quota_bytes": 20_000_000 }));
    let id = begun["project"]["id"].as_str().unwrap_or_else(|| panic!("{begun}")).to_owned();
    federation.wait_for("the small project", Duration::from_secs(120), || {
        let output = federation.cocalc(&["project", "show", &id, "--output", "json"]);
        String::from_utf8_lossy(&output.stdout).contains("\"stopped\"")
    });
    let connect = api("POST", &format!("/projects/{id}/connect"), json!({ "ttl_secs": 300 }));
    let bearer = format!("Authorization: Bearer {}", connect["token"].as_str().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    let noise: Vec<u8> = (0..60_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&large, noise).unwrap();
    let put = |url: &str, name: &str, content: &str| {
        curl(&["-i", "-T", content, "-H", &bearer, &format!("{url}files/{name}")])
    };
    let small = dir.path().join("small");
    std::fs::write(&small, "kept").unwrap();
    let urls = ["direct", "proxy"].map(|way| connect[way]["path_url"].as_str().unwrap().to_owned());
    let done = put(&urls[0], "kept", small.to_str().unwrap());
    assert!(done.contains(" 201 "), "{done}");
    for url in &urls {
        for name in ["kept", "new"] {
            let refused = put(url, name, large.to_str().unwrap());
            assert!(
                refused.contains(" 507 ")
                    && refused.contains("cocalc-code: no_space")
                    && refused.contains("ask for a higher limit"),
                "{url} {name}: {refused}"
            );
        }
        let listing = curl(&["-H", &bearer, &format!("{url}files/?format=json")]);
        let listing: serde_json::Value = serde_json::from_str(&listing).unwrap();
        let names: Vec<_> = listing["entries"].as_array().unwrap().iter().map(|e| &e["name"]).collect();
        assert!(names.contains(&&json!("kept")) && !names.contains(&&json!("new")), "{names:?}");
        assert_eq!(curl(&["-H", &bearer, &format!("{url}files/kept")]), "kept");
        // What was refused is given back when the file system has tidied up.
        federation.wait_for("the space of what was refused", Duration::from_secs(120), || {
            put(url, "fits", small.to_str().unwrap()).contains(" 20")
        });
    }
    federation.json(&["project", "delete", &id]);
}

/// What an operator makes in a project's tree with `btrfs`: subvolumes, and
/// snapshots of them. Whatever is asked for is done, or refused with its reason
/// and nothing done; and once they are gone, the project is as before.
fn volumes_within(federation: &Federation) {
    let project = federation.project();
    let homes = federation.json["hosts"].as_array().unwrap().iter().map(|host| {
        std::path::Path::new(host["volume"].as_str().unwrap()).join(format!("projects/{project}/home"))
    });
    let home = homes.into_iter().find(|home| home.exists()).unwrap();
    let btrfs = |arguments: &[&str]| {
        let done = Command::new("btrfs").args(arguments).current_dir(&home).output().unwrap();
        assert!(done.status.success(), "btrfs {arguments:?}: {done:?}");
    };
    let plant = || {
        std::fs::create_dir_all(home.join("work/plain")).unwrap();
        std::fs::write(home.join("work/plain/file"), "plain").unwrap();
        btrfs(&["subvolume", "create", "work/sub"]);
        btrfs(&["subvolume", "create", "work/sub/inner"]);
        std::fs::write(home.join("work/sub/file"), "sub").unwrap();
        std::fs::write(home.join("work/sub/inner/file"), "inner").unwrap();
    };
    plant();
    btrfs(&["subvolume", "snapshot", "-r", "work/sub", "work/frozen"]);

    let connect =
        api(federation, "POST", &format!("/projects/{project}/connect"), json!({ "ttl_secs": 300 }));
    let token = connect["token"].as_str().unwrap();
    let bearer = format!("Authorization: Bearer {token}");
    let files = format!("{}files", connect["direct"]["path_url"].as_str().unwrap());
    let ask = |method: &str, place: &str, more: &[&str]| {
        let url = format!("{files}{place}");
        curl(&[&["-i", "-X", method, "-H", &bearer], more, &[&url]].concat())
    };
    let outcome = |method: &str, place: &str, more: &[&str]| {
        let answer = ask(method, place, more);
        let code = answer.lines().find_map(|line| line.strip_prefix("cocalc-code: ")).unwrap_or("");
        format!("{} {code}", answer.split(' ').nth(1).unwrap()).trim().to_owned()
    };
    let to = |place: &str| {
        format!(
            "Destination: {}{place}",
            files.split_once("://").unwrap().1.split_once('/').map(|(_, path)| format!("/{path}")).unwrap()
        )
    };

    // They are read as folders, and are in archives.
    assert!(ask("GET", "/work/sub/inner/file", &[]).ends_with("inner"));
    assert!(ask("GET", "/work/frozen/file", &[]).ends_with("sub"));
    let archive = federation.dir.path().join("work.tar");
    curl(&["-o", archive.to_str().unwrap(), "-H", &bearer, &format!("{files}/work/?archive=tar")]);
    let listed = Command::new("tar").arg("-tf").arg(&archive).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for name in ["plain/file", "sub/file", "sub/inner/file", "frozen/file"] {
        assert!(listed.lines().any(|line| line.ends_with(name)), "{name}: {listed}");
    }

    let seen = || (names(&home), tree(&home.join("work")));
    let before = seen();
    for (method, place, destination, expected) in [
        ("DELETE", "/work/?recursive=true", None, "409 read_only"),
        ("DELETE", "/work/frozen/?recursive=true", None, "409 read_only"),
        ("DELETE", "/work/frozen/file", None, "409 read_only"),
        ("DELETE", "/work/sub/", None, "409 not_empty"),
        ("PUT", "/work/frozen/new", None, "409 read_only"),
        ("PUT", "/work/frozen/file", None, "409 read_only"),
        ("MKCOL", "/work/frozen/new", None, "409 read_only"),
        ("MOVE", "/work/sub/file", Some("/work/moved"), "409 other_volume"),
        ("MOVE", "/work/plain/file", Some("/work/sub/moved"), "409 other_volume"),
        ("MOVE", "/work/plain", Some("/work/sub/moved"), "409 other_volume"),
        ("MOVE", "/work/plain/file", Some("/work/frozen/file"), "409 read_only"),
        ("COPY", "/work", Some("/copied"), "409 not_copied"),
        ("COPY", "/work/plain/file", Some("/work/sub/copied"), "409 not_copied"),
        ("COPY", "/work/plain/file", Some("/work/frozen/copied"), "409 not_copied"),
        // What is there before would be kept as a snapshot, which cannot be.
        ("COPY", "/work/plain/file", Some("/work/sub"), "409 not_copied"),
    ] {
        let destination = destination.map(to);
        let more: Vec<&str> = match &destination {
            Some(destination) => vec!["-H", destination],
            None if method == "PUT" => vec!["-d", "x"],
            None => vec![],
        };
        assert_eq!(outcome(method, place, &more), expected, "{method} {place} {destination:?}");
        assert_eq!(seen(), before, "{method} {place} {destination:?}");
    }
    let refused = ask("DELETE", "/work/?recursive=true", &[]);
    assert!(refused.contains("work/frozen is a read-only subvolume"), "{refused}");

    // A file comes out of one, and one gets another name.
    assert_eq!(outcome("COPY", "/work/frozen/file", &["-H", &to("/work/copied")]), "201");
    assert_eq!(std::fs::read(home.join("work/copied")).unwrap(), b"sub");
    assert_eq!(outcome("PUT", "/work/sub/new", &["-d", "x"]), "201");
    assert_eq!(outcome("MOVE", "/work/sub", &["-H", &to("/work/renamed")]), "201");
    assert_eq!(std::fs::read(home.join("work/renamed/inner/file")).unwrap(), b"inner");

    btrfs(&["property", "set", "work/frozen", "ro", "false"]);
    assert_eq!(outcome("DELETE", "/work/?recursive=true", &[]), "204");
    assert!(!home.join("work").exists());
    // Nothing is left that a snapshot would be refused for.
    federation.json(&["snapshot", "create", &project, "--name", "after-volumes"]);
}

fn names(folder: &std::path::Path) -> BTreeSet<std::ffi::OsString> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// Every path below a folder, with the content of files.
fn tree(folder: &std::path::Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let (mut found, mut todo) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                todo.push(entry.path());
            }
            let content = if kind.is_file() { std::fs::read(entry.path()).unwrap() } else { vec![] };
            found.push((entry.path(), content));
        }
    }
    found.sort();
    found
}

/// The master's answer to the administrator.
fn api(federation: &Federation, method: &str, path: &str, body: serde_json::Value) -> serde_json::Value {
    let master = &federation.json["master"];
    let answer = curl(&[
        "-X",
        method,
        "-H",
        &format!("Authorization: Bearer {}", master["admin_token"].as_str().unwrap()),
        "-H",
        "Content-Type: application/json",
        "-d",
        &body.to_string(),
        &format!("{}/api/v1{path}", master["url"].as_str().unwrap()),
    ]);
    serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{path}: {answer}"))
}

fn curl(arguments: &[&str]) -> String {
    let fixed = ["--silent", "--show-error", "--max-time", "120", "--noproxy", "*"];
    let output = Command::new("curl").args(fixed).args(arguments).output().unwrap();
    assert!(output.status.success(), "curl {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// kill -9 of a daemon; `cocalc up` starts it again.
fn kill(federation: &mut Federation, victim: &str) {
    federation.reload();
    let pid = match victim {
        "host" => federation.json["hosts"][0]["pid"].clone(),
        other => federation.json[other]["pid"].clone(),
    };
    let before = federation.exec("cat /proc/1/stat").stdout;
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let path = federation.data().join("federation.json");
    federation.wait_for("federation.json to name the new process", Duration::from_secs(60), || {
        let text = std::fs::read_to_string(&path).unwrap();
        !text.contains(&format!("\"pid\": {pid}"))
    });
    works(federation, &format!("with the new {victim}"));
    let after = federation.exec("cat /proc/1/stat").stdout;
    let start = |stat: &[u8]| String::from_utf8_lossy(stat).split_whitespace().nth(21).map(str::to_owned);
    assert_eq!(start(&before), start(&after), "the project was started again");
}

/// The master dies at some moment of a move: afterwards the project has one
/// owner, and what was in it.
fn move_under_kill(federation: &mut Federation) {
    let project = federation.project();
    assert!(
        federation
            .exec("head -c 200M /dev/urandom > ~/ballast; sha256sum ~/ballast > ~/sum")
            .status
            .success()
    );
    let other = federation.json["hosts"][1]["name"].as_str().unwrap().to_owned();
    let url = federation.json["master"]["url"].as_str().unwrap().to_owned();
    let mut moving = Command::new(federation::COCALC)
        .args(["project", "move", &project, "--to", &other, "--url", &url])
        .args(["--token", federation.json["master"]["admin_token"].as_str().unwrap()])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    federation.wait_for("the move to begin", Duration::from_secs(30), || {
        let output = federation.cocalc(&["project", "show", &project, "--output", "json"]);
        String::from_utf8_lossy(&output.stdout).contains("moving")
            || begun.elapsed() > Duration::from_secs(10)
    });
    federation.reload();
    let pid = federation.json["master"]["pid"].to_string();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    // Whatever the command says: its master has died.
    let _ = moving.wait();
    federation.wait_for("the project to have left the move", Duration::from_secs(120), || {
        let output = federation.cocalc(&["project", "show", &project, "--output", "json"]);
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("\"running\"")
    });
    works(federation, "after the move");
    let output = federation.exec("cd ~ && sha256sum -c sum");
    assert!(output.status.success(), "{output:?}");
}
