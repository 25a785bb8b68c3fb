//! `cocalc up --once`, whole: what a newcomer runs first.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// Runs the demonstration in `dir`, and insists on success and on a clean end.
fn once(dir: &Path, base_port: u16, arguments: &[&str]) -> String {
    let output = Command::new(federation::COCALC)
        .args(["up", "--once", "--base-port", &base_port.to_string(), "--dir"])
        .arg(dir)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text =
        format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    federation::down(dir);
    assert!(output.status.success(), "{}\n{text}", output.status);
    let left = federation::leftovers(dir);
    assert!(left.is_empty(), "left behind: {left:#?}\n{text}");
    text
}

#[test]
fn the_demonstration_keeps_every_promise_on_btrfs_and_podman() {
    let dir = tempfile::Builder::new().prefix("cocalc-once-").tempdir().unwrap();
    let said = once(dir.path(), 17800, &["--storage", "btrfs", "--runner", "podman"]);
    for promise in [
        "WebSocket echo, proxy",
        "thesis/one removed",
        "one path restored while the project runs",
        "its stop took a snapshot",
        "421 project_moved",
        "everything is equal",
        "the project never stopped",
    ] {
        assert!(said.contains(promise), "{promise:?} is missing:\n{said}");
    }
}

#[test]
fn the_embedded_default_works_without_btrfs_and_podman() {
    let dir = tempfile::Builder::new().prefix("cocalc-once-").tempdir().unwrap();
    let said = once(dir.path(), 18200, &["--storage", "directory", "--runner", "process"]);
    assert!(said.contains("without isolation"), "it does not say what is weaker:\n{said}");
}

#[test]
fn an_ordinary_user_gets_the_embedded_default() {
    use std::os::unix::{fs::chown, process::CommandExt};
    /// Debian's `nobody`.
    const NOBODY: u32 = 65534;

    let dir = tempfile::Builder::new().prefix("cocalc-user-").tempdir().unwrap();
    // The build directory may be where this user cannot look.
    let built = Path::new(federation::COCALC).parent().unwrap();
    for name in ["cocalc", "cocalc-master", "cocalc-host", "cocalc-proxy", "cocalc-backup-worker"] {
        cocalc_testkit::executable::copy(&built.join(name), &dir.path().join(name));
    }
    chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let data = dir.path().join("data");
    let output = Command::new(dir.path().join("cocalc"))
        .args(["up", "--once", "--base-port", "18900", "--dir"])
        .arg(&data)
        .env("HOME", dir.path())
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    federation::down(&data);
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert!(text.contains("need root"), "it does not say why:\n{text}");
    assert!(federation::leftovers(&data).is_empty(), "{text}");
}
