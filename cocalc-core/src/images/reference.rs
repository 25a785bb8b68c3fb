//! What an image is called, here and at a registry.

use std::{fmt, str::FromStr};

/// A name of an image in a federation: what people say instead of its digest.
///
/// Up to 128 letters, digits and `.`, `_`, `-`, `:`, `/`, the first a letter or
/// digit; and nothing that could be taken for a digest.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ImageName(String);

/// Says that a text is no name of an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "a name of an image has up to 128 letters, digits and . _ - : /, begins with a letter or digit, and is no digest"
)]
pub struct ParseNameError;

impl FromStr for ImageName {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let all = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/".contains(&byte));
        let digest = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if first && all && !digest && text.len() <= 128 {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseNameError)
        }
    }
}

impl ImageName {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image at a registry: `registry/path[:tag][@sha256:digest]`, the registry
/// always said. A word without a host would mean whatever the machine's
/// configuration makes of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reference {
    text: String,
    registry: usize,
}

/// Why a text is no reference.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{text:?} is no reference of an image: {reason}")]
pub struct Refused {
    text: String,
    reason: &'static str,
}

impl FromStr for Reference {
    type Err = Refused;

    fn from_str(text: &str) -> Result<Self, Refused> {
        let refused = |reason| Refused { text: text.chars().take(80).collect(), reason };
        if text.is_empty() || text.len() > 512 {
            return Err(refused("it has 1 to 512 characters"));
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/@".contains(&byte)) {
            return Err(refused("only letters, digits and . _ - : / @"));
        }
        let Some(registry) = text.find('/') else {
            return Err(refused("say the registry, for instance docker.io/library/debian:12"));
        };
        let host = &text[..registry];
        if !host.contains(['.', ':']) && host != "localhost" {
            return Err(refused("say the registry, for instance docker.io/library/debian:12"));
        }
        let (name, port) = host.split_once(':').unwrap_or((host, "443"));
        let is_name = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
        if !is_name || port.parse::<u16>().is_err() {
            return Err(refused("its registry is no host"));
        }
        let (path, digest) = match text[registry + 1..].split_once('@') {
            Some((path, digest)) => (path, Some(digest)),
            None => (&text[registry + 1..], None),
        };
        let parts = path.split('/').all(|part| part.starts_with(|c: char| c.is_ascii_alphanumeric()));
        if path.is_empty() || !parts || path.contains('@') {
            return Err(refused("its path is not right"));
        }
        let is_digest = |digest: &str| {
            digest.strip_prefix("sha256:").is_some_and(|hex| {
                hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            })
        };
        if digest.is_some_and(|digest| !is_digest(digest)) {
            return Err(refused("its digest is not sha256: and 64 hexadecimal digits"));
        }
        Ok(Self { text: text.to_owned(), registry })
    }
}

impl Reference {
    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The registry, with its port.
    pub fn registry(&self) -> &str {
        &self.text[..self.registry]
    }

    /// Without tag and digest.
    pub fn repository(&self) -> &str {
        let path = self.text.split('@').next().unwrap_or(&self.text);
        let slash = path.rfind('/').unwrap_or(0);
        match path[slash..].find(':') {
            Some(colon) => &path[..slash + colon],
            None => path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_says_its_registry() {
        let hex = "a".repeat(64);
        for (text, registry, repository) in [
            ("docker.io/library/debian:12", "docker.io", "docker.io/library/debian"),
            ("localhost:5000/x", "localhost:5000", "localhost:5000/x"),
            ("localhost/x/y:z", "localhost", "localhost/x/y"),
            (&format!("ghcr.io/a/b:t@sha256:{hex}"), "ghcr.io", "ghcr.io/a/b"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.registry(), reference.repository()), (registry, repository));
            assert_eq!(reference.as_str(), text);
        }
        for text in [
            "",
            "debian",
            "library/debian",
            "docker.io/",
            "docker.io/a b",
            "docker.io/../x",
            "--all.x/y",
            "docker.io/x@sha256:12",
            "docker.io/x@md5:1",
            "oci-archive:/etc/passwd",
            "docker.io/x\n",
            "docker.io//x",
            ".x/y",
            "docker.io/-x",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_name_is_no_digest_and_no_option() {
        for text in ["debian", "debian:12", "team/python-3.12_x", "a"] {
            assert_eq!(text.parse::<ImageName>().unwrap().as_str(), text);
        }
        for text in ["", "-x", ":x", "a b", "ü", &"a".repeat(129), &"0".repeat(64)] {
            assert!(text.parse::<ImageName>().is_err(), "{text}");
        }
    }
}
