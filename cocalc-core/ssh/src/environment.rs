//! The variables that a client may set for its session.

use std::collections::BTreeMap;

/// The most variables of one session.
const COUNT_MAX: usize = 64;
/// What they may hold together.
const BYTES_MAX: usize = 8 * 1024;

/// Adds a variable, if it is harmless and there is room.
///
/// Whoever may log in may run anything in the project; what is kept out are
/// variables that would change how the process is started, before it is theirs.
pub(crate) fn set(env: &mut BTreeMap<String, String>, name: &str, value: &str) -> bool {
    let used: usize = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    let fits = env.len() < COUNT_MAX && used + name.len() + value.len() <= BYTES_MAX;
    if !fits || !harmless(name) || value.contains('\0') {
        return false;
    }
    env.insert(name.to_owned(), value.to_owned());
    true
}

/// Keeps of what a proxy passes on what a client could have set here itself.
pub(crate) fn retain(env: &mut BTreeMap<String, String>) {
    let asked = std::mem::take(env);
    for (name, value) in asked {
        set(env, &name, &value);
    }
}

/// Whether a variable changes nothing of what a command does but its language
/// and looks: all that a forced command takes from who logs in. Whatever else a
/// program reads (`GIT_CONFIG_COUNT`, `PERL5OPT`, `NODE_OPTIONS`) could make it do
/// another thing.
pub(crate) fn is_cosmetic(name: &str) -> bool {
    matches!(name, "COLORTERM" | "LANG" | "LANGUAGE" | "TERM" | "TZ") || name.starts_with("LC_")
}

fn harmless(name: &str) -> bool {
    let mut bytes = name.bytes();
    let well_formed = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let special = ["LD_", "BASH_", "COCALC_", "GCONV_", "GLIBC_", "MALLOC_"];
    let exact = [
        "ENV",
        "HOME",
        "HOSTNAME",
        "IFS",
        "LOGNAME",
        "MAIL",
        "OLDPWD",
        "PATH",
        "PS4",
        "PWD",
        "SHELL",
        "SHELLOPTS",
        "SHLVL",
        "USER",
    ];
    well_formed && !special.iter().any(|prefix| name.starts_with(prefix)) && !exact.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_variables_are_taken() {
        let mut env = BTreeMap::new();
        for good in ["LANG", "LC_ALL", "TZ", "EDITOR", "_x1"] {
            assert!(set(&mut env, good, "value"), "{good}");
        }
        for bad in
            ["", "1A", "A=B", "A-B", "LD_PRELOAD", "BASH_ENV", "ENV", "PATH", "IFS", "COCALC_TOKEN", "Ä"]
        {
            assert!(!set(&mut env, bad, "value"), "{bad}");
        }
        assert!(!set(&mut env, "NUL", "a\0b"));
        assert_eq!(env.len(), 5);
    }

    #[test]
    fn their_number_and_size_are_bounded() {
        let mut env = BTreeMap::new();
        assert!(!set(&mut env, "BIG", &"x".repeat(BYTES_MAX)));
        let taken = (0..1000).filter(|n| set(&mut env, &format!("V{n}"), "x")).count();
        assert_eq!(taken, COUNT_MAX);
    }
}
