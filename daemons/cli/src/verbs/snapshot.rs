//! `cocalc snapshot …`

use serde_json::{Value, json};

use super::settle;
use crate::{
    api::Api,
    args::{Output, Snapshot},
    failure::Failure,
    output::{items, print},
};

pub(super) fn run(api: &Api, output: Output, verb: Snapshot) -> Result<(), Failure> {
    match verb {
        Snapshot::Create { project, name } => {
            let answer = api.post(&format!("/projects/{project}/snapshots"), &json!({ "name": name }))?;
            finish(api, output, &answer)
        }
        Snapshot::List { project } => {
            let answer = api.get(&format!("/projects/{project}/snapshots"))?;
            print(output, items(&answer, "snapshots"), &["name", "created", "origin"]);
            Ok(())
        }
        Snapshot::Delete { project, name } => {
            let answer = api.delete(&format!("/projects/{project}/snapshots/{name}"))?;
            finish(api, output, &answer)
        }
        Snapshot::Restore { project, name } => {
            let answer = api.post(&format!("/projects/{project}/snapshots/{name}/restore"), &json!({}))?;
            finish(api, output, &answer)
        }
    }
}

/// Waits if the answer is an operation, and prints the outcome.
fn finish(api: &Api, output: Output, answer: &Value) -> Result<(), Failure> {
    let outcome = if answer.get("operation_id").is_some() { settle(api, answer)? } else { answer.clone() };
    if output == Output::Json {
        print(output, &outcome, &[]);
    }
    Ok(())
}
