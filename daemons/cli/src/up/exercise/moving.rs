//! Moving the project while its app is polled.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    access::answers,
    reach::{Answer, Connect, Echo, Way, agent, ensure, get_with, ssh},
};
use crate::{
    api::Api,
    failure::Failure,
    up::{
        OPERATION_LIMIT, Up,
        narrator::{Narrator, done, told},
        string,
    },
};

/// How often the app is polled during the move.
const POLL: Duration = Duration::from_millis(20);

/// Installs a package with the system's own tools: built and installed inside,
/// so that the exercise needs no network.
const INSTALL: &str = "set -e; d=$(mktemp -d); mkdir -p $d/DEBIAN $d/usr/local/bin; \
    printf 'Package: cocalc-moved\\nVersion: 1\\nArchitecture: all\\nMaintainer: demo <demo@example.org>\\n\
Description: shows that packages move\\n' > $d/DEBIAN/control; \
    printf '#!/bin/sh\\necho moved along\\n' > $d/usr/local/bin/cocalc-moved; \
    chmod 755 $d/usr/local/bin/cocalc-moved; dpkg-deb --root-owner-group -b $d /tmp/moved.deb >/dev/null; \
    sudo dpkg -i /tmp/moved.deb >/dev/null; cocalc-moved";

/// What was seen of the app during the move.
#[derive(Debug, Default)]
struct Polled {
    asked: u32,
    /// Told that the project has moved and a new token is needed, which was
    /// got; the same poll then went on.
    renewed: u32,
    failed: u32,
    longest: Duration,
    first_failure: Option<String>,
}

/// Moves the project to the second host, and insists that it is the same.
pub(super) fn run(up: &Up, narrator: &Narrator) -> Result<(), Failure> {
    let [from, to, ..] = up.federation.hosts.as_slice() else {
        return Ok(());
    };
    let trees = if up.plan.podman {
        "tree /usr/local/bin/cocalc-moved /var/lib/dpkg/info/cocalc-moved.list"
    } else {
        "tree"
    };
    let prepared = if up.plan.podman {
        "files of every kind, and a package installed inside"
    } else {
        "files of every kind"
    };
    let before = narrator.step(prepared, || {
        let connect = Connect::long(up)?;
        ssh(up, &connect, Way::Direct, "cd ~ && python3 tree.py make tree >/dev/null")?;
        if up.plan.podman {
            let said = ssh(up, &connect, Way::Direct, INSTALL)?;
            ensure(said.contains("moved along"), format!("the package says {said:?}"))?;
        }
        told(manifest(up, trees)?, "")
    })?;
    let snapshots = format!("/projects/{}/snapshots", up.federation.project.id);
    let taken = narrator.step("two snapshots", || {
        for name in ["demo-one", "demo-two"] {
            let answer = up.user.post(&snapshots, &json!({ "name": name }))?;
            up.user.wait(&string(&answer, "operation_id")?, OPERATION_LIMIT, |_| {})?;
        }
        let taken = up.user.get(&snapshots)?;
        told(taken, "")
    })?;

    let old = Connect::long(up)?;
    let polled =
        narrator.step(format!("move from {} to {}, polled through the proxy", from.name, to.name), || {
            let stop = Arc::new(AtomicBool::new(false));
            let poller = Poller::new(up)?;
            let polling = {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || poller.run(&stop))
            };
            let begun = Instant::now();
            let moved = (|| {
                let project = &up.federation.project.id;
                let answer = up.user.post(&format!("/projects/{project}/move"), &json!({ "to": to.name }))?;
                up.user.wait(&string(&answer, "operation_id")?, OPERATION_LIMIT, |_| {})
            })();
            let time = begun.elapsed();
            // The app must answer again before the polling ends.
            let answered = moved.and_then(|_| answers(&Connect::long(up)?, Way::Proxy));
            stop.store(true, Ordering::Relaxed);
            let polled = polling.join().map_err(|_| Failure::failed("the poller panicked"))?;
            answered?;
            let project = up.user.get(&format!("/projects/{}", up.federation.project.id))?;
            ensure(project["host_id"] == to.id.as_str(), format!("it is still elsewhere: {project}"))?;
            told(polled, format!("{:.2} s", time.as_secs_f64()))
        })?;
    let failures = match &polled.first_failure {
        Some(first) => format!("{} of {} polls failed (first: {first})", polled.failed, polled.asked),
        None => format!("{} polls, none failed", polled.asked),
    };
    println!(
        "           {failures}, {} got a new token on the way; longest time without an answer {:.2} s",
        polled.renewed,
        polled.longest.as_secs_f64()
    );

    narrator.step("everything is equal after the move", || {
        let after = manifest(up, trees)?;
        if before != after {
            return Err(Failure::failed(difference(&before, &after)));
        }
        told((), format!("{} entries", before["entries"].as_object().map_or(0, serde_json::Map::len)))
    })?;
    narrator.step("its snapshots came along", || {
        let kept = up.user.get(&snapshots)?;
        // There may be new ones: its new host takes some by itself.
        let list = |all: &serde_json::Value| all["snapshots"].as_array().cloned().unwrap_or_default();
        let here = list(&kept);
        ensure(list(&taken).iter().all(|one| here.contains(one)), format!("{kept} instead of {taken}"))?;
        told((), format!("{} snapshots", kept["snapshots"].as_array().map_or(0, Vec::len)))
    })?;
    super::access::web(up, narrator)?;
    super::access::shell(up, narrator)?;
    narrator.step("the old host refuses, and says where it is", || {
        let url = old.url(Way::Direct, "hello")?;
        let bearer = format!("Bearer {}", old.token()?);
        let answer = get_with(&agent(Duration::from_secs(10)), &url, &[("authorization", &bearer)])?;
        ensure(answer.status == 421, format!("status {}: {}", answer.status, answer.body))?;
        let body = answer.json();
        ensure(body["code"] == "project_moved", format!("code {}", body["code"]))?;
        let location = string(&body, "location")?;
        ensure(
            location.starts_with(&to.url) || location.contains(".localhost"),
            format!("location {location}"),
        )?;
        told((), format!("421 project_moved, {location}"))
    })?;
    narrator.step("a WebSocket at its new place", || {
        let connect = Connect::long(up)?;
        Echo::open(&connect.url(Way::Direct, "echo")?, &connect.token()?)?.round("here now")?;
        done()
    })
}

/// The manifest of trees inside the project.
fn manifest(up: &Up, trees: &str) -> Result<Value, Failure> {
    let connect = Connect::long(up)?;
    let text = ssh(up, &connect, Way::Direct, &format!("cd ~ && python3 tree.py show {trees}"))?;
    serde_json::from_str(&text).map_err(|e| Failure::failed(format!("no manifest: {e}")))
}

/// What differs between two manifests, for people.
fn difference(before: &Value, after: &Value) -> String {
    let empty = serde_json::Map::new();
    let old = before["entries"].as_object().unwrap_or(&empty);
    let new = after["entries"].as_object().unwrap_or(&empty);
    let mut lines = vec!["the files differ after the move".to_owned()];
    for (path, entry) in old {
        match new.get(path) {
            None => lines.push(format!("{path} is missing")),
            Some(other) if other != entry => lines.push(format!("{path}: {entry} became {other}")),
            Some(_) => {}
        }
    }
    lines.extend(new.keys().filter(|path| !old.contains_key(*path)).map(|path| format!("{path} is new")));
    if before["hard links"] != after["hard links"] {
        lines.push(format!("hard links: {} became {}", before["hard links"], after["hard links"]));
    }
    lines.join("\n  ")
}

/// Asks for the same page over and over, as a program does through the proxy,
/// whose address does not change. A token is for one host: after the move the
/// proxy says so, and the program asks the master for another.
struct Poller {
    api: Api,
    project: String,
    connect: Connect,
    agent: ureq::Agent,
}

impl Poller {
    fn new(up: &Up) -> Result<Self, Failure> {
        Ok(Self {
            api: up.user.clone(),
            project: up.federation.project.id.clone(),
            connect: Connect::long(up)?,
            agent: agent(Duration::from_secs(20)),
        })
    }

    fn run(mut self, stop: &AtomicBool) -> Polled {
        let mut polled = Polled::default();
        let mut last_good = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            polled.asked += 1;
            let mut outcome = self.poll();
            if matches!(&outcome, Ok(answer) if answer.json()["code"] == "project_moved") {
                polled.renewed += 1;
                outcome = Connect::with(&self.api, &self.project).and_then(|connect| {
                    self.connect = connect;
                    self.poll()
                });
            }
            let problem = match outcome {
                Ok(answer) if answer.status == 200 => None,
                Ok(answer) => Some(format!("{} {}", answer.status, answer.body.trim())),
                Err(failure) => Some(failure.to_string()),
            };
            match problem {
                None => {
                    polled.longest = polled.longest.max(last_good.elapsed());
                    last_good = Instant::now();
                }
                Some(problem) => {
                    polled.failed += 1;
                    polled.first_failure.get_or_insert(problem);
                }
            }
            std::thread::sleep(POLL);
        }
        polled.longest = polled.longest.max(last_good.elapsed());
        polled
    }

    fn poll(&self) -> Result<Answer, Failure> {
        let bearer = format!("Bearer {}", self.connect.token()?);
        get_with(&self.agent, &self.connect.url(Way::Proxy, "poll")?, &[("authorization", &bearer)])
    }
}
