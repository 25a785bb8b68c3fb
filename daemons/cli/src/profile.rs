//! Which master to call, and as whom: flags, environment, then the profile
//! that `cocalc login` wrote.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    api::Api,
    args::BrowserOptions,
    browser,
    failure::{Exit, Failure, While},
};

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
