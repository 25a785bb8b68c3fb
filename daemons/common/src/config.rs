//! One TOML file per daemon, every key also as `COCALC_<DAEMON>_<KEY>`.
//!
//! The environment wins over the file. A key in a table is written with the
//! table's name in front, for instance `COCALC_HOST_LIMITS_PIDS` for
//! `[limits] pids`. Unknown keys are refused by name; daemons derive
//! `deny_unknown_fields`.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not the TOML that the daemon expects.
    #[error("{0}")]
    Invalid(String),
}

/// What a daemon was called with.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Arguments {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Stop after validation.
    pub check_config: bool,
}

/// What follows from the arguments.
#[derive(Debug, Eq, PartialEq)]
pub enum Parsed {
    /// Go on with these.
    Run(Arguments),
    /// Print this and stop.
    Answer(String),
}

impl Arguments {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    ///
    /// Unknown arguments, with the usage.
    pub fn parse(
        name: &str,
        version: &str,
        arguments: impl IntoIterator<Item = String>,
    ) -> Result<Parsed, String> {
        let usage = format!("usage: cocalc-{name} [--config FILE] [--check-config] [--version]");
        let mut parsed = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--config" => {
                    let file = arguments.next().ok_or_else(|| format!("--config needs a file\n{usage}"))?;
                    parsed.config = Some(file.into());
                }
                "--check-config" => parsed.check_config = true,
                "--version" => return Ok(Parsed::Answer(format!("cocalc-{name} {version}"))),
                "--help" | "-h" => return Ok(Parsed::Answer(usage)),
                other => return Err(format!("unknown argument {other:?}\n{usage}")),
            }
        }
        Ok(Parsed::Run(parsed))
    }
}

/// Finds a limit that would let nobody in, or is none; each with its key in the table
/// `[limits]`.
///
/// # Errors
///
/// Which, and what it may be.
pub fn check_limits(limits: &[(&str, u32)]) -> Result<(), String> {
    match limits.iter().find(|(_, value)| !(1..=10_000_000).contains(value)) {
        Some((name, value)) => Err(format!("limits.{name}: {value} is not 1 to 10000000")),
        None => Ok(()),
    }
}

/// Loads the configuration of daemon `name` from `path` and the process's
/// environment.
///
/// # Errors
///
/// Unreadable files, wrong values and unknown keys, naming the key.
pub fn load<C: DeserializeOwned>(name: &str, path: Option<&Path>) -> Result<C, Error> {
    let text = match path {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?
        }
        None => String::new(),
    };
    let vars = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    parse(name, &text, vars)
}

/// Merges `text` and the variables of daemon `name` among `vars`.
///
/// # Errors
///
/// As [`load`].
pub fn parse<C: DeserializeOwned>(
    name: &str,
    text: &str,
    vars: impl IntoIterator<Item = (String, String)>,
) -> Result<C, Error> {
    let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| Error::Invalid(e.to_string()))?;
    let keys = keys::<C>();
    let prefix = format!("COCALC_{}_", name.to_ascii_uppercase());
    for (variable, value) in vars {
        let Some(key) = variable.strip_prefix(&prefix) else { continue };
        let key = key.to_ascii_lowercase();
        let value = scalar(value);
        let own = keys.contains(&key.as_str());
        let nested = keys
            .iter()
            .filter(|_| !own)
            .find_map(|parent| Some((*parent, key.strip_prefix(parent)?.strip_prefix('_')?)));
        match nested {
            Some((parent, child)) => {
                let parent = table.entry(parent).or_insert_with(|| toml::Table::new().into());
                match parent.as_table_mut() {
                    Some(parent) => drop(parent.insert(child.to_owned(), value)),
                    None => drop(table.insert(key, value)),
                }
            }
            None => drop(table.insert(key, value)),
        }
    }
    // Serialized again, so that an error shows the line with the key at fault.
    let merged = toml::to_string(&table).map_err(|e| Error::Invalid(e.to_string()))?;
    toml::from_str(&merged).map_err(|e| Error::Invalid(e.to_string().trim_end().to_owned()))
}

/// The names of a configuration's keys, as its type tells whoever reads it.
fn keys<C: DeserializeOwned>() -> &'static [&'static str] {
    let mut probe = Probe(&[]);
    // It never succeeds: there is nothing to read.
    drop(C::deserialize(&mut probe));
    probe.0
}

/// Has no values, and remembers which fields it was asked for.
struct Probe(&'static [&'static str]);

impl<'de> serde::Deserializer<'de> for &mut Probe {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: serde::de::Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("there is nothing to read"))
    }

    fn deserialize_struct<V: serde::de::Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// A variable's value as TOML would have it: a number, truth value or list if
/// it reads as one, and text otherwise.
fn scalar(text: String) -> toml::Value {
    let literal = format!("v = {text}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("v"));
    match literal {
        Some(value @ (toml::Value::Integer(_) | toml::Value::Boolean(_) | toml::Value::Array(_))) => value,
        _ => toml::Value::String(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Config {
        listen: String,
        #[serde(default)]
        lease_ms: u64,
        #[serde(default)]
        limits: Limits,
    }

    #[derive(Debug, Default, serde::Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Limits {
        pids: Option<u32>,
    }

    fn var(key: &str, value: &str) -> (String, String) {
        (key.into(), value.into())
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let config: Config = parse(
            "host",
            "listen = 'a'\nlease_ms = 1\n[limits]\npids = 5",
            [
                var("COCALC_HOST_LEASE_MS", "2"),
                var("COCALC_HOST_LIMITS_PIDS", "9"),
                var("COCALC_PROXY_X", "1"),
            ],
        )
        .unwrap();
        assert_eq!(config, Config { listen: "a".into(), lease_ms: 2, limits: Limits { pids: Some(9) } });
        // Also where the file has no such table.
        let config: Config = parse("host", "listen = 'a'", [var("COCALC_HOST_LIMITS_PIDS", "9")]).unwrap();
        assert_eq!(config.limits.pids, Some(9));
    }

    #[test]
    fn wrong_and_unknown_keys_are_named() {
        let unknown = parse::<Config>("host", "listen = 'a'\nlisten_adress = 'b'", []).unwrap_err();
        assert!(unknown.to_string().contains("listen_adress"), "{unknown}");
        let unknown = parse::<Config>("host", "listen = 'a'", [var("COCALC_HOST_LEESE", "1")]).unwrap_err();
        assert!(unknown.to_string().contains("leese"), "{unknown}");
        let unknown =
            parse::<Config>("host", "listen = 'a'", [var("COCALC_HOST_LIMITS_PITS", "9")]).unwrap_err();
        assert!(unknown.to_string().contains("pits"), "{unknown}");
        let wrong = parse::<Config>("host", "listen = 'a'\nlease_ms = 'soon'", []).unwrap_err();
        assert!(wrong.to_string().contains("lease_ms"), "{wrong}");
        let missing = parse::<Config>("host", "", []).unwrap_err();
        assert!(missing.to_string().contains("listen"), "{missing}");
    }

    #[test]
    fn arguments_are_checked() {
        let parse = |list: &[&str]| Arguments::parse("host", "1", list.iter().map(|s| (*s).to_owned()));
        assert_eq!(
            parse(&["--config", "a.toml", "--check-config"]),
            Ok(Parsed::Run(Arguments { config: Some("a.toml".into()), check_config: true }))
        );
        assert!(parse(&["--config"]).is_err());
        assert!(parse(&["serve"]).unwrap_err().contains("serve"));
    }
}
