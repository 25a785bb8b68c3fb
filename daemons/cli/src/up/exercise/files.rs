//! Looking back: snapshots, differences, one path restored, copies and clones.

use serde_json::{Value, json};

use super::reach::{Connect, Way, ensure, ssh};
use crate::{
    failure::Failure,
    up::{
        OPERATION_LIMIT, Up,
        narrator::{Narrator, told},
        string,
    },
};

/// Loses a file and gets it back; copies and clones.
pub(super) fn run(up: &Up, narrator: &Narrator) -> Result<(), Failure> {
    let id = &up.federation.project.id;
    let connect = Connect::long(up)?;
    let shell = |line: &str| ssh(up, &connect, Way::Direct, line);

    narrator.step("snapshot, then a file is lost and another changed", || {
        shell("mkdir -p ~/thesis && echo chapter one > ~/thesis/one && echo notes > ~/thesis/notes")?;
        done(up, up.user.post(&format!("/projects/{id}/snapshots"), &json!({ "name": "before" }))?)?;
        shell("rm ~/thesis/one && echo more >> ~/thesis/notes")?;
        told((), "")
    })?;
    narrator.step("the difference", || {
        let answer = up.user.get(&format!("/projects/{id}/snapshots/before/diff"))?;
        let found = |path: &str| {
            let changes = answer["changes"].as_array()?;
            changes.iter().find(|change| change["path"].as_str().is_some_and(|p| p.ends_with(path)))
        };
        let (one, notes) = (found("thesis/one"), found("thesis/notes"));
        let right =
            one.is_some_and(|c| c["kind"] == "removed") && notes.is_some_and(|c| c["kind"] == "modified");
        ensure(right, format!("it says {answer}"))?;
        let path = string(one.unwrap_or(&Value::Null), "path")?;
        told((), format!("{path} removed, thesis/notes modified"))
    })?;
    narrator.step("one path restored while the project runs", || {
        let path = format!("{HOME}/thesis/one");
        let restore = format!("/projects/{id}/snapshots/before/restore");
        done(up, up.user.post(&restore, &json!({ "path": path }))?)?;
        let said = shell("cat ~/thesis/one ~/thesis/notes")?;
        ensure(said == "chapter one\nnotes\nmore\n", format!("it says {said:?}"))?;
        told((), "and the present state kept as a snapshot")
    })?;
    narrator.step("a clone of that snapshot, and a copy into it", || {
        let clone = up
            .user
            .post(&format!("/projects/{id}/clone"), &json!({ "name": "clone", "snapshot": "before" }))?;
        let new = string(&clone["project"], "id")?;
        done(up, clone)?;
        let body = json!({
            "from_project": id, "from_path": format!("{HOME}/thesis"), "to_path": format!("{HOME}/copied"),
        });
        done(up, up.user.post(&format!("/projects/{new}/copy"), &body)?)?;
        done(up, up.user.post(&format!("/projects/{new}/start"), &json!({}))?)?;
        let there = Connect::with(&up.user, &new)?;
        let said = ssh(up, &there, Way::Direct, "cat ~/thesis/notes ~/copied/notes")?;
        ensure(said == "notes\nnotes\nmore\n", format!("it says {said:?}"))?;
        let usage = up.user.get(&format!("/projects/{new}/usage"))?;
        let charged = crate::verbs::size(usage["charged_bytes"].as_u64().unwrap_or(0));
        done(up, up.user.post(&format!("/projects/{new}/stop"), &json!({ "grace_ms": 500 }))?)?;
        let kept = up.user.get(&format!("/projects/{new}/snapshots"))?;
        let automatic =
            kept["snapshots"].as_array().is_some_and(|all| all.iter().any(|s| s["automatic"] == true));
        ensure(automatic, format!("the stop took no snapshot: {kept}"))?;
        done(up, up.user.delete(&format!("/projects/{new}"))?)?;
        told((), format!("it was charged {charged}; its stop took a snapshot"))
    })
}

/// Where a project's home is in its volume.
const HOME: &str = "home";

/// Waits for the operation that a call began.
fn done(up: &Up, answer: Value) -> Result<Value, Failure> {
    up.user.wait(&string(&answer, "operation_id")?, OPERATION_LIMIT, |_| {})
}
