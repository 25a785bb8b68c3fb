//! The master's HTTP API, as the command line uses it.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{Exit, Failure};

/// How long one call may take. Long work is an operation, which is polled.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// A master, and as whom to call it.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    agent: ureq::Agent,
    base: String,
    token: Token,
}

/// A bearer token that is not printed.
#[derive(Clone)]
struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Api {
    /// Calls the master at `url` with `token`.
    pub(crate) fn new(url: &str, token: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(CALL_LIMIT))
            .http_status_as_error(false)
            .max_redirects(0)
            .tls_config(cocalc_daemon::tls::for_agent(url))
            .build();
        Self {
            agent: config.into(),
            base: format!("{}/api/v1", url.trim_end_matches('/')),
            token: Token(token.to_owned()),
        }
    }

    /// The master's address.
    pub(crate) fn url(&self) -> &str {
        self.base.strip_suffix("/api/v1").unwrap_or(&self.base)
    }

    /// Reads a resource.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failure> {
        let request = self.agent.get(format!("{}{path}", self.base)).header("authorization", self.bearer());
        self.answer(request.call())
    }

    /// Changes something. Safe to retry: each call carries its own key.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let key = idempotency_key()?;
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .header("authorization", self.bearer())
            .header("idempotency-key", &key);
        self.answer(request.send_json(body))
    }

    /// Changes parts of a resource.
    pub(crate) fn patch(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let key = idempotency_key()?;
        let request = self
            .agent
            .patch(format!("{}{path}", self.base))
            .header("authorization", self.bearer())
            .header("idempotency-key", &key);
        self.answer(request.send_json(body))
    }

    /// Puts something in the place of what was there.
    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let key = idempotency_key()?;
        let request = self
            .agent
            .put(format!("{}{path}", self.base))
            .header("authorization", self.bearer())
            .header("idempotency-key", &key);
        self.answer(request.send_json(body))
    }

    /// Deletes a resource.
    pub(crate) fn delete(&self, path: &str) -> Result<Value, Failure> {
        let key = idempotency_key()?;
        let request = self
            .agent
            .delete(format!("{}{path}", self.base))
            .header("authorization", self.bearer())
            .header("idempotency-key", &key);
        self.answer(request.call())
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token.0)
    }

    fn answer(
        &self,
        result: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value, Failure> {
        let mut response = result.map_err(|error| match error {
            ureq::Error::Timeout(_) => {
                Failure::new(Exit::TimedOut, format!("{} did not answer in time", self.base))
            }
            other => Failure::new(Exit::Unreachable, format!("cannot reach {}: {other}", self.base)),
        })?;
        let status = response.status().as_u16();
        let text = response
            .body_mut()
            .read_to_string()
            .map_err(|e| Failure::new(Exit::Unreachable, format!("{} broke off: {e}", self.base)))?;
        if (200..300).contains(&status) {
            return if text.is_empty() {
                Ok(Value::Null)
            } else {
                serde_json::from_str(&text)
                    .map_err(|e| Failure::failed(format!("{} did not answer in JSON: {e}", self.base)))
            };
        }
        Err(problem(status, &text))
    }

    /// Waits for an operation to end, telling `progress` what it does.
    pub(crate) fn wait(
        &self,
        operation: &str,
        limit: Duration,
        mut progress: impl FnMut(&Value),
    ) -> Result<Value, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.get(&format!("/operations/{operation}"))?;
            progress(&seen);
            match seen["state"].as_str() {
                Some("done" | "succeeded") => return Ok(seen),
                Some("failed" | "cancelled" | "canceled") => {
                    let message = format!(
                        "operation {operation} {}: {}",
                        seen["state"].as_str().unwrap_or_default(),
                        reason(&seen)
                    );
                    return Err(Failure::new(exit_of(&seen["error"]["code"]), message));
                }
                _ if Instant::now() >= deadline => {
                    return Err(Failure::new(
                        Exit::TimedOut,
                        format!(
                            "operation {operation} is not done after {limit:?}; it goes on: cocalc operation wait {operation}"
                        ),
                    ));
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

/// The exit code for an operation that failed with this code: the same as for
/// a call that is refused with it.
fn exit_of(code: &Value) -> Exit {
    match code.as_str().unwrap_or_default() {
        "not_found" => Exit::NotFound,
        "invalid_request" => Exit::Usage,
        "project_busy"
        | "already_exists"
        | "snapshot_exists"
        | "snapshot_in_use"
        | "other_host"
        | "stale_epoch"
        | "project_has_snapshots"
        | "host_not_fenced" => Exit::Conflict,
        "repository_denied" => Exit::Denied,
        "host_unavailable" | "host_fenced" | "repository_unavailable" => Exit::Unreachable,
        _ => Exit::Failed,
    }
}

/// A text as part of an address.
pub(crate) fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// What an operation says about its failure.
fn reason(operation: &Value) -> String {
    match &operation["error"] {
        Value::String(text) => text.clone(),
        Value::Object(problem) => problem
            .get("detail")
            .or_else(|| problem.get("message"))
            .and_then(Value::as_str)
            .unwrap_or("no reason given")
            .to_owned(),
        _ => "no reason given".to_owned(),
    }
}

/// Turns a problem document (RFC 9457) into a failure with its exit code.
fn problem(status: u16, text: &str) -> Failure {
    let document: Value = serde_json::from_str(text).unwrap_or(Value::Null);
    let code = document["code"].as_str().unwrap_or("unknown");
    let detail = document["detail"].as_str().or(document["title"].as_str()).unwrap_or(text);
    let exit = match status {
        400 | 422 => Exit::Usage,
        401 | 403 => Exit::Denied,
        404 => Exit::NotFound,
        409 | 412 => Exit::Conflict,
        502 | 503 => Exit::Unreachable,
        408 | 504 => Exit::TimedOut,
        _ => Exit::Failed,
    };
    let mut message = format!("{detail} ({code})");
    if let Some(operation) = document["operation_id"].as_str() {
        message.push_str(&format!("; under way: cocalc operation wait {operation}"));
    }
    Failure::new(exit, message)
}

/// A key under which the master remembers a call, 128 random bits.
fn idempotency_key() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| Failure::failed(format!("no randomness: {e}")))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_become_exit_codes() {
        let busy =
            problem(409, r#"{"code":"project_busy","detail":"a move is under way","operation_id":"op"}"#);
        assert_eq!(busy.exit, Exit::Conflict);
        assert!(busy.message.contains("project_busy") && busy.message.contains("operation wait op"));
        assert_eq!(problem(404, "").exit, Exit::NotFound);
        assert_eq!(problem(403, "not json").exit, Exit::Denied);
    }
}
