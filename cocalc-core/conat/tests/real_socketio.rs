//! The broker against the socket.io client of existing programs.
//!
//! Needs node and npm; npm fetches the client once into the build directory.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test reports by panicking")]

mod common;

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cocalc_core::bus::Bus as _;
use common::{Server, client};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socketio_client_is_served() {
    let directory = install().await;
    let server = Server::start().await;
    let rust = client(&server, "all-rust").await;
    let mut echo = rust.subscribe("rust.echo", None).await.unwrap();
    let answering = tokio::spawn(async move {
        while let Some(request) = echo.next().await {
            let reply = request.reply.expect("a request");
            let payload = cocalc_core::bus::Payload { headers: Default::default(), ..request.payload };
            assert_eq!(rust.publish(&reply, payload).await.unwrap(), 1);
        }
    });

    let mut node = Command::new("node")
        .arg("client.js")
        .arg(format!("http://{}", server.address))
        .current_dir(directory)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("node is required to run this test");
    let mut lines = BufReader::new(node.stdout.take().unwrap()).lines();
    let run = async {
        let mut steps = Vec::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some(name) = line.strip_prefix("revoke ") {
                assert_eq!(server.broker.revoke(name).await, 1, "one connection is revoked");
            }
            steps.push(line);
        }
        (node.wait().await.unwrap(), steps)
    };
    let (status, steps) =
        tokio::time::timeout(Duration::from_secs(120), run).await.expect("node ends in time");
    assert!(status.success(), "the JavaScript client failed after {steps:#?}");
    assert_eq!(steps.last().map(String::as_str), Some("done"));
    answering.abort();
}

/// Fetches the client, unless that was done before.
async fn install() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/socketio");
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("socketio");
    std::fs::create_dir_all(&directory).unwrap();
    let manifest = std::fs::read(source.join("package.json")).unwrap();
    std::fs::copy(source.join("client.js"), directory.join("client.js")).unwrap();
    // Written last, so that a cut installation is not taken for a whole one.
    let marker = directory.join("installed.json");
    if std::fs::read(&marker).is_ok_and(|installed| installed == manifest) {
        return directory;
    }
    std::fs::write(directory.join("package.json"), &manifest).unwrap();
    let install = Command::new("npm")
        .args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"])
        .current_dir(&directory)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(300), install)
        .await
        .expect("npm ends in time")
        .expect("npm is required to run this test");
    assert!(
        output.status.success(),
        "npm could not install the socket.io client: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    std::fs::write(marker, manifest).unwrap();
    directory
}
