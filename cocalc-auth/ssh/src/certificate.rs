//! What a certificate is worth.

use std::{net::IpAddr, time::Duration};

use cocalc_ids::{AccountId, ProjectId, Timestamp};
use ssh_key::{Certificate, HashAlg, certificate::CertType};

use crate::{Ports, Restrictions, SourceError, SourceList};

/// How long a user's certificate lives where nothing else is asked for.
pub const USER_LIFE: Duration = Duration::from_secs(300);
/// The longest life of a user's certificate.
pub const USER_LIFE_MAX: Duration = Duration::from_secs(3600);
/// How far certificates begin before they are made, so that a host whose clock
/// is behind the master's takes them.
pub(crate) const BACKDATED: Duration = Duration::from_secs(60);
/// How far the clocks of a host and the master may be apart.
const LEEWAY: Duration = Duration::from_secs(5);
/// The longest text of a certificate that is looked at.
const TEXT_BYTES_MAX: usize = 8 * 1024;
/// The most principals that are looked at.
const PRINCIPALS_MAX: usize = 64;

/// The extension that ties a certificate to a login and to the rights that were
/// known when it was made: `<session epoch> <ACL version>`.
pub(crate) const GRANT: &str = "grant@cocalc.com";

/// A user's certificate that was found good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UserCertificate {
    /// Whose it is.
    pub account: AccountId,
    /// Its number, for the audit log.
    pub serial: u64,
    /// Its name, for the audit log: `<account>/<project>/<serial>`, with
    /// `*` for all projects.
    pub key_id: String,
    /// The account's session epoch that it was made under.
    pub session_epoch: u64,
    /// The lowest version of the project's ACL that may decide.
    pub acl: u64,
    /// The fingerprint of the user's key.
    pub fingerprint: String,
    /// The key that signed it, `algorithm base64`.
    pub authority: String,
    /// When it ends.
    pub expires: Timestamp,
    /// What its sessions may do.
    pub restrictions: Restrictions,
}

/// A host's certificate that was found good.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostCertificate {
    /// The host's key, `algorithm base64`.
    pub key: String,
    /// Its number.
    pub serial: u64,
    /// When it ends.
    pub expires: Timestamp,
}

/// Verifies a user's certificate (OpenSSH text) for a login to `project`. That
/// the user holds its key must have been proved apart.
///
/// It does not say that the account may use the project.
///
/// # Errors
///
/// Why it is worth nothing. Whatever the certificate demands and is not known
/// here refuses it.
pub fn verify_user(
    text: &str,
    authorities: &[String],
    project: ProjectId,
    source: Option<IpAddr>,
    now: Timestamp,
) -> Result<UserCertificate, CertificateError> {
    let certificate = read(text)?;
    let authority = signed(&certificate, CertType::User, authorities, now)?;
    let life = certificate.valid_before().saturating_sub(certificate.valid_after());
    if life > (USER_LIFE_MAX + BACKDATED).as_secs() {
        return Err(CertificateError::Life);
    }
    let serial = certificate.serial();
    let (account, _) = certificate.key_id().split_once('/').ok_or(CertificateError::KeyId)?;
    let account: AccountId = account.parse().map_err(|_| CertificateError::KeyId)?;
    // A certificate without principals would be good for everything.
    let (of_project, of_account) = (project.to_string(), account_principal(account));
    if !certificate.valid_principals().iter().any(|name| *name == of_project || *name == of_account) {
        return Err(CertificateError::Principal);
    }
    let named = [Some(project), None].map(|project| user_key_id(account, project, serial));
    if !named.iter().any(|name| name == certificate.key_id()) {
        return Err(CertificateError::KeyId);
    }
    let mut restrictions = Restrictions::all();
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            "force-command" => restrictions.command = Some(value.clone()),
            "source-address" => {
                if !SourceList::parse_networks(value)?.admits(source) {
                    return Err(CertificateError::Source);
                }
            }
            other => return Err(CertificateError::Critical(other.to_owned())),
        }
    }
    let mut grant = None;
    for (name, value) in certificate.extensions().iter() {
        match (name.as_str(), value.as_str()) {
            ("permit-pty", "") => restrictions.pty = true,
            ("permit-port-forwarding", "") => {
                (restrictions.ports, restrictions.listen) = (Ports::All, Ports::All);
            }
            ("permit-agent-forwarding", "") => restrictions.agent = true,
            ("permit-X11-forwarding", "") => restrictions.x11 = true,
            (GRANT, value) => grant = parse_grant(value),
            // Permissions that nobody is given here.
            _ => {}
        }
    }
    let (session_epoch, acl) = grant.ok_or(CertificateError::Grant)?;
    Ok(UserCertificate {
        account,
        serial,
        key_id: certificate.key_id().to_owned(),
        session_epoch,
        acl,
        fingerprint: certificate.public_key().fingerprint(HashAlg::Sha256).to_string(),
        authority,
        expires: seconds(certificate.valid_before()),
        restrictions,
    })
}

/// Verifies a host's certificate (OpenSSH text) for the name `host` by which it
/// is reached. That the host holds its key must have been proved apart.
///
/// # Errors
///
/// Why it is worth nothing.
pub fn check_host(
    text: &str,
    authorities: &[String],
    host: &str,
    now: Timestamp,
) -> Result<HostCertificate, CertificateError> {
    let certificate = read(text)?;
    signed(&certificate, CertType::Host, authorities, now)?;
    if !certificate.valid_principals().iter().any(|name| name.eq_ignore_ascii_case(host)) {
        return Err(CertificateError::Principal);
    }
    if let Some(name) = certificate.critical_options().keys().next() {
        return Err(CertificateError::Critical(name.clone()));
    }
    let key = ssh_key::PublicKey::from(certificate.public_key().clone());
    Ok(HostCertificate {
        key: key.to_openssh().map_err(|_| CertificateError::Malformed)?.trim_end().to_owned(),
        serial: certificate.serial(),
        expires: seconds(certificate.valid_before()),
    })
}

/// The fingerprint of the key in a certificate that may be worth nothing, for
/// logs.
pub fn certificate_fingerprint(text: &str) -> Option<String> {
    Some(read(text).ok()?.public_key().fingerprint(HashAlg::Sha256).to_string())
}

fn read(text: &str) -> Result<Certificate, CertificateError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(CertificateError::Malformed);
    }
    let certificate = Certificate::from_openssh(text).map_err(|_| CertificateError::Malformed)?;
    if certificate.valid_principals().len() > PRINCIPALS_MAX {
        return Err(CertificateError::Malformed);
    }
    Ok(certificate)
}

/// Who of `authorities` has signed it; it is of that kind, and of this time.
fn signed(
    certificate: &Certificate,
    kind: CertType,
    authorities: &[String],
    now: Timestamp,
) -> Result<String, CertificateError> {
    if certificate.cert_type() != kind {
        return Err(CertificateError::Kind);
    }
    let own = ssh_key::PublicKey::from(certificate.signature_key().clone());
    let own = own.to_openssh().map_err(|_| CertificateError::Malformed)?;
    let authority = authorities
        .iter()
        .find(|known| known.as_str() == own.trim_end())
        .ok_or(CertificateError::Authority)?;
    let fingerprint = certificate.signature_key().fingerprint(HashAlg::Sha256);
    // The library's own clock is not asked: what is a good time is said below.
    certificate
        .validate_at(certificate.valid_after(), [&fingerprint])
        .map_err(|_| CertificateError::Signature)?;
    if now.plus(LEEWAY) < seconds(certificate.valid_after()) {
        return Err(CertificateError::NotYet);
    }
    if now >= seconds(certificate.valid_before()).plus(LEEWAY) {
        return Err(CertificateError::Expired);
    }
    Ok(authority.clone())
}

fn seconds(secs: u64) -> Timestamp {
    Timestamp::from_secs(i64::try_from(secs).unwrap_or(i64::MAX))
}

/// The principal of all projects of an account.
pub(crate) fn account_principal(account: AccountId) -> String {
    format!("account:{account}")
}

/// The name of a user's certificate: whose it is, for what, and its number.
pub(crate) fn user_key_id(account: AccountId, project: Option<ProjectId>, serial: u64) -> String {
    match project {
        Some(project) => format!("{account}/{project}/{serial}"),
        None => format!("{account}/*/{serial}"),
    }
}

fn parse_grant(text: &str) -> Option<(u64, u64)> {
    let (session_epoch, acl) = text.split_once(' ')?;
    Some((session_epoch.parse().ok()?, acl.parse().ok()?))
}

/// Why a certificate is worth nothing.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// It cannot be read.
    #[error("the certificate cannot be read")]
    Malformed,
    /// A user's where a host's is needed, or the other way around.
    #[error("a certificate of the other kind")]
    Kind,
    /// Somebody else signed it, or a key that was withdrawn.
    #[error("the certificate is of no authority that is trusted")]
    Authority,
    /// Its signature is wrong.
    #[error("the certificate's signature is wrong")]
    Signature,
    /// It begins later.
    #[error("the certificate is not valid yet")]
    NotYet,
    /// It has ended.
    #[error("the certificate has expired")]
    Expired,
    /// It lives for longer than any that the master signs.
    #[error("the certificate is valid for too long")]
    Life,
    /// Its name is not of the form `<account>/<project>/<serial>`.
    #[error("the certificate does not say whose it is")]
    KeyId,
    /// It does not say for which login it was made.
    #[error("the certificate does not say under which login it was made")]
    Grant,
    /// It is for other projects, or other hosts.
    #[error("the certificate is not for this name")]
    Principal,
    /// It is not good from that address.
    #[error("the certificate is not accepted from that address")]
    Source,
    /// Its list of addresses makes no sense.
    #[error("source-address: {0}")]
    Sources(#[from] SourceError),
    /// It demands something unknown.
    #[error("the certificate demands `{0}`, which is not known here")]
    Critical(String),
}
