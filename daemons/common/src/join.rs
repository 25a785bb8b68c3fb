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
use sha2::{Digest, Sha256};

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

const KEY: &str = "identity.key";
const NEXT_KEY: &str = "identity.next.key";
const MEMBERSHIP: &str = "membership.json";

/// The membership as it is kept.
#[derive(Debug, Deserialize, Serialize)]
struct Kept<Id> {
    #[serde(flatten)]
    membership: Membership<Id>,
    /// SHA-256 of the token it was got with: a token that a crash left behind
    /// is told from one to join with again.
    #[serde(default)]
    token: String,
}

/// The identity key in `data_dir`, made at the first start; or the one to come,
/// if the daemon is a member and there is another token to join with: then
/// [`load_or_join`] joins with it, under the same id.
///
/// # Errors
///
/// A file cannot be read, or written.
pub fn identity(data_dir: &Path, join_token_file: Option<&Path>) -> Result<Identity, Error> {
    let key = |name: &str| {
        let path = data_dir.join(name);
        Identity::load_or_create(&path).map_err(|error| Error::File { path, source: error.into() })
    };
    let Some(kept) = load::<serde_json::Value>(&data_dir.join(MEMBERSHIP))? else { return key(KEY) };
    let next = data_dir.join(NEXT_KEY);
    match read_token(join_token_file)? {
        Some(token) if hash(&token) == kept.token => {
            // It has joined with this token, and was cut off after that.
            if next.exists() {
                promote(data_dir)?;
            }
            forget(join_token_file);
        }
        Some(_) => return key(NEXT_KEY),
        // Nobody was shown this key, or the master refused it.
        None => drop(std::fs::remove_file(next)),
    }
    key(KEY)
}

fn hash(token: &str) -> String {
    Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read_token(path: Option<&Path>) -> Result<Option<String>, Error> {
    let Some(path) = path else { return Ok(None) };
    match std::fs::read_to_string(path) {
        Ok(token) => Ok(Some(token.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::File { path: path.into(), source: error.into() }),
    }
}

/// It is used up; what remains is of no use to a thief either.
fn forget(token_file: Option<&Path>) {
    if let Some(path) = token_file {
        let _ = std::fs::remove_file(path);
    }
}

fn load<Id: DeserializeOwned>(path: &Path) -> Result<Option<Kept<Id>>, Error> {
    let file = |source: BoxError| Error::File { path: path.into(), source };
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| file(e.into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file(error.into())),
    }
}

/// Puts the key to come into the place of the one that was.
fn promote(data_dir: &Path) -> Result<(), Error> {
    let next = data_dir.join(NEXT_KEY);
    let renamed = std::fs::rename(&next, data_dir.join(KEY))
        .and_then(|()| std::fs::File::open(data_dir))
        .and_then(|folder| folder.sync_all());
    renamed.map_err(|error| Error::File { path: next, source: error.into() })
}

/// Loads the membership from `data_dir`, or joins and saves it. Blocks.
///
/// With a membership and a join token, it joins again under the same id, with
/// the `identity` that [`identity`] gave, which takes the old one's place.
///
/// # Errors
///
/// As [`Error`] says. A join that was cut off after the master had answered
/// is repeated with the same token and key, which the master allows.
pub fn load_or_join<Id>(joining: &Joining<'_>, identity: &Identity) -> Result<Membership<Id>, Error>
where
    Id: DeserializeOwned + PartialEq + Serialize,
{
    let path = joining.data_dir.join(MEMBERSHIP);
    let known = load::<Id>(&path)?.map(|kept| kept.membership);
    let again = joining.data_dir.join(NEXT_KEY).exists();
    match known {
        Some(known) if !again => return Ok(known),
        _ => {}
    }
    let token = read_token(joining.join_token_file)?.ok_or(Error::NoToken)?;
    let membership: Membership<Id> = join(joining, identity, &token)?;
    if known.is_some_and(|known| known.id != membership.id) {
        let reason =
            "the token made a new member: use one of `cocalc host rotate-key`, or remove join_token_file";
        return Err(Error::Refused(reason.to_owned()));
    }
    let file = |source: BoxError| Error::File { path: path.clone(), source };
    let kept = Kept { membership, token: hash(&token) };
    let bytes = serde_json::to_vec_pretty(&kept).map_err(|e| file(e.into()))?;
    write_atomic(&path, &bytes).map_err(|e| file(e.into()))?;
    if again {
        promote(joining.data_dir)?;
    }
    forget(joining.join_token_file);
    Ok(kept.membership)
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
        .tls_config(crate::tls::for_agent(joining.master_url))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a crash may leave at each step, and the key that is used then.
    #[test]
    fn a_cut_off_join_goes_on_with_the_right_key() {
        let dir = tempfile::tempdir().unwrap();
        let (data, token) = (dir.path(), dir.path().join("token"));
        let used = Some(token.as_path());
        let key = |name: &str| Identity::load_or_create(&data.join(name)).unwrap().public_key();
        let now = || identity(data, used).unwrap().public_key();
        let member = |token: &str| {
            let membership = Membership { id: "me".to_owned(), issuer: "i".to_owned() };
            let kept = Kept { membership, token: hash(token) };
            std::fs::write(data.join(MEMBERSHIP), serde_json::to_vec(&kept).unwrap()).unwrap();
        };
        std::fs::write(&token, "first\n").unwrap();
        let first = now();
        assert_eq!(now(), first, "a join that was cut off uses the same key again");
        member("first");
        assert_eq!((now(), token.exists()), (first, false), "the token is used up");
        // A token to come with another key.
        std::fs::write(&token, "second").unwrap();
        let second = now();
        assert_ne!(second, first);
        assert_eq!((now(), key(KEY)), (second, first), "again with the same one");
        // It was refused, and taken away: the old key goes on.
        std::fs::remove_file(&token).unwrap();
        assert_eq!((now(), data.join(NEXT_KEY).exists()), (first, false));
        // It was accepted, and cut off before the key was in its place.
        std::fs::write(&token, "third").unwrap();
        let third = now();
        assert_ne!(third, second, "a key that was refused is not used again");
        member("third");
        assert_eq!((now(), key(KEY), token.exists()), (third, third, false));
        // Or after that.
        std::fs::write(&token, "third").unwrap();
        assert_eq!((now(), data.join(NEXT_KEY).exists()), (third, false));
    }
}
