//! The options in front of a key.

use std::{collections::BTreeMap, net::IpAddr};

use cocalc_ids::Timestamp;

use crate::{Ports, Restrictions, SourceError, SourceList};

/// The longest text of options.
const BYTES_MAX: usize = 8 * 1024;
/// The most that `environment=` may set.
const VARIABLES_MAX: usize = 64;

/// What stands in front of a key in `authorized_keys`. Every option that
/// OpenSSH knows is either honoured here or refuses the key.
///
/// | option | |
/// |---|---|
/// | `from=` | honoured; names are not looked up, as is OpenSSH's default |
/// | `command=` | honoured, for shells, commands and sftp |
/// | `no-pty`, `pty` | honoured |
/// | `no-port-forwarding`, `port-forwarding`, `permitopen=`, `permitlisten=` | honoured; all names of the loopback are one |
/// | `no-agent-forwarding`, `agent-forwarding`, `no-x11-forwarding`, `x11-forwarding` | honoured |
/// | `restrict` | honoured |
/// | `environment=` | honoured |
/// | `expiry-time=` | honoured, in UTC where it says no zone |
/// | `no-user-rc`, `user-rc` | honoured: it is not offered to anybody |
/// | `cert-authority`, `principals=`, `tunnel=`, `no-touch-required`, `verify-required` | the key is refused |
///
/// An option that is unknown, or comes twice where OpenSSH forbids it, refuses
/// the key too.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Options {
    from: Option<SourceList>,
    expires: Option<Timestamp>,
    restrictions: Restrictions,
}

impl Options {
    /// Parses the text in front of a key; empty is no option.
    ///
    /// # Errors
    ///
    /// Why the key must be refused.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        if text.len() > BYTES_MAX || text.contains(['\0', '\n', '\r']) {
            return Err(OptionError::Malformed);
        }
        let mut options = Self::default();
        let (mut forwarding, mut open): (bool, Option<Vec<u16>>) = (true, None);
        let mut listen: Option<Vec<u16>> = None;
        let (mut every_port, mut listen_everywhere) = (false, false);
        let mut rest = text;
        while !rest.is_empty() {
            let (name, value, after) = next(rest)?;
            rest = after;
            let needs = || value.clone().ok_or_else(|| OptionError::NoValue(name.clone()));
            if value.is_some() && !VALUED.contains(&name.as_str()) {
                return Err(OptionError::Unknown(format!("{name}=")));
            }
            let twice = |is: bool| if is { Err(OptionError::Twice(name.clone())) } else { Ok(()) };
            match name.as_str() {
                "restrict" => {
                    options.restrictions.pty = false;
                    options.restrictions.agent = false;
                    options.restrictions.x11 = false;
                    forwarding = false;
                }
                "pty" => options.restrictions.pty = true,
                "no-pty" => options.restrictions.pty = false,
                "port-forwarding" => forwarding = true,
                "no-port-forwarding" => forwarding = false,
                "agent-forwarding" => options.restrictions.agent = true,
                "no-agent-forwarding" => options.restrictions.agent = false,
                "x11-forwarding" => options.restrictions.x11 = true,
                "no-x11-forwarding" => options.restrictions.x11 = false,
                // Not offered to anybody, so that both are true.
                "user-rc" | "no-user-rc" => {}
                "permitlisten" => {
                    let ports = listen.get_or_insert_default();
                    let value = needs()?;
                    // The host may be left out here.
                    let value = if value.contains(':') { value } else { format!("localhost:{value}") };
                    match destination(&value)? {
                        Destination::Port(port) => ports.push(port),
                        Destination::Every => listen_everywhere = true,
                        Destination::Elsewhere => {}
                    }
                }
                "permitopen" => {
                    let ports = open.get_or_insert_default();
                    match destination(&needs()?)? {
                        Destination::Port(port) => ports.push(port),
                        Destination::Every => every_port = true,
                        Destination::Elsewhere => {}
                    }
                }
                "from" => {
                    twice(options.from.is_some())?;
                    options.from = Some(SourceList::parse(&needs()?)?);
                }
                "command" => {
                    twice(options.restrictions.command.is_some())?;
                    options.restrictions.command = Some(needs()?);
                }
                "environment" => set(&mut options.restrictions.environment, &needs()?)?,
                "expiry-time" => {
                    let time = moment(&needs()?)?;
                    // Of several the earliest counts.
                    options.expires = Some(options.expires.map_or(time, |before| before.min(time)));
                }
                "cert-authority" | "principals" | "tunnel" | "no-touch-required" | "verify-required" => {
                    return Err(OptionError::Unsupported(name));
                }
                _ => return Err(OptionError::Unknown(name)),
            }
        }
        let allowed = |ports: Option<Vec<u16>>, every: bool| match (forwarding, ports) {
            (false, _) => Ports::none(),
            (true, Some(ports)) if !every => Ports::Only(ports.into_iter().collect()),
            (true, _) => Ports::All,
        };
        options.restrictions.ports = allowed(open, every_port);
        options.restrictions.listen = allowed(listen, listen_everywhere);
        Ok(options)
    }

    /// Whether the key may be used from `source` at `now`.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn admits(&self, source: Option<IpAddr>, now: Timestamp) -> Result<(), OptionError> {
        if self.expires.is_some_and(|expires| now >= expires) {
            return Err(OptionError::Expired);
        }
        if self.from.as_ref().is_some_and(|from| !from.admits(source)) {
            return Err(OptionError::Source);
        }
        Ok(())
    }

    /// What sessions of the key may do.
    pub fn restrictions(&self) -> &Restrictions {
        &self.restrictions
    }
}

/// The options that take a value.
const VALUED: [&str; 8] =
    ["from", "command", "environment", "expiry-time", "permitopen", "permitlisten", "principals", "tunnel"];

/// Splits the next option off: its name in lower case, its value, and what
/// follows.
fn next(text: &str) -> Result<(String, Option<String>, &str), OptionError> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let name = text[..end].to_ascii_lowercase();
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Err(OptionError::Malformed);
    }
    let rest = &text[end..];
    let (value, rest) = match rest.strip_prefix("=\"") {
        Some(quoted) => {
            let (value, rest) = unquote(quoted)?;
            (Some(value), rest)
        }
        None if rest.starts_with('=') => return Err(OptionError::Malformed),
        None => (None, rest),
    };
    match rest.strip_prefix(',') {
        Some("") => Err(OptionError::Malformed),
        Some(rest) => Ok((name, value, rest)),
        None if rest.is_empty() => Ok((name, value, "")),
        None => Err(OptionError::Malformed),
    }
}

/// The text up to the closing quote; a quote inside it has a backslash before
/// it, and no other backslash means anything.
fn unquote(text: &str) -> Result<(String, &str), OptionError> {
    let mut value = String::new();
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' if characters.peek().is_some_and(|(_, next)| *next == '"') => {
                characters.next();
                value.push('"');
            }
            other => value.push(other),
        }
    }
    Err(OptionError::Malformed)
}

enum Destination {
    Port(u16),
    Every,
    /// Somewhere that nobody is connected to anyway.
    Elsewhere,
}

fn destination(text: &str) -> Result<Destination, OptionError> {
    let bad = || OptionError::Value("permitopen".to_owned());
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or_else(bad)?,
        None => text.split_once(':').ok_or_else(bad)?,
    };
    if host.is_empty() || port.contains(':') {
        return Err(bad());
    }
    let inside = host == "*"
        || host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let number = match port {
        "*" => None,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(digits.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?)
        }
        _ => return Err(bad()),
    };
    Ok(match (inside, number) {
        (false, _) => Destination::Elsewhere,
        (true, None) => Destination::Every,
        (true, Some(port)) => Destination::Port(port),
    })
}

/// `NAME=value`; of two of the same name the first counts, as in OpenSSH.
fn set(variables: &mut BTreeMap<String, String>, text: &str) -> Result<(), OptionError> {
    let bad = || OptionError::Value("environment".to_owned());
    let (name, value) = text.split_once('=').ok_or_else(bad)?;
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(bad());
    }
    if variables.len() >= VARIABLES_MAX {
        return Err(bad());
    }
    variables.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    Ok(())
}

/// `YYYYMMDD`, `YYYYMMDDHHMM` or `YYYYMMDDHHMMSS`, with or without `Z`.
fn moment(text: &str) -> Result<Timestamp, OptionError> {
    let bad = || OptionError::Value("expiry-time".to_owned());
    let digits = text.strip_suffix(['Z', 'z']).unwrap_or(text);
    if !matches!(digits.len(), 8 | 12 | 14) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number = |from: usize, to: usize| -> i64 {
        digits.get(from..to).and_then(|part| part.parse().ok()).unwrap_or(0)
    };
    let (year, month, day) = (number(0, 4), number(4, 6), number(6, 8));
    let (hour, minute, second) = (number(8, 10), number(10, 12), number(12, 14));
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return Err(bad()),
    };
    if year < 1970 || !(1..=days).contains(&day) || hour > 23 || minute > 59 || second > 59 {
        return Err(bad());
    }
    // Days since 1970-01-01 in the Gregorian calendar, counted from March.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let of_years = y * 365 + y / 4 - y / 100 + y / 400;
    let since = of_years + (m * 153 + 2) / 5 + day - 1 - 719_468;
    Ok(Timestamp::from_secs(since * 86_400 + hour * 3600 + minute * 60 + second))
}

/// Why a key is refused for its options.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// It cannot be read.
    #[error("the line cannot be read")]
    Malformed,
    /// It does not have an algorithm that is accepted.
    #[error("not a public key of OpenSSH")]
    Key,
    /// Nobody knows the option.
    #[error("unknown option `{0}`")]
    Unknown(String),
    /// The option cannot be honoured here.
    #[error("option `{0}` is not supported here, so the key is not accepted")]
    Unsupported(String),
    /// An option that needs a value has none.
    #[error("option `{0}` needs a value")]
    NoValue(String),
    /// An option comes twice.
    #[error("option `{0}` comes twice")]
    Twice(String),
    /// The value of an option makes no sense.
    #[error("the value of option `{0}` makes no sense")]
    Value(String),
    /// The list of sources makes no sense.
    #[error("option `from`: {0}")]
    From(#[from] SourceError),
    /// The key's time is over.
    #[error("the key has expired")]
    Expired,
    /// The key is not good from that address.
    #[error("the key is not accepted from that address")]
    Source,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn restrictions(text: &str) -> Restrictions {
        Options::parse(text).unwrap().restrictions
    }

    #[test]
    fn what_is_honoured_is_said() {
        assert_eq!(restrictions(""), Restrictions::default());
        let forced = restrictions(r#"command="echo \"hi, there\" \n""#);
        assert_eq!(forced.command.as_deref(), Some(r#"echo "hi, there" \n"#));
        assert!(!restrictions("no-pty").pty && !restrictions("NO-PTY").pty);
        let restricted = restrictions("restrict,agent-forwarding,X11-forwarding");
        assert!(!restricted.pty && restricted.ports == Ports::none() && restricted.listen == Ports::none());
        assert!(restricted.agent && restricted.x11);
        assert_eq!(restrictions("restrict"), Restrictions::all());
        assert!(!restrictions("no-agent-forwarding").agent && !restrictions("no-X11-forwarding").x11);
        let listening =
            restrictions(r#"permitlisten="8080",permitlisten="localhost:81",permitlisten="far:1""#);
        assert_eq!((listening.listen, listening.ports), (Ports::Only([81, 8080].into()), Ports::All));
        let opened = restrictions("restrict,pty,port-forwarding,permitopen=\"localhost:80\"");
        assert!(opened.pty && opened.ports == Ports::Only([80].into()));
        let many = r#"permitopen="[::1]:1",permitopen="127.0.0.1:2",permitopen="db.example:5432""#;
        assert_eq!(restrictions(many).ports, Ports::Only([1, 2].into()));
        assert_eq!(restrictions(r#"permitopen="*:*""#).ports, Ports::All);
        assert_eq!(restrictions(r#"permitopen="far:*""#).ports, Ports::Only([].into()));
        let set = restrictions(r#"environment="A=1",environment="A=2",environment="B=x=y""#).environment;
        assert_eq!(set, [("A".into(), "1".into()), ("B".into(), "x=y".into())].into());
    }

    #[test]
    fn what_is_not_honoured_refuses_the_key() {
        for unsupported in
            ["cert-authority", "principals=\"a\"", "tunnel=\"1\"", "no-touch-required", "verify-required"]
        {
            assert!(matches!(Options::parse(unsupported), Err(OptionError::Unsupported(_))), "{unsupported}");
        }
        for bad in [
            "nonsense",
            "no-pty=\"x\"",
            "from",
            "command",
            "from=\"\"",
            "from=10.0.0.1",
            "command=\"x",
            "command=\"x\"y",
            "command=\"a\",command=\"b\"",
            "from=\"*\",from=\"*\"",
            "no-pty,",
            ",no-pty",
            "no-pty,,pty",
            "no-pty pty",
            "environment=\"A\"",
            "environment=\"A B=1\"",
            "permitopen=\"80\"",
            "permitopen=\"a:b\"",
            "permitopen=\"localhost:0\"",
            "permitopen=\"localhost:65536\"",
            "expiry-time=\"tomorrow\"",
            "expiry-time=\"20230229\"",
            "expiry-time=\"202313010000\"",
            "command=\"a\nb\"",
        ] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn time_is_counted() {
        for (text, secs) in [
            ("19700101", 0),
            ("20000229", 951_782_400),
            ("20240301000000Z", 1_709_251_200),
            ("202611270029", 1_795_739_340),
            ("20380119031408", 2_147_483_648),
        ] {
            assert_eq!(moment(text), Ok(Timestamp::from_secs(secs)), "{text}");
        }
        let options = Options::parse("expiry-time=\"20240301\"").unwrap();
        let admits = |secs| options.admits(None, Timestamp::from_secs(secs));
        assert_eq!(admits(1_709_251_199), Ok(()));
        assert_eq!(admits(1_709_251_200), Err(OptionError::Expired));
    }
}
