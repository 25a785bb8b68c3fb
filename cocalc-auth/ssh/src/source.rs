//! Lists of addresses as in `from=` and in a certificate's `source-address`.

use std::net::IpAddr;

/// The most entries of a list.
const ENTRIES_MAX: usize = 256;

/// A list of addresses, networks and patterns, of which a leading `!` negates.
///
/// It is matched as OpenSSH does where the server looks no names up (its
/// default): an entry is an address, a network with its prefix length, or a
/// pattern of `*` and `?`, compared with the text of the address. A negated
/// entry that matches refuses, whatever else matches; a host name therefore
/// never matches.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SourceList(Vec<Entry>);

#[derive(Clone, Debug, Eq, PartialEq)]
struct Entry {
    negated: bool,
    what: What,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum What {
    Network { address: IpAddr, bits: u8 },
    Pattern(String),
}

impl SourceList {
    /// Parses what stands in `from="…"`.
    ///
    /// # Errors
    ///
    /// An empty list or entry, or a network whose prefix length does not fit
    /// its address, which OpenSSH refuses too.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        Self::entries(text, true)
    }

    /// Parses a certificate's `source-address`: networks only, none negated.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse), and anything that is no address.
    pub fn parse_networks(text: &str) -> Result<Self, SourceError> {
        Self::entries(text, false)
    }

    fn entries(text: &str, patterns: bool) -> Result<Self, SourceError> {
        let entries: Vec<&str> = text.split(',').collect();
        if entries.len() > ENTRIES_MAX {
            return Err(SourceError::TooMany);
        }
        let parse = |entry: &str| {
            // It may be a tenant's, and goes to people and logs.
            let shown = || entry.chars().filter(char::is_ascii_graphic).take(64).collect();
            let bad = || SourceError::Entry(shown());
            let (negated, rest) = match entry.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, entry),
            };
            if rest.is_empty() || (negated && !patterns) || !rest.bytes().all(|byte| byte.is_ascii_graphic())
            {
                return Err(bad());
            }
            let what = match network(rest) {
                Some(network) => network.ok_or_else(bad)?,
                None if patterns => What::Pattern(rest.to_ascii_lowercase()),
                None => return Err(bad()),
            };
            Ok(Entry { negated, what })
        };
        Ok(Self(entries.into_iter().map(parse).collect::<Result<_, _>>()?))
    }

    /// Whether a connection from `source` is let in. Where it comes from
    /// nowhere known, it is not.
    pub fn admits(&self, source: Option<IpAddr>) -> bool {
        let Some(source) = source.map(|source| source.to_canonical()) else { return false };
        let text = source.to_string();
        let matches = |entry: &&Entry| match &entry.what {
            What::Network { address, bits } => within(source, *address, *bits),
            What::Pattern(pattern) => wildcard(pattern.as_bytes(), text.as_bytes()),
        };
        let mut matching = self.0.iter().filter(matches).peekable();
        matching.peek().is_some() && matching.all(|entry| !entry.negated)
    }
}

/// `None` if it is no address at all, `Some(None)` if it is one with a prefix
/// that makes no sense.
fn network(text: &str) -> Option<Option<What>> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let width: u8 = if address.is_ipv4() { 32 } else { 128 };
    let bits = match bits {
        None => width,
        Some(bits) if bits.len() <= 3 && !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit()) => {
            match bits.parse::<u8>() {
                Ok(bits) if bits <= width => bits,
                _ => return Some(None),
            }
        }
        Some(_) => return Some(None),
    };
    // Bits of a host in a network's address are a mistake of whoever wrote it.
    let whole = match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) & ones(width - bits) == 0,
        IpAddr::V6(v6) => v6.to_bits() & ones(width - bits) == 0,
    };
    Some(whole.then_some(What::Network { address, bits }))
}

fn ones(count: u8) -> u128 {
    1_u128.checked_shl(u32::from(count)).map_or(u128::MAX, |power| power - 1)
}

fn within(source: IpAddr, network: IpAddr, bits: u8) -> bool {
    match (source, network) {
        (IpAddr::V4(source), IpAddr::V4(network)) => {
            u128::from(source.to_bits() ^ network.to_bits()) & !ones(32 - bits) == 0
        }
        (IpAddr::V6(source), IpAddr::V6(network)) => {
            (source.to_bits() ^ network.to_bits()) & !ones(128 - bits) == 0
        }
        _ => false,
    }
}

/// `*` is any number of characters, `?` one. Linear in memory, and at most the
/// product of both lengths in time.
fn wildcard(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    t = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Why a list of sources is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// An entry makes no sense.
    #[error("`{0}` is no address, network or pattern")]
    Entry(String),
    /// The list is too long.
    #[error("more than {ENTRIES_MAX} entries")]
    TooMany,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(list: &str, source: &str) -> bool {
        SourceList::parse(list).unwrap().admits(Some(source.parse().unwrap()))
    }

    #[test]
    fn addresses_networks_and_patterns_match() {
        for (list, source) in [
            ("10.0.0.1", "10.0.0.1"),
            ("10.0.0.0/8", "10.255.0.1"),
            ("0.0.0.0/0", "203.0.113.9"),
            ("10.0.*", "10.0.7.1"),
            ("10.0.0.?", "10.0.0.7"),
            ("2001:db8::/32", "2001:db8:1::5"),
            ("::/0", "::1"),
            ("10.0.0.1", "::ffff:10.0.0.1"),
            ("host.example.com,10.0.0.1", "10.0.0.1"),
            ("*,!10.0.0.2", "10.0.0.1"),
        ] {
            assert!(admits(list, source), "{list} {source}");
        }
        for (list, source) in [
            ("10.0.0.1", "10.0.0.2"),
            ("10.0.0.0/8", "11.0.0.1"),
            ("*.example.com", "10.0.0.1"),
            ("10.0.0.?", "10.0.0.77"),
            ("2001:db8::/32", "2001:db9::1"),
            ("0.0.0.0/0", "::1"),
            ("!10.0.0.1", "10.0.0.2"),
            ("*,!10.0.0.1", "10.0.0.1"),
            ("!10.0.0.1,*", "10.0.0.1"),
            ("!10.0.0.0/24,10.0.0.0/8", "10.0.0.9"),
        ] {
            assert!(!admits(list, source), "{list} {source}");
        }
        assert!(!SourceList::parse("*").unwrap().admits(None));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in
            ["", ",", "10.0.0.1,", "!", "10.0.0.0/33", "10.0.0.1/8", "::1/129", "::/", "10.0.0.0/+8", "a b"]
        {
            assert!(SourceList::parse(bad).is_err(), "{bad}");
        }
        for bad in ["10.*", "!10.0.0.0/8", "example.com"] {
            assert!(SourceList::parse_networks(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_of_stars_is_no_trap() {
        let list = SourceList::parse(&format!("{}x", "*1".repeat(400))).unwrap();
        assert!(!list.admits(Some("1111:1111:1111:1111:1111:1111:1111:1111".parse().unwrap())));
    }
}
