//! Lines of `authorized_keys`, and public keys.

use std::net::IpAddr;

use cocalc_ids::Timestamp;
use ssh_key::{HashAlg, PublicKey, public::KeyData};

use crate::{OptionError, Options, Restrictions};

/// The largest file of keys that is looked at.
pub const FILE_BYTES_MAX: u64 = 256 * 1024;
/// A longer line is none.
const LINE_BYTES_MAX: usize = 16 * 1024;
/// The longest comment that is kept.
const COMMENT_BYTES_MAX: usize = 200;

/// The algorithms that are accepted.
const ALGORITHMS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// A key with its options.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeyLine {
    /// The options, as they were written.
    pub options_text: String,
    /// What they mean.
    pub options: Options,
    /// `algorithm base64`.
    pub key: String,
    /// What follows.
    pub comment: String,
}

impl KeyLine {
    /// Parses `[options] algorithm base64 [comment]`.
    ///
    /// # Errors
    ///
    /// Why the key must be refused.
    pub fn parse(line: &str) -> Result<Self, OptionError> {
        let (options_text, key, comment) = split(line)?;
        let options = Options::parse(options_text)?;
        Ok(Self { options_text: options_text.to_owned(), options, key, comment })
    }
}

/// The options, the key and the comment of a line.
fn split(line: &str) -> Result<(&str, String, String), OptionError> {
    let line = line.trim_matches([' ', '\t', '\r']);
    if line.len() > LINE_BYTES_MAX || line.contains(['\0', '\n']) {
        return Err(OptionError::Malformed);
    }
    // As OpenSSH: a line that begins with a key has no options.
    if let Some((key, comment)) = key_of(line) {
        return Ok(("", key, comment));
    }
    let end = end_of_options(line).ok_or(OptionError::Malformed)?;
    let (key, comment) = key_of(line[end..].trim_start_matches([' ', '\t'])).ok_or(OptionError::Key)?;
    Ok((&line[..end], key, comment))
}

/// Where the options end: at the first blank outside quotes.
fn end_of_options(line: &str) -> Option<usize> {
    let bytes = line.as_bytes();
    let (mut at, mut quoted) = (0, false);
    while at < bytes.len() {
        match bytes[at] {
            b' ' | b'\t' if !quoted => return Some(at),
            b'\\' if bytes.get(at + 1) == Some(&b'"') => at += 1,
            b'"' => quoted = !quoted,
            _ => {}
        }
        at += 1;
    }
    None
}

/// The key that `text` begins with, and its comment.
fn key_of(text: &str) -> Option<(String, String)> {
    let mut words = text.split_ascii_whitespace();
    let (algorithm, encoded) = (words.next()?, words.next()?);
    if !ALGORITHMS.contains(&algorithm) {
        return None;
    }
    let canonical = format!("{algorithm} {encoded}");
    // It is a whole key of the algorithm that it says, and spelled the one way
    // in which it is compared.
    let key = PublicKey::from_openssh(&canonical).ok()?;
    let again = key.to_openssh().ok()?;
    if again.trim_end() != canonical || is_weak(&key) {
        return None;
    }
    let comment = words.collect::<Vec<_>>().join(" ");
    if comment.len() > COMMENT_BYTES_MAX || comment.chars().any(char::is_control) {
        return None;
    }
    Some((canonical, comment))
}

/// Whether anybody can sign for it: an Ed25519 key that is a point of small
/// order.
fn is_weak(key: &PublicKey) -> bool {
    let point = match key.key_data() {
        KeyData::Ed25519(key) => key.as_ref(),
        KeyData::SkEd25519(key) => key.public_key().as_ref(),
        _ => return false,
    };
    cocalc_auth::PublicKey::from_bytes(point).is_err()
}

/// The fingerprint of a key (`algorithm base64`) as OpenSSH shows it:
/// `SHA256:…`.
pub fn fingerprint(key: &str) -> Option<String> {
    Some(PublicKey::from_openssh(key).ok()?.fingerprint(HashAlg::Sha256).to_string())
}

/// What a file of keys says of a key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Found {
    /// It is not in the file.
    Nowhere,
    /// It is, and it opens sessions with these restrictions.
    Admitted(Restrictions),
    /// It is, and is refused.
    Refused(OptionError),
}

/// Looks for `key` (`algorithm base64`) in the text of an `authorized_keys`
/// file. As with OpenSSH, the first of several lines decides that can be read
/// and admits; a line that cannot be honoured admits nobody.
pub fn find_key(file: &[u8], key: &str, source: Option<IpAddr>, now: Timestamp) -> Found {
    let mut found = Found::Nowhere;
    for line in file.split(|byte| *byte == b'\n') {
        let Ok(line) = std::str::from_utf8(line) else { continue };
        let line = line.trim_matches([' ', '\t', '\r']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // Options of other people's keys are nobody's business.
        let Ok((options, listed, _)) = split(line) else { continue };
        if listed != key {
            continue;
        }
        let decided = Options::parse(options)
            .and_then(|options| options.admits(source, now).map(|()| options.restrictions().clone()));
        match decided {
            Ok(restrictions) => return Found::Admitted(restrictions),
            Err(error) => found = Found::Refused(error),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    #[test]
    fn a_line_is_taken_apart() {
        let plain = KeyLine::parse(&format!(" {KEY}  me  at home ")).unwrap();
        assert_eq!((plain.key.as_str(), plain.comment.as_str()), (KEY, "me at home"));
        let line = KeyLine::parse(&format!("command=\"a b, \\\" c\",no-pty\t{KEY} x")).unwrap();
        assert_eq!(line.options.restrictions().command.as_deref(), Some("a b, \" c"));
        assert_eq!(line.options_text, "command=\"a b, \\\" c\",no-pty");
        assert_eq!(fingerprint(KEY).unwrap(), "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 !!!!",
            "ssh-dss AAAAB3NzaC1kc3M=",
            // The blob is of another algorithm than it says.
            "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5",
            "ssh-ed25519-cert-v01@openssh.com AAAA",
        ] {
            assert!(KeyLine::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_line_that_admits_decides() {
        let now = Timestamp::from_secs(1_800_000_000);
        let home = Some("10.0.0.1".parse().unwrap());
        let find = |file: &str| find_key(file.as_bytes(), KEY, home, now);
        assert_eq!(find(""), Found::Nowhere);
        assert_eq!(find(&format!("# {KEY}\nrubbish\n")), Found::Nowhere);
        assert_eq!(find(&format!("\r\n{KEY}\r\n")), Found::Admitted(Restrictions::default()));
        assert_eq!(find(&format!("from=\"10.9.9.9\" {KEY}")), Found::Refused(OptionError::Source));
        assert!(matches!(find(&format!("unheard-of {KEY}")), Found::Refused(OptionError::Unknown(_))));
        let both = format!("expiry-time=\"20200101\" {KEY}\nno-pty {KEY}\n{KEY}\n");
        assert!(matches!(find(&both), Found::Admitted(restrictions) if !restrictions.pty));
    }
}
