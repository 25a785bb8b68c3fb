//! Paths inside a project's files.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ParseIdError;

/// The longest path, as `PATH_MAX` of Linux less its NUL (`linux/limits.h`).
const PATH_MAX: usize = 4095;
/// The longest name in it (`NAME_MAX`).
const NAME_MAX: usize = 255;

/// A path below the root of a project's volume or snapshot: names joined by
/// `/`, without `.`, `..`, empty names or NUL. Names need not be UTF-8, as on
/// Linux. The empty path is the root itself.
///
/// It says where somebody wants to look, not what is there: who follows it must
/// still resolve it beneath the root, without following links.
///
/// As text (`Display`, `FromStr`, serde) a byte that is not part of valid
/// UTF-8, a control character or a `%` is written `%XX`, and any `%XX` is read
/// back, so that every path has a text and a text has one path.
#[derive(Clone, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct TreePath(Box<[u8]>);

impl TreePath {
    /// The root of the tree.
    pub fn root() -> Self {
        Self::default()
    }

    /// Takes the bytes of a path, as a directory listing gives them.
    ///
    /// # Errors
    ///
    /// If it is absolute, longer than 4095 bytes, or has an empty, too long,
    /// `.` or `..` name, or a NUL.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParseIdError> {
        let name_is_good = |name: &[u8]| {
            !name.is_empty() && name.len() <= NAME_MAX && name != b"." && name != b".." && !name.contains(&0)
        };
        let good =
            bytes.is_empty() || (bytes.len() <= PATH_MAX && bytes.split(|b| *b == b'/').all(name_is_good));
        if good { Ok(Self(bytes.into())) } else { Err(refused()) }
    }

    /// The path as bytes, with `/` between names.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is the root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The names in it, outermost first.
    pub fn names(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|b| *b == b'/').filter(|name| !name.is_empty())
    }

    /// The directory it is in, and its name there; `None` for the root.
    pub fn split_last(&self) -> Option<(Self, &[u8])> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|b| *b == b'/') {
            Some(at) => (Self(self.0[..at].into()), &self.0[at + 1..]),
            None => (Self::root(), &self.0),
        })
    }

    /// The path of `name` in this directory.
    ///
    /// # Errors
    ///
    /// As [`from_bytes`](Self::from_bytes).
    pub fn join(&self, name: &[u8]) -> Result<Self, ParseIdError> {
        if name.contains(&b'/') {
            return Err(refused());
        }
        if self.is_root() {
            return Self::from_bytes(name)
                .and_then(|path| if path.is_root() { Err(refused()) } else { Ok(path) });
        }
        Self::from_bytes(&[&self.0, name].join(&b'/'))
    }

    /// Whether this is `other` or below it.
    pub fn is_within(&self, other: &Self) -> bool {
        other.is_root()
            || self.0.strip_prefix(&*other.0).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

fn refused() -> ParseIdError {
    ParseIdError {
        kind: "path",
        expected: "names joined by /, relative, without `.`, `..` or NUL, each at most 255 bytes, 4095 in all; \
                   in text, %XX stands for a byte",
    }
}

impl FromStr for TreePath {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        let mut bytes = Vec::with_capacity(s.len());
        let mut rest = s.as_bytes();
        while let [first, tail @ ..] = rest {
            if *first != b'%' {
                bytes.push(*first);
                rest = tail;
                continue;
            }
            let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
            // `from_str_radix` takes a sign, too.
            let byte = digits
                .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|digits| u8::from_str_radix(digits, 16).ok());
            bytes.push(byte.ok_or_else(refused)?);
            rest = &tail[2..];
        }
        Self::from_bytes(&bytes)
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() || c == '%' {
                    let mut buffer = [0; 4];
                    for byte in c.encode_utf8(&mut buffer).bytes() {
                        write!(f, "%{byte:02X}")?;
                    }
                } else {
                    f.write_char(c)?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for TreePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TreePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_the_tree_is_refused() {
        for bad in [
            "/", "/etc", "a//b", "a/", ".", "..", "a/../b", "a/./b", "%00", "%2E%2E/a", "a%2F%2Fb", "%",
            "%g0", "%+1",
        ] {
            assert!(bad.parse::<TreePath>().is_err(), "{bad:?}");
        }
        assert!(TreePath::from_bytes(&[b'x'; 256]).is_err());
        assert!(TreePath::from_bytes(&b"x/".repeat(2048)[..4095 + 1]).is_err());
        assert!(TreePath::root().join(b"").is_err());
        assert!(TreePath::root().join(b"a/b").is_err());
    }

    #[test]
    fn any_name_of_linux_has_one_text() {
        for name in [
            b"plain".as_slice(),
            b"\xff\xfe",
            b"new\nline",
            b"100%",
            b"%41",
            "\u{e9}\u{202e}".as_bytes(),
            b"..a",
            b"\x1b[2J",
        ] {
            let path = TreePath::from_bytes(name).unwrap();
            let text = path.to_string();
            assert!(!text.chars().any(char::is_control), "{text:?}");
            assert_eq!(text.parse::<TreePath>().unwrap(), path);
        }
    }

    #[test]
    fn paths_come_apart_and_together() {
        let path: TreePath = "home/user/x".parse().unwrap();
        let (directory, name) = path.split_last().unwrap();
        assert_eq!((directory.to_string().as_str(), name), ("home/user", b"x".as_slice()));
        assert_eq!(directory.join(name).unwrap(), path);
        assert!(path.is_within(&directory) && path.is_within(&path) && path.is_within(&TreePath::root()));
        assert!(!"home/user2".parse::<TreePath>().unwrap().is_within(&directory));
        assert_eq!(TreePath::root().split_last(), None);
        assert_eq!(path.names().count(), 3);
    }
}
