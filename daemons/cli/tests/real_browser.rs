//! The master's project page, with a project in its frame, in a real Chromium:
//! two sites, and third-party cookies blocked.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod world;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use world::{World, free_port};

/// Where `.ci/setup.sh` puts what drives the browser.
fn browser_dir() -> PathBuf {
    let place = std::env::var_os("COCALC_BROWSER").map(PathBuf::from);
    let place = place.unwrap_or_else(|| "/var/cache/cocalc/browser".into());
    assert!(
        place.join("node_modules/playwright-core").exists(),
        "{} has no playwright-core: run .ci/setup.sh test",
        place.display()
    );
    place
}

/// Runs a script that drives the browser; what it is told is its argument.
fn drive(script: &str, world: &World, told: Value) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser");
    let screenshots = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("screenshots");
    std::fs::create_dir_all(&screenshots).unwrap();
    let mut all = json!({
        "place": browser_dir(),
        "screenshots": screenshots,
        "dir": world.dir.path().join("browser"),
        "master": world.url,
        "admin": world.admin,
        "hosts": world.hosts.iter().map(|host| host.port()).collect::<Vec<_>>(),
    });
    for (name, value) in told.as_object().unwrap() {
        all[name] = value.clone();
    }
    let output = Command::new("node").arg(here.join(script)).arg(all.to_string()).output();
    let output = output.expect("node is needed: .ci/setup.sh installs it");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{}", world.log());
    println!("{said}");
}

/// A master and two hosts, each behind something that terminates TLS: browsers
/// keep sessions in frames on secure origins only.
fn federation() -> (World, Value) {
    let mut world = World::new("");
    let ports = [free_port(), free_port(), free_port()];
    for (name, port) in ["alpha", "beta"].into_iter().zip(ports) {
        let settings = format!("public_url = 'https://{name}.test:{port}'\ndomain = '{name}.test:{port}'\n");
        world.add_host(name, &settings);
    }
    world.connected(2, 0);
    let (key, certificate) = (world.dir.path().join("tls.key"), world.dir.path().join("tls.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
        .args(["-subj", "/CN=test", "-days", "2", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("openssl is needed: .ci/setup.sh installs it");
    assert!(made.status.success(), "{made:?}");
    let told = json!({ "tls": ports, "key": key, "certificate": certificate });
    (world, told)
}

#[test]
fn a_project_is_used_in_a_frame_of_another_site() {
    let (world, told) = federation();
    drive("page.mjs", &world, told);
}

/// Apps as their authors have them, from PyPI and npm.
#[test]
#[ignore = "JupyterLab and Vite are there with COCALC_FULL=1 only: make test-full"]
fn jupyterlab_and_a_dev_server_work_in_the_frame() {
    let place = |variable: &str, usual: &str, part: &str| {
        let place = std::env::var_os(variable).map_or_else(|| PathBuf::from(usual), PathBuf::from);
        let needed = place.join(part);
        assert!(needed.exists(), "{} is missing: run COCALC_FULL=1 .ci/setup.sh test", needed.display());
        place
    };
    let jupyter = place("COCALC_JUPYTER", "/var/cache/cocalc/jupyter", "bin/jupyter-lab");
    let vite = place("COCALC_VITE", "/var/cache/cocalc/vite", "node_modules/vite/bin/vite.js");
    let (world, mut told) = federation();
    told["jupyter"] = json!(jupyter);
    told["vite"] = json!(vite);
    told["volume"] = json!(world.dir.path().join("alpha/volume/projects"));
    drive("apps.mjs", &world, told);
}
