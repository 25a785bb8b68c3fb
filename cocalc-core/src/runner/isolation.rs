//! How a project is kept apart: its privileges, and what it reaches.

use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// How many destinations a list may have.
const DESTINATIONS_MAX: usize = 64;

/// How a project is kept apart, beyond what every project has.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Isolation {
    /// No process gains privileges: no `sudo`, no setuid. Default: root inside
    /// can be become, and is nobody outside.
    #[serde(default)]
    pub strict: bool,
    /// What it reaches outside.
    #[serde(default)]
    pub network: NetworkPolicy,
}

/// What a project reaches outside. Whatever it says, no project reaches
/// link-local addresses (metadata services of clouds among them), its host,
/// other projects, or private networks that its host doesn't allow.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(tag = "policy", rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkPolicy {
    /// Everything else.
    #[default]
    Full,
    /// Nothing.
    None,
    /// These.
    Only {
        /// Names, addresses and networks, each with a port or all of them.
        allow: Destinations,
    },
}

/// Destinations that a project may reach; 64 at most.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Destinations(BTreeSet<Destination>);

impl Destinations {
    /// Collects them.
    ///
    /// # Errors
    ///
    /// If there are too many.
    pub fn new(all: impl IntoIterator<Item = Destination>) -> Result<Self, ParseDestinationError> {
        let all: BTreeSet<Destination> = all.into_iter().collect();
        if all.len() > DESTINATIONS_MAX {
            return Err(ParseDestinationError(format!("more than {DESTINATIONS_MAX} destinations")));
        }
        Ok(Self(all))
    }

    /// Each of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Destination> {
        self.0.iter()
    }

    /// The ports of a name; `None` among them stands for all.
    pub fn ports_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Option<u16>> + 'a {
        self.0
            .iter()
            .filter(move |one| matches!(&one.place, Place::Name(known) if known == name))
            .map(|one| one.port)
    }
}

impl<'de> Deserialize<'de> for Destinations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Vec::<Destination>::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A name (`pypi.org:443`), an address (`192.0.2.1`, `[2001:db8::1]:22`) or a
/// network (`192.0.2.0/24:5432`), with a port, or without one for all of them.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Destination {
    /// Where.
    pub place: Place,
    /// Its TCP and UDP port; `None` for all.
    pub port: Option<u16>,
}

/// Where a [`Destination`] is.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Place {
    /// A host name, in lower case, without a dot at its end.
    Name(String),
    /// A network; an address is a network of one.
    Network(Network),
}

/// A network of addresses, written `192.0.2.0/24`. The bits after the prefix
/// are zero.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Its first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        masked(address, self.prefix) == Some(self.address)
    }
}

/// An address without the bits after the prefix, if it has so many.
fn masked(address: IpAddr, prefix: u8) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => {
            let rest = 32_u32.checked_sub(prefix.into())?;
            let mask = u32::MAX.checked_shl(rest).unwrap_or(0);
            std::net::Ipv4Addr::from_bits(address.to_bits() & mask).into()
        }
        IpAddr::V6(address) => {
            let rest = 128_u32.checked_sub(prefix.into())?;
            let mask = u128::MAX.checked_shl(rest).unwrap_or(0);
            std::net::Ipv6Addr::from_bits(address.to_bits() & mask).into()
        }
    })
}

/// Says what is wrong with a destination or a network.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ParseDestinationError(String);

fn wrong(text: &str, what: &str) -> ParseDestinationError {
    let short: String = text.chars().take(80).collect();
    ParseDestinationError(format!("{short:?} is {what}"))
}

impl FromStr for Network {
    type Err = ParseDestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong(text, "no network, such as 192.0.2.0/24"))?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(digits) => digits
                .parse()
                .ok()
                .filter(|prefix| *prefix <= bits)
                .ok_or_else(|| wrong(text, "no network: its prefix is too long or no number"))?,
            None => bits,
        };
        if masked(address, prefix) != Some(address) {
            return Err(wrong(text, "no network: it has bits after its prefix"));
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.address.is_ipv4() { 32 } else { 128 };
        if self.prefix == whole {
            return self.address.fmt(f);
        }
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Destination {
    type Err = ParseDestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (place, port) = if let Some(rest) = text.strip_prefix('[') {
            let (place, rest) = rest.split_once(']').ok_or_else(|| wrong(text, "without a ]"))?;
            match rest.strip_prefix(':') {
                Some(port) => (place, Some(port)),
                None if rest.is_empty() => (place, None),
                None => return Err(wrong(text, "no destination: after ] comes a port")),
            }
        } else if text.matches(':').count() > 1 {
            (text, None)
        } else {
            text.split_once(':').map_or((text, None), |(place, port)| (place, Some(port)))
        };
        let port = match port {
            None => None,
            Some(port) => Some(
                port.parse::<u16>()
                    .ok()
                    .filter(|port| *port > 0)
                    .ok_or_else(|| wrong(text, "no destination: its port is not from 1 to 65535"))?,
            ),
        };
        // What ends in a digit is an address, or a mistake.
        let numeric = place.contains([':', '/']) || place.ends_with(|last: char| last.is_ascii_digit());
        let place = if numeric { Place::Network(place.parse()?) } else { Place::Name(name(text, place)?) };
        Ok(Self { place, port })
    }
}

fn name(text: &str, name: &str) -> Result<String, ParseDestinationError> {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(wrong(text, "no destination: neither a host's name nor an address"));
    }
    Ok(name)
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.place, self.port) {
            (Place::Name(name), None) => f.write_str(name),
            (Place::Name(name), Some(port)) => write!(f, "{name}:{port}"),
            (Place::Network(network), None) => network.fmt(f),
            (Place::Network(network), Some(port)) if network.address.is_ipv4() => {
                write!(f, "{network}:{port}")
            }
            (Place::Network(network), Some(port)) => write!(f, "[{network}]:{port}"),
        }
    }
}

impl Serialize for Destination {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Destination {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_written_as_they_are_read() {
        for text in [
            "pypi.org:443",
            "pypi.org",
            "192.0.2.1",
            "192.0.2.0/24:5432",
            "[2001:db8::1]:22",
            "2001:db8::/32",
            "[2001:db8::/32]:53",
            "0.0.0.0/0:80",
            "_srv.example.org:1",
        ] {
            let parsed: Destination = text.parse().unwrap();
            assert_eq!(parsed.to_string(), text);
        }
        assert_eq!("PyPI.org.:443".parse::<Destination>().unwrap().to_string(), "pypi.org:443");
        assert_eq!("[::1]".parse::<Destination>().unwrap().to_string(), "::1");
    }

    #[test]
    fn what_is_no_destination_is_refused() {
        for text in [
            "",
            ":443",
            "pypi.org:0",
            "pypi.org:65536",
            "pypi.org:x",
            "pypi..org",
            "a b",
            "*.org",
            "192.0.2.1/24",
            "192.0.2.256",
            "192.0.2.0/33",
            "[2001:db8::1",
            "[2001:db8::1]443",
            "a;flush ruleset",
            "10.0.0.0/8 }",
        ] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
        let many: Vec<String> = (0..65).map(|n| format!("10.0.0.{n}")).collect();
        assert!(serde_json::from_value::<Destinations>(serde_json::json!(many)).is_err());
    }

    #[test]
    fn a_policy_is_full_unless_it_says_otherwise() {
        let read = |text| serde_json::from_str::<Isolation>(text).unwrap();
        assert_eq!(read("{}"), Isolation::default());
        let only = read(r#"{"network":{"policy":"only","allow":["a.org:1","a.org:2","b.org"]}}"#);
        let NetworkPolicy::Only { allow } = &only.network else { panic!("{only:?}") };
        assert_eq!(allow.ports_of("a.org").collect::<Vec<_>>(), [Some(1), Some(2)]);
        assert_eq!(allow.ports_of("b.org").collect::<Vec<_>>(), [None]);
        assert_eq!(allow.ports_of("c.org").count(), 0);
        assert_eq!(read(&serde_json::to_string(&only).unwrap()), only);
    }

    #[test]
    fn networks_contain_their_addresses() {
        let network: Network = "10.128.0.0/9".parse().unwrap();
        assert!(network.contains([10, 255, 0, 1].into()) && !network.contains([10, 127, 0, 1].into()));
        assert!("0.0.0.0/0".parse::<Network>().unwrap().contains([1, 2, 3, 4].into()));
        assert!(!"::/0".parse::<Network>().unwrap().contains([1, 2, 3, 4].into()));
    }
}
