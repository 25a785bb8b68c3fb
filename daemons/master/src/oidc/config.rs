//! OpenID providers in the configuration.

use std::{collections::BTreeSet, path::PathBuf};

use cocalc_auth::key_file;
use cocalc_auth_oidc::{Secret, Settings};
use serde::Deserialize;

/// How many providers there may be.
const PROVIDERS_MAX: usize = 50;

/// An OpenID provider with which people may log in: one `[[oidc]]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OidcConfig {
    /// What addresses and commands call it: 1 to 40 of `a-z`, `0-9` and `-`.
    pub name: String,
    /// What people call it. Default: its name.
    #[serde(default)]
    pub display_name: Option<String>,
    /// Its issuer URL, exactly as its discovery document says it.
    pub issuer: String,
    /// What it calls us.
    pub client_id: String,
    /// A file, mode 0600, with the secret that goes with that. Default: none,
    /// a public client.
    #[serde(default)]
    pub client_secret_file: Option<PathBuf>,
    /// What is asked for beside `openid`. Default `profile` and `email`.
    #[serde(default = "scopes")]
    pub scopes: Vec<String>,
    /// Only people with a verified address in one of these domains are let in.
    /// Default: any whom the provider knows.
    #[serde(default)]
    pub allowed_email_domains: Vec<String>,
    /// Whether whoever comes first gets an account. Otherwise only identities
    /// that were linked to an account are good. Default false.
    #[serde(default)]
    pub create_accounts: bool,
}

fn scopes() -> Vec<String> {
    vec!["profile".to_owned(), "email".to_owned()]
}

impl OidcConfig {
    /// A provider with defaults, for embedders and tests.
    pub fn new(name: impl Into<String>, issuer: impl Into<String>, client_id: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            display_name: None,
            issuer: issuer.into(),
            client_id: client_id.into(),
            client_secret_file: None,
            scopes: scopes(),
            allowed_email_domains: Vec::new(),
            create_accounts: false,
        }
    }

    /// What it is called before people.
    pub(super) fn shown(&self) -> &str {
        self.display_name.as_deref().unwrap_or(&self.name)
    }

    /// The settings of the provider, for a master at `url`; its secret is read.
    pub(super) fn settings(&self, url: &str) -> Result<Settings, String> {
        let wrong = |what: &str| Err(format!("oidc {}: {what}", self.name));
        let secret = match &self.client_secret_file {
            None => None,
            Some(path) => match key_file::load(path) {
                Ok(Some(bytes)) => match std::str::from_utf8(&bytes) {
                    Ok(text) => Some(Secret::new(text.trim())),
                    Err(_) => return wrong("client_secret_file: is not text"),
                },
                Ok(None) => return wrong(&format!("client_secret_file: there is no {}", path.display())),
                Err(error) => {
                    return wrong(&format!("client_secret_file: {}", cocalc_core::chain(&error)));
                }
            },
        };
        let scopes = self.scopes.iter().filter(|scope| *scope != "openid").cloned().collect();
        let redirect = format!("{url}/auth/oidc/{}/callback", self.name);
        let settings = Settings::new(&self.issuer, &self.client_id, redirect).secret(secret).scopes(scopes);
        match settings.validate() {
            Ok(()) => Ok(settings),
            Err(error) => wrong(&error.to_string()),
        }
    }
}

/// Checks what the types can't.
pub(crate) fn validate(providers: &[OidcConfig]) -> Result<(), String> {
    if providers.len() > PROVIDERS_MAX {
        return Err(format!("oidc: at most {PROVIDERS_MAX} providers"));
    }
    let (mut names, mut issuers) = (BTreeSet::new(), BTreeSet::new());
    for provider in providers {
        let name = &provider.name;
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if !(1..=40).contains(&name.len()) || !name.chars().all(is_name) {
            return Err(format!("oidc name {name:?}: 1 to 40 of a-z, 0-9 and -"));
        }
        if !names.insert(name) {
            return Err(format!("oidc {name}: two providers have that name"));
        }
        // Who somebody is at an issuer must not depend on by which name it is
        // asked.
        if !issuers.insert(&provider.issuer) {
            return Err(format!("oidc {name}: issuer: another provider has it"));
        }
        if provider.display_name.as_ref().is_some_and(|shown| {
            !(1..=100).contains(&shown.chars().count()) || shown.chars().any(char::is_control)
        }) {
            return Err(format!("oidc {name}: display_name: 1 to 100 characters, none of control"));
        }
        for domain in &provider.allowed_email_domains {
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            if domain.is_empty() || !domain.chars().all(is_part) {
                return Err(format!(
                    "oidc {name}: allowed_email_domains: {domain:?} is no domain, such as example.org"
                ));
            }
        }
        provider.settings("https://master.example")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn good() -> OidcConfig {
        OidcConfig::new("uni", "https://id.example.edu", "cocalc")
    }

    #[test]
    fn mistakes_are_named() {
        validate(&[good()]).unwrap();
        let with = |change: &dyn Fn(&mut OidcConfig)| {
            let mut config = good();
            change(&mut config);
            validate(&[config])
        };
        let no_domain = |config: &mut OidcConfig| config.allowed_email_domains = vec!["@x.org".into()];
        for (result, word) in [
            (with(&|config| config.name = "Uni/..".into()), "name"),
            (with(&|config| config.name = String::new()), "name"),
            (with(&|config| config.issuer = "http://id.example.edu".into()), "issuer"),
            (with(&|config| config.client_id = String::new()), "client_id"),
            (with(&|config| config.scopes = vec!["a b".into()]), "scopes"),
            (with(&|config| config.display_name = Some("a\nb".into())), "display_name"),
            (with(&no_domain), "allowed_email_domains"),
            (
                with(&|config| config.client_secret_file = Some("/nowhere/secret".into())),
                "client_secret_file",
            ),
            (validate(&[good(), good()]), "name"),
            (validate(&[good(), OidcConfig { name: "other".into(), ..good() }]), "issuer"),
        ] {
            let error = result.unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let config = OidcConfig { client_secret_file: Some(path.clone()), ..good() };
        std::fs::write(&path, "hunter2\n").unwrap();
        for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let result = validate(std::slice::from_ref(&config));
            assert_eq!(result.is_ok(), fine, "{mode:o}: {result:?}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "\n").unwrap();
        assert!(validate(&[config]).unwrap_err().contains("client_secret"));
    }
}
