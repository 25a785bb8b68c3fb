//! Certificates by ACME (RFC 8555), with the challenge that needs neither another
//! port nor the DNS: TLS-ALPN-01 (RFC 8737), answered by the daemon's own HTTPS
//! listener, which the authority reaches at port 443 of each name.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cocalc_core::{BoxError, chain, ids::Timestamp};
use cocalc_http::Tls;
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, Identifier, LetsEncrypt, NewAccount,
    NewOrder, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use serde::Deserialize;
use tokio::time::{sleep, timeout};
use x509_parser::{extensions::GeneralName, pem::Pem};

use crate::files::write_atomic;

/// Most names of one certificate; Let's Encrypt's bound.
const NAMES_MAX: usize = 100;
/// How long one certificate may take, with everything.
const ORDER_LIMIT: Duration = Duration::from_secs(600);
/// How long the authority may take to look at the answers, and to sign.
const POLL_LIMIT: Duration = Duration::from_secs(180);
/// The pause after a failure, doubled each time. Authorities count failures:
/// Let's Encrypt allows five an hour for one name.
const AGAIN_MIN: Duration = Duration::from_secs(15 * 60);
const AGAIN_MAX: Duration = Duration::from_secs(12 * 3600);
/// How often it is looked at least whether it is time.
const LOOK: Duration = Duration::from_secs(3600);

/// The table `[acme]` of a daemon's configuration.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct AcmeSettings {
    /// The names of the certificate, for instance `["host1.example.org"]`; none
    /// of them `*.…`. Default: none, which is no ACME.
    pub names: Vec<String>,
    /// Where the authority may write to, as `["mailto:ops@example.org"]`. Default:
    /// nowhere.
    pub contact: Vec<String>,
    /// The authority's directory. Default: Let's Encrypt.
    pub directory: String,
    /// Whether you agree to the authority's terms. It must be true.
    pub agree_to_terms: bool,
}

impl Default for AcmeSettings {
    fn default() -> Self {
        Self {
            names: Vec::new(),
            contact: Vec::new(),
            directory: LetsEncrypt::Production.url().to_owned(),
            agree_to_terms: false,
        }
    }
}

impl AcmeSettings {
    /// Whether there is anything to certify.
    pub fn is_on(&self) -> bool {
        !self.names.is_empty()
    }

    /// Finds what cannot be, in a configuration that has `certificate` files, or
    /// serves names below `domain`.
    ///
    /// # Errors
    ///
    /// Naming the key at fault and what to do.
    pub fn validate(&self, certificate: bool, domain: &str) -> Result<(), String> {
        if !self.is_on() {
            return Ok(());
        }
        if certificate {
            return Err("acme.names: tls_cert is set, too; keep one of them".to_owned());
        }
        if !domain.is_empty() {
            return Err(format!(
                "acme.names: nothing certifies *.{domain} without a challenge in the DNS; get that certificate with a program that speaks to your DNS, and set tls_cert"
            ));
        }
        if !self.agree_to_terms {
            return Err("acme.agree_to_terms: read the authority's terms, and set it to true".to_owned());
        }
        if !self.directory.starts_with("https://") {
            return Err("acme.directory: begins with https://".to_owned());
        }
        if self.names.len() > NAMES_MAX {
            return Err(format!("acme.names: at most {NAMES_MAX}"));
        }
        if let Some(bad) = self.names.iter().find(|name| !is_name(name)) {
            return Err(format!("acme.names: {bad:?} is no name that can be certified so"));
        }
        if let Some(bad) = self.contact.iter().find(|contact| !contact.starts_with("mailto:")) {
            return Err(format!("acme.contact: {bad:?} does not begin with mailto:"));
        }
        Ok(())
    }
}

/// Whether it is a host name in lower case, and no wildcard or address.
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label) && name.parse::<std::net::IpAddr>().is_err()
}

/// Gets certificates. Clones share what is kept.
#[derive(Clone, Debug)]
pub(crate) struct Acme(Arc<Kept>);

#[derive(Debug)]
struct Kept {
    settings: AcmeSettings,
    folder: PathBuf,
}

/// What a certificate says.
#[derive(Debug, Eq, PartialEq)]
struct Facts {
    names: Vec<String>,
    begins: i64,
    ends: i64,
    /// Whether it was signed by its own key, as the first one is.
    own: bool,
}

impl Facts {
    /// Of the first certificate in `pem`.
    fn read(pem: &[u8]) -> Result<Self, BoxError> {
        for block in Pem::iter_from_buffer(pem) {
            let block = block?;
            if block.label != "CERTIFICATE" {
                continue;
            }
            let certificate = block.parse_x509()?;
            let mut names = Vec::new();
            if let Some(alternative) = certificate.subject_alternative_name()? {
                for name in &alternative.value.general_names {
                    if let GeneralName::DNSName(name) = name {
                        names.push((*name).to_owned());
                    }
                }
            }
            let validity = certificate.validity();
            return Ok(Self {
                names,
                begins: validity.not_before.timestamp(),
                ends: validity.not_after.timestamp(),
                own: certificate.subject() == certificate.issuer(),
            });
        }
        Err("there is no certificate in the file".into())
    }

    /// How long, at `now`, this certificate of `names` will do: until a third of
    /// its life is left.
    fn good_for(&self, names: &[String], now: i64) -> Duration {
        let (mut mine, mut wanted) = (self.names.clone(), names.to_vec());
        mine.sort();
        wanted.sort();
        if self.own || mine != wanted {
            return Duration::ZERO;
        }
        let due = self.ends.saturating_sub(self.ends.saturating_sub(self.begins) / 3);
        Duration::from_secs(u64::try_from(due.saturating_sub(now)).unwrap_or(0))
    }
}

impl Acme {
    /// Opens what is kept, or begins with a certificate of its own. Blocks.
    pub(crate) fn open(settings: AcmeSettings, folder: PathBuf) -> Result<(Self, Tls), BoxError> {
        crate::start::make_dir(&folder)?;
        let acme = Self(Arc::new(Kept { settings, folder }));
        let file = acme.file();
        if !file.exists() {
            let own = rcgen::generate_simple_self_signed(acme.0.settings.names.clone())?;
            write_atomic(&file, pem(&own.signing_key, &own.cert.pem()).as_bytes())?;
        }
        // Key and chain are in one file, so that they change together.
        let tls = Tls::open(&file, &file)?.with_challenges();
        Ok((acme, tls))
    }

    fn file(&self) -> PathBuf {
        self.0.folder.join("certificate.pem")
    }

    /// Gets the next certificate when it is time, for as long as it is polled.
    pub(crate) async fn keep(&self, tls: &Tls) {
        let mut pause = AGAIN_MIN;
        loop {
            let good_for = self.good_for().await;
            if good_for > Duration::ZERO {
                sleep(good_for.min(LOOK)).await;
                continue;
            }
            tracing::info!(names = ?self.0.settings.names, "getting a certificate");
            let got = timeout(ORDER_LIMIT, self.renew(tls)).await;
            tls.clear_challenges();
            let error = match got {
                Ok(Ok(())) => {
                    pause = AGAIN_MIN;
                    tls.look_again().await;
                    // A file that does not say what was asked for is not got anew at
                    // once, again and again.
                    if self.good_for().await > Duration::ZERO {
                        continue;
                    }
                    "the authority's certificate is not what was asked for".to_owned()
                }
                Ok(Err(error)) => chain(&*error).to_string(),
                Err(_) => "it took too long".to_owned(),
            };
            tracing::error!(error, again_secs = pause.as_secs(), "no certificate was got");
            sleep(pause).await;
            pause = (pause * 2).min(AGAIN_MAX);
        }
    }

    async fn good_for(&self) -> Duration {
        let file = self.file();
        let read = tokio::task::spawn_blocking(move || -> Result<Facts, BoxError> {
            Facts::read(&std::fs::read(file)?)
        });
        match read.await.map_err(BoxError::from).and_then(|facts| facts) {
            Ok(facts) => facts.good_for(&self.0.settings.names, Timestamp::now().secs()),
            Err(error) => {
                tracing::warn!(error = %chain(&*error), "the certificate cannot be read; getting another");
                Duration::ZERO
            }
        }
    }

    /// One order, from the account to the file.
    async fn renew(&self, tls: &Tls) -> Result<(), BoxError> {
        let account = self.account().await?;
        let names: Vec<Identifier> = self.0.settings.names.iter().cloned().map(Identifier::Dns).collect();
        let mut order = account.new_order(&NewOrder::new(&names)).await?;
        let mut authorizations = order.authorizations();
        while let Some(authorization) = authorizations.next().await {
            let mut authorization = authorization?;
            match authorization.status {
                AuthorizationStatus::Pending => {}
                AuthorizationStatus::Valid => continue,
                other => return Err(format!("an authorization is {other:?}").into()),
            }
            let Identifier::Dns(name) = authorization.identifier().identifier.clone() else {
                return Err("asked about something that is no name".into());
            };
            let mut challenge = authorization
                .challenge(ChallengeType::TlsAlpn01)
                .ok_or_else(|| format!("the authority does not check {name} by TLS-ALPN-01"))?;
            let proof = challenge.key_authorization().digest();
            let (chain, key) = answer(&name, proof.as_ref())?;
            tls.answer_challenge(&name, chain, key)?;
            challenge.set_ready().await?;
        }
        let patience = RetryPolicy::default().timeout(POLL_LIMIT);
        match order.poll_ready(&patience).await? {
            OrderStatus::Ready | OrderStatus::Valid => {}
            other => return Err(format!("the authority's answer to the order is {other:?}").into()),
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(self.0.settings.names.clone())?;
        params.distinguished_name = DistinguishedName::new();
        order.finalize_csr(params.serialize_request(&key)?.der()).await?;
        let chain = order.poll_certificate(&patience).await?;
        let (file, text) = (self.file(), pem(&key, &chain));
        tokio::task::spawn_blocking(move || write_atomic(&file, text.as_bytes())).await??;
        Ok(())
    }

    /// The account at this authority, made at the first time.
    async fn account(&self) -> Result<Account, BoxError> {
        let settings = &self.0.settings;
        let file = self.0.folder.join(account_file(&settings.directory));
        if let Some(credentials) = read(&file).await? {
            let credentials: AccountCredentials = serde_json::from_slice(&credentials)?;
            return Ok(Account::builder()?.from_credentials(credentials).await?);
        }
        let contact: Vec<&str> = settings.contact.iter().map(String::as_str).collect();
        let new = NewAccount {
            contact: &contact,
            terms_of_service_agreed: settings.agree_to_terms,
            only_return_existing: false,
        };
        let (account, credentials) =
            Account::builder()?.create(&new, settings.directory.clone(), None).await?;
        let bytes = serde_json::to_vec(&credentials)?;
        tokio::task::spawn_blocking(move || write_atomic(&file, &bytes)).await??;
        Ok(account)
    }
}

/// One for each authority: another one does not know the account.
fn account_file(directory: &str) -> String {
    use sha2::{Digest, Sha256};
    let hash: String = Sha256::digest(directory).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("account-{hash}.json")
}

async fn read(file: &Path) -> Result<Option<Vec<u8>>, BoxError> {
    let file = file.to_owned();
    match tokio::task::spawn_blocking(move || std::fs::read(file)).await? {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn pem(key: &KeyPair, chain: &str) -> String {
    format!("{}{chain}", key.serialize_pem())
}

/// The certificate that proves that this server is asked when `name` is (RFC
/// 8737, 3), and its key, both in DER.
fn answer(name: &str, proof: &[u8]) -> Result<(Vec<u8>, Vec<u8>), BoxError> {
    if proof.len() != 32 {
        return Err("the proof of a challenge is no SHA-256".into());
    }
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new([name.to_owned()])?;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(proof)];
    Ok((params.self_signed(&key)?.der().to_vec(), key.serialize_der()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(names: &[&str]) -> AcmeSettings {
        AcmeSettings {
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            agree_to_terms: true,
            ..AcmeSettings::default()
        }
    }

    #[test]
    fn what_cannot_be_certified_is_named() {
        settings(&["a.example", "b-1.example"]).validate(false, "").unwrap();
        // Nothing is looked at where there is no ACME.
        AcmeSettings { directory: String::new(), ..AcmeSettings::default() }.validate(true, "x").unwrap();
        for bad in ["", "*.example", "A.example", "10.0.0.1", "a..b", "-a.example", "a/b", "é.example"] {
            assert!(settings(&[bad]).validate(false, "").unwrap_err().contains("acme.names"), "{bad}");
        }
        let good = settings(&["a.example"]);
        assert!(good.validate(true, "").unwrap_err().contains("tls_cert"));
        assert!(good.validate(false, "apps.example").unwrap_err().contains("*.apps.example"));
        for (bad, key) in [
            (AcmeSettings { agree_to_terms: false, ..good.clone() }, "agree_to_terms"),
            (AcmeSettings { directory: "http://ca".into(), ..good.clone() }, "directory"),
            (AcmeSettings { contact: vec!["ops@a.example".into()], ..good.clone() }, "contact"),
        ] {
            assert!(bad.validate(false, "").unwrap_err().contains(key), "{key}");
        }
    }

    #[test]
    fn a_certificate_is_renewed_when_a_third_of_its_life_is_left() {
        let names = vec!["a.example".to_owned(), "b.example".to_owned()];
        let facts = Facts { names: names.clone(), begins: 1000, ends: 1900, own: false };
        assert_eq!(facts.good_for(&names, 1000), Duration::from_secs(600));
        let mut other_order = names.clone();
        other_order.reverse();
        assert_eq!(facts.good_for(&other_order, 1599), Duration::from_secs(1));
        assert_eq!(facts.good_for(&names, 1600), Duration::ZERO);
        assert_eq!(facts.good_for(&names, 5000), Duration::ZERO);
        // Of other names, or its own authority.
        assert_eq!(facts.good_for(&names[..1], 1000), Duration::ZERO);
        assert_eq!(Facts { own: true, ..facts }.good_for(&names, 1000), Duration::ZERO);
    }

    #[test]
    fn it_begins_with_a_certificate_of_its_own_that_is_not_good_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("acme");
        let (acme, _) = Acme::open(settings(&["a.example"]), folder.clone()).unwrap();
        let first = std::fs::read(acme.file()).unwrap();
        let facts = Facts::read(&first).unwrap();
        assert_eq!((facts.names.as_slice(), facts.own), (&["a.example".to_owned()][..], true));
        // It stays the same until there is another.
        Acme::open(settings(&["a.example"]), folder).unwrap();
        assert_eq!(std::fs::read(acme.file()).unwrap(), first);
        for bad in [&b""[..], b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(Facts::read(bad).is_err());
        }
        let (certificate, key) = answer("a.example", &[7; 32]).unwrap();
        let (_, seen) = x509_parser::parse_x509_certificate(&certificate).unwrap();
        let extension =
            seen.extensions().iter().find(|e| e.oid.to_id_string() == "1.3.6.1.5.5.7.1.31").unwrap();
        assert!(extension.critical && extension.value.ends_with(&[7; 32]) && !key.is_empty());
    }
}
