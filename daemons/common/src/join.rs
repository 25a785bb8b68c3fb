//! How a host or proxy becomes part of a federation: once, with a one-use
//! token, presenting the identity key that it made itself.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::identity::Identity;
use cocalc_core::{BoxError, ids::HostName, router::HostAddress};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::files::write_atomic;

/// How long the master may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// What joins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// A project-host.
    Host,
    /// A proxy.
    Proxy,
}

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Host => "hosts/join",
            Self::Proxy => "proxies/join",
        }
    }
}

/// What a joining daemon is.
#[derive(Debug)]
pub struct Joining<'a> {
    /// Host or proxy.
    pub kind: Kind,
    /// Its name, unique in the federation.
    pub name: &'a HostName,
    /// The master's address, without a trailing slash.
    pub master_url: &'a str,
    /// Where the one-use token is; needed at the first start only.
    pub join_token_file: Option<&'a Path>,
    /// Where it keeps its own state.
    pub data_dir: &'a Path,
    /// Where it listens.
    pub address: &'a HostAddress,
}

/// A daemon's place in its federation, for as long as its identity key exists.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Membership<Id> {
    /// Its id.
    pub id: Id,
    /// The issuer of connect tokens.
    pub issuer: String,
}

/// Why a daemon could not join.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot use {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: BoxError,
    },
    /// It has not joined, and has no token to join with.
    #[error(
        "not a member of a federation yet: make a token with `cocalc host join-token` and set join_token_file"
    )]
    NoToken,
    /// The master refused.
    #[error("the master refused to let this daemon join: {0}")]
    Refused(String),
    /// The master could not be reached.
    #[error("cannot reach the master at {url}")]
    Unreachable {
        /// Where it should be.
        url: String,
        /// Why.
        source: BoxError,
    },
}

/// Loads the membership from `data_dir`, or joins and saves it. Blocks.
///
/// # Errors
///
/// As [`Error`] says. A join that was cut off after the master had answered
/// is repeated with the same token and key, which the master allows.
pub fn load_or_join<Id>(joining: &Joining<'_>, identity: &Identity) -> Result<Membership<Id>, Error>
where
    Id: DeserializeOwned + Serialize,
{
    let path = joining.data_dir.join("membership.json");
    let file = |source: BoxError| Error::File { path: path.clone(), source };
    match std::fs::read(&path) {
        Ok(bytes) => return serde_json::from_slice(&bytes).map_err(|e| file(e.into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(file(error.into())),
    }
    let token_file = joining.join_token_file.ok_or(Error::NoToken)?;
    let token = std::fs::read_to_string(token_file)
        .map_err(|e| Error::File { path: token_file.into(), source: e.into() })?;
    let membership: Membership<Id> = join(joining, identity, token.trim())?;
    let bytes = serde_json::to_vec_pretty(&membership).map_err(|e| file(e.into()))?;
    write_atomic(&path, &bytes).map_err(|e| file(e.into()))?;
    // It is used up; what remains is of no use to a thief either.
    let _ = std::fs::remove_file(token_file);
    Ok(membership)
}

fn join<Id: DeserializeOwned>(
    joining: &Joining<'_>,
    identity: &Identity,
    token: &str,
) -> Result<Membership<Id>, Error> {
    let url = format!("{}/api/v1/{}", joining.master_url.trim_end_matches('/'), joining.kind.path());
    let unreachable = |source: BoxError| Error::Unreachable { url: joining.master_url.to_owned(), source };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(ANSWER_LIMIT))
        .http_status_as_error(false)
        .max_redirects(0)
        .build()
        .into();
    let (key, address) = (identity.public_key().to_string(), joining.address);
    let HostAddress { url: at, ssh, peer, .. } = address;
    let message = format!("cocalc-join-2 {token} {} {key} {at} {ssh} {peer}", joining.name);
    let proof = URL_SAFE_NO_PAD.encode(identity.sign(message.as_bytes()));
    let body = serde_json::json!({
        "token": token,
        "name": joining.name,
        "identity": key,
        "address": address,
        "proof": proof,
    });
    let mut response = agent.post(&url).send_json(&body).map_err(|e| unreachable(e.into()))?;
    let text = response.body_mut().read_to_string().map_err(|e| unreachable(e.into()))?;
    if !response.status().is_success() {
        let problem: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        return Err(Error::Refused(problem["detail"].as_str().unwrap_or(&text).to_owned()));
    }
    let answer: serde_json::Value = serde_json::from_str(&text).map_err(|e| unreachable(e.into()))?;
    let id = match joining.kind {
        Kind::Host => &answer["host_id"],
        Kind::Proxy => &answer["proxy_id"],
    };
    serde_json::from_value(serde_json::json!({ "id": id, "issuer": answer["issuer"] }))
        .map_err(|e| unreachable(e.into()))
}
