//! Images in a federation on real Btrfs and podman: imported on one host, they
//! come to the others when a project needs them; projects change theirs; what
//! nobody uses goes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod federation;

use std::{path::Path, process::Command};

use federation::Federation;
use serde_json::Value;

/// A root file system of one static program, as tar, which says who it is.
fn small_image(dir: &Path, name: &str) {
    let root = dir.join(format!("{name}.d"));
    let script = "set -e; mkdir -p $R/bin $R/etc; cp /bin/busybox $R/bin/busybox; \
        for tool in sh cat echo id ls; do ln -s busybox $R/bin/$tool; done; echo $N > $R/etc/which; \
        tar -C $R --owner=0 --group=0 -cf $T .; rm -r $R";
    let made = Command::new("sh")
        .args(["-c", script])
        .env("R", &root)
        .env("N", name)
        .env("T", dir.join(format!("{name}.tar")))
        .output()
        .unwrap();
    assert!(made.status.success(), "needs /bin/busybox, a static one: {made:?}");
}

fn said(output: std::process::Output, federation: &Federation) -> String {
    assert!(output.status.success(), "{output:?}\n{}", federation.log());
    String::from_utf8(output.stdout).unwrap()
}

fn images(federation: &Federation) -> Vec<Value> {
    federation.json(&["image", "list"])["images"].as_array().unwrap().clone()
}

/// The image of that name, and on how many hosts it is.
fn find(federation: &Federation, name: &str) -> Option<(String, usize)> {
    let named = |image: &Value| image["names"].as_array().unwrap().iter().any(|other| other == name);
    let image = images(federation).into_iter().find(named)?;
    Some((image["digest"].as_str().unwrap().to_owned(), image["hosts"].as_array().unwrap().len()))
}

#[test]
fn images_go_where_projects_need_them_and_projects_change_theirs() {
    let files = tempfile::Builder::new().prefix("cocalc-images-").tempdir().unwrap();
    for name in ["small", "other", "unused"] {
        small_image(files.path(), name);
    }
    let import_dir = files.path().to_str().unwrap();
    let arguments = ["--storage", "btrfs", "--runner", "podman"];
    let federation = Federation::up_with(19200, &arguments, &[("COCALC_HOST_IMAGES_IMPORT_DIR", import_dir)]);
    let soon = std::time::Duration::from_secs(60);
    for name in ["small", "other", "unused"] {
        let file = format!("{name}.tar");
        let done = federation.json(&["image", "import", &file, "--name", name, "--host", "alpha"]);
        assert_eq!(done["state"], "done", "{done}");
        federation
            .wait_for("the image", soon, || find(&federation, name).is_some_and(|(_, hosts)| hosts == 1));
    }
    for wrong in ["../small.tar", "missing.tar", "small.d"] {
        let refused = federation.cocalc(&["image", "import", wrong, "--host", "alpha"]);
        assert!(!refused.status.success(), "{wrong}");
    }
    let exec = |project: &str, line: &str| {
        said(federation.cocalc(&["project", "exec", project, "--", "sh", "-c", line]), &federation)
    };

    // Another host fetches it when a project is created there.
    let made =
        federation.json(&["project", "create", "there", "--host", "beta", "--image", "small", "--start"]);
    let there = made["id"].as_str().unwrap().to_owned();
    assert_eq!(exec(&there, "cat /etc/which"), "small\n");
    federation
        .wait_for("two hosts", soon, || find(&federation, "small").is_some_and(|(_, hosts)| hosts == 2));
    // And when one moves there.
    let made =
        federation.json(&["project", "create", "moves", "--host", "alpha", "--image", "other", "--start"]);
    let moves = made["id"].as_str().unwrap().to_owned();
    exec(&moves, "echo kept > ~/kept");
    federation.json(&["project", "move", &moves, "--to", "beta"]);
    assert_eq!(exec(&moves, "cat /etc/which ~/kept"), "other\nkept\n");
    assert_eq!(find(&federation, "other").unwrap().1, 2);

    // A project changes its image, keeps its home, and goes back.
    let project = federation.project();
    let before = federation.json(&["project", "image", &project])["image"].as_str().unwrap().to_owned();
    said(federation.exec("echo mine > ~/mine; sudo -n sh -c 'echo root > /opt/made'"), &federation);
    let refused = federation.cocalc(&["project", "image", &project, "--set", "small"]);
    assert!(!refused.status.success(), "it runs");
    let changed = federation.json(&["project", "image", &project, "--set", "small", "--restart"]);
    assert_eq!(changed["state"], "running");
    assert_eq!(
        exec(&project, "cat /etc/which ~/mine; test -e /opt/made || echo apart"),
        "small\nmine\napart\n"
    );
    federation.json(&["project", "image", &project, "--set", &before, "--restart"]);
    assert_eq!(exec(&project, "cat ~/mine /opt/made"), "mine\nroot\n");
    let unknown = federation.cocalc(&["project", "image", &project, "--set", "nothing"]);
    assert!(!unknown.status.success());

    // What a start was made of.
    federation.json(&["project", "stop", &project]);
    federation.json(&["project", "start", &project]);
    let shown = federation.json(&["project", "show", &project]);
    let phases: Vec<&str> =
        shown["phases"].as_array().unwrap().iter().filter_map(|phase| phase[0].as_str()).collect();
    for phase in ["turn", "prepare", "start", "start: mounts", "start: podman start"] {
        assert!(phases.contains(&phase), "{phase} is not in {phases:?}");
    }

    // A pin keeps one that nobody uses; without it, it goes.
    let prune = |more: &[&str]| {
        let arguments = [&["image", "prune", "--unused-days", "0", "--host", "alpha"], more].concat();
        let removed = federation.json(&arguments)["removed"].clone();
        let names = removed.as_array().unwrap().iter().map(|image| image["names"][0].clone());
        names.collect::<Vec<Value>>()
    };
    federation.json(&["image", "pin", "unused"]);
    assert!(!prune(&["--dry-run"]).contains(&"unused".into()));
    federation.json(&["image", "unpin", "unused"]);
    assert!(find(&federation, "unused").is_some());
    federation.wait_for("the image to be forgotten", std::time::Duration::from_secs(120), || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        prune(&[]).contains(&"unused".into())
    });
    federation.wait_for("its end", soon, || find(&federation, "unused").is_none());
    assert!(find(&federation, "small").is_some(), "what a project has stays");
    assert_eq!(exec(&there, "cat /etc/which"), "small\n");
}
