//! A federation under bad input and faults: it recovers by itself, and nobody
//! else notices.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{
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
    let api = |method: &str, path: &str, body: serde_json::Value| {
        let answer = curl(&[
            "-X",
            method,
            "-H",
            &format!("Authorization: Bearer {}", federation.json["master"]["admin_token"].as_str().unwrap()),
            "-H",
            "Content-Type: application/json",
            "-d",
            &body.to_string(),
            &format!("{}/api/v1{path}", federation.json["master"]["url"].as_str().unwrap()),
        ]);
        serde_json::from_str::<serde_json::Value>(&answer).unwrap_or_else(|_| panic!("{path}: {answer}"))
    };
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
