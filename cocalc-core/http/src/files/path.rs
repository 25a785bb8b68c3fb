//! The path of a file, as an address spells it.

use std::fmt::Write as _;

/// A place below the root of a project's files: plain names only, so that no
/// spelling of it leads up, or is read in two ways.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct FilePath {
    names: Vec<Vec<u8>>,
    /// Whether the address ends with a slash.
    pub(crate) slash: bool,
}

/// The longest name that Linux knows.
const NAME_BYTES_MAX: usize = 255;

impl FilePath {
    /// Reads what follows `/files` in an address: empty, or beginning with a
    /// slash. `None` if it is no path: a broken escape, an empty or dot
    /// segment, an encoded slash, a NUL.
    pub(crate) fn parse(rest: &str) -> Option<Self> {
        let Some(rest) = rest.strip_prefix('/') else {
            return rest.is_empty().then(Self::default);
        };
        if rest.is_empty() {
            return Some(Self { names: vec![], slash: true });
        }
        let (rest, slash) = rest.strip_suffix('/').map_or((rest, false), |rest| (rest, true));
        let names = rest.split('/').map(|segment| decode(segment).filter(|name| is_name(name)));
        Some(Self { names: names.collect::<Option<_>>()?, slash })
    }

    /// The path from the root, for the kernel: `.` or `a/b`.
    pub(crate) fn relative(&self) -> Vec<u8> {
        if self.names.is_empty() { b".".to_vec() } else { self.names.join(&b'/') }
    }

    /// The last name; `None` of the root.
    pub(crate) fn name(&self) -> Option<&[u8]> {
        self.names.last().map(Vec::as_slice)
    }

    /// The directory it is in; the root is in itself.
    pub(crate) fn parent(&self) -> Self {
        let kept = self.names.len().saturating_sub(1);
        Self { names: self.names[..kept].to_vec(), slash: true }
    }

    /// The path from the root, as an address spells it, beginning with a slash.
    pub(crate) fn encoded(&self) -> String {
        let mut text: String = self.names.iter().map(|name| format!("/{}", encode(name))).collect();
        if self.slash {
            text.push('/');
        }
        text
    }

    /// The path from the root, for people.
    pub(crate) fn shown(&self) -> String {
        format!("/{}", String::from_utf8_lossy(&self.names.join(&b'/')))
    }
}

/// A name that a directory can have.
pub(crate) fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| *b == b'/' || *b == 0)
}

/// Undoes the escapes of a segment; `None` if one of them is broken.
pub(crate) fn decode(segment: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(b) = rest.next() {
        bytes.push(match b {
            b'%' => {
                let digit = |b: u8| char::from(b).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high << 4 | low).ok()?
            }
            b => b,
        });
    }
    Some(bytes)
}

/// Escapes all but the characters that mean nothing anywhere (RFC 3986, 2.3).
pub(crate) fn encode(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for b in name {
        if b.is_ascii_alphanumeric() || b"-._~".contains(b) {
            text.push(char::from(*b));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{b:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_has_no_second_reading() {
        for (rest, relative, slash) in [
            ("", ".", false),
            ("/", ".", true),
            ("/a", "a", false),
            ("/a/", "a", true),
            ("/a%20b/%c3%A4;x=1/...", "a b/ä;x=1/...", false),
            ("/%25%32%65", "%2e", false),
        ] {
            let path = FilePath::parse(rest).unwrap_or_else(|| panic!("{rest}"));
            assert_eq!((String::from_utf8(path.relative()).unwrap().as_str(), path.slash), (relative, slash));
        }
        let long = format!("/{}", "x".repeat(256));
        for bad in [
            "//", "/a//b", "//a", "/a//", "/.", "/..", "/../a", "/a/../b", "/%2e%2e", "/%2E./x", "/a%2fb",
            "/a%00b", "/%", "/%2", "/%zz", "/%+1", "a", &long,
        ] {
            assert_eq!(FilePath::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn names_come_back_whatever_their_bytes(name in prop::collection::vec(1u8.., 1..255)) {
            prop_assume!(is_name(&name));
            let path = FilePath::parse(&format!("/x/{}", encode(&name))).unwrap();
            prop_assert_eq!(path.name(), Some(&*name));
            prop_assert_eq!(FilePath::parse(&path.encoded()), Some(path));
        }
    }
}
