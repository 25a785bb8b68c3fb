//! `cocalc receipt …`, and what `--wait` waits for.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::project::text;
use crate::{
    api::Api,
    args::{Output, WaitOptions},
    failure::{Exit, Failure},
    output::{items, print},
};

/// How long one call waits at the master.
const STEP_SECS: u64 = 20;
/// Before a master that is away is asked again.
const AGAIN: Duration = Duration::from_secs(1);

pub(super) fn show(api: &Api, output: Output, id: &str, wait: WaitOptions) -> Result<(), Failure> {
    let receipt = if wait.wait { settled(api, id, wait)? } else { api.get(&format!("/receipts/{id}"))? };
    shown(output, &receipt);
    Ok(())
}

/// Waits for the receipt of a change, if that was asked for, and shows it.
pub(super) fn finish(api: &Api, output: Output, mut answer: Value, wait: WaitOptions) -> Result<(), Failure> {
    let has_one = answer["receipt"].is_object();
    if wait.wait {
        if !has_one {
            let reason = "the change is made, but the master keeps no receipt of it: too many are open";
            return Err(Failure::failed(reason));
        }
        let id = text(&answer["receipt"], "id")?;
        answer["receipt"] = settled(api, &id, wait)?;
    }
    match output {
        Output::Json => print(output, &answer, &[]),
        Output::Table if wait.wait => shown(output, &answer["receipt"]),
        Output::Table => {}
    }
    Ok(())
}

fn shown(output: Output, receipt: &Value) {
    match output {
        Output::Json => print(output, receipt, &[]),
        Output::Table => print(output, items(receipt, "peers"), &["peer", "outcome", "millis"]),
    }
}

/// The receipt once the change is in force everywhere. A master that restarts
/// meanwhile has kept it.
fn settled(api: &Api, id: &str, wait: WaitOptions) -> Result<Value, Failure> {
    let deadline = Instant::now() + Duration::from_secs(wait.timeout);
    loop {
        let rest = deadline.saturating_duration_since(Instant::now()).as_secs();
        let step = rest.clamp(1, STEP_SECS);
        match api.get(&format!("/receipts/{id}?wait=true&timeout_secs={step}")) {
            Ok(receipt) if receipt["complete"] == true => return Ok(receipt),
            Ok(_) => {}
            Err(failure) if matches!(failure.exit, Exit::Unreachable | Exit::TimedOut) => {
                if Instant::now() + AGAIN < deadline {
                    std::thread::sleep(AGAIN);
                }
            }
            Err(failure) => return Err(failure),
        }
        if Instant::now() >= deadline {
            let message = format!(
                "not in force everywhere after {} s; it goes on: cocalc receipt {id} --wait",
                wait.timeout
            );
            return Err(Failure::new(Exit::TimedOut, message));
        }
    }
}
