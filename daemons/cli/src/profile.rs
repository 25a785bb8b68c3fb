//! Which master to call, and as whom: flags, environment, then the profile
//! that `cocalc login` wrote.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    api::Api,
    args::{BrowserOptions, WaitOptions},
    browser,
    failure::{Exit, Failure, While},
};

/// How long a log-out waits for hosts, at most: less than a call may take.
const WAIT_SECS_MAX: u64 = 20;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    url: String,
    token: String,
}

/// The password: from the environment, or the first line of standard input.
/// Never an argument, which others on the machine can read.
pub(crate) fn password() -> Result<String, Failure> {
    if let Ok(password) = std::env::var("COCALC_PASSWORD") {
        return Ok(password);
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).during("cannot read the password from standard input")?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

/// A token for who logs in with a name and a password.
pub(crate) fn log_in(url: &str, name: &str) -> Result<String, Failure> {
    let body = serde_json::json!({ "login": name, "password": password()? });
    let answer = Api::new(url, "").post("/login", &body)?;
    let token = answer["token"].as_str();
    token.map(str::to_owned).ok_or_else(|| Failure::failed("the master gave no token"))
}

/// A token for who logs in with an OpenID provider, in a browser.
pub(crate) fn log_in_with(url: &str, provider: &str, options: &BrowserOptions) -> Result<String, Failure> {
    let api = Api::new(url, "");
    let shown = browser::show_who(url, &api, provider, false, options)?;
    let answer = api.post("/login/oidc", &shown)?;
    let token = answer["token"].as_str();
    token.map(str::to_owned).ok_or_else(|| Failure::failed("the master gave no token"))
}

/// Remembers a master and a token, readable by this user only.
pub(crate) fn save(url: &str, token: &str) -> Result<(), Failure> {
    // A wrong token is found now rather than at the first real command.
    Api::new(url, token).get("/projects")?;
    let path = path()?;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).during(format!("cannot make {}", parent.display()))?;
    }
    let profile = Profile { url: url.to_owned(), token: token.to_owned() };
    let bytes = serde_json::to_vec_pretty(&profile).during("cannot write the profile")?;
    cocalc_daemon::files::write_atomic(&path, &bytes).during(format!("cannot write {}", path.display()))?;
    println!("logged in to {url}");
    Ok(())
}

/// Ends the log-in at the master, and forgets it here. One that has ended already
/// is forgotten, too.
pub(crate) fn log_out(url: Option<String>, token: Option<String>, wait: WaitOptions) -> Result<(), Failure> {
    // Which is not the profile's if somebody names another.
    let is_kept = url.is_none() && token.is_none();
    let api = api(url, token)?;
    // No other call can be made with it later.
    let limit = wait.timeout.clamp(1, WAIT_SECS_MAX);
    let query = if wait.wait { format!("?wait=true&timeout_secs={limit}") } else { String::new() };
    let ended = match api.post(&format!("/logout{query}"), &serde_json::json!({})) {
        Err(failure) if failure.message.contains("(unauthenticated)") => Ok(serde_json::Value::Null),
        other => other,
    }?;
    if is_kept {
        let path = path()?;
        std::fs::remove_file(&path).during(format!("cannot remove {}", path.display()))?;
    }
    if wait.wait && ended["receipt"]["complete"] == false {
        let message = format!("you are logged out, but not every host has said so within {limit} s");
        return Err(Failure::new(Exit::TimedOut, message));
    }
    println!("logged out of {}", api.url());
    Ok(())
}

/// The API to call.
pub(crate) fn api(url: Option<String>, token: Option<String>) -> Result<Api, Failure> {
    match (url, token) {
        (Some(url), Some(token)) => Ok(Api::new(&url, &token)),
        (url, token) => {
            let path = path()?;
            let profile =
                std::fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Profile>(&bytes).ok());
            let Some(profile) = profile else {
                return Err(Failure::new(
                    Exit::Usage,
                    "no master is known: set COCALC_URL and COCALC_TOKEN, or run `cocalc login --url URL --token TOKEN`",
                ));
            };
            Ok(Api::new(&url.unwrap_or(profile.url), &token.unwrap_or(profile.token)))
        }
    }
}

fn path() -> Result<PathBuf, Failure> {
    let directory = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))
        .ok_or_else(|| Failure::failed("neither XDG_CONFIG_HOME nor HOME is set"))?;
    Ok(directory.join("cocalc").join("profile.json"))
}
