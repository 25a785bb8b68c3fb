//! `cocalc operation …`

use std::time::Duration;

use serde_json::json;

use crate::{
    api::Api,
    args::{Operation, Output},
    failure::Failure,
    output::{items, print},
};

const COLUMNS: [&str; 5] = ["id", "kind", "state", "phase", "project_id"];

pub(super) fn run(api: &Api, output: Output, verb: Operation) -> Result<(), Failure> {
    let seen = match verb {
        Operation::List => {
            let answer = api.get("/operations")?;
            print(output, items(&answer, "operations"), &COLUMNS);
            return Ok(());
        }
        Operation::Show { id } => api.get(&format!("/operations/{id}"))?,
        Operation::Wait { id, timeout } => api.wait(&id, Duration::from_secs(timeout), |_| {})?,
        Operation::Cancel { id } => api.post(&format!("/operations/{id}/cancel"), &json!({}))?,
    };
    print(output, &seen, &COLUMNS);
    Ok(())
}
