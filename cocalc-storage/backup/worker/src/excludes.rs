//! What is left out of a backup.

use std::path::Path;

use cocalc_backup::protocol::FailureKind;
use ignore::overrides::{Override, OverrideBuilder};

use crate::failure::Failed;

/// Patterns as in `.gitignore` at the root of the project, in rustic's sense: a
/// pattern says what is in, unless `!` is before it, and one with a `/` in it is
/// a full path from the root of the machine, which the snapshot's is not.
pub(crate) fn globs(root: &Path, patterns: &[String]) -> Result<Vec<String>, Failed> {
    let root = root.to_str().ok_or_else(|| {
        Failed::new(FailureKind::Invalid, format!("the path {} is not UTF-8", root.display()))
    })?;
    patterns.iter().map(|pattern| glob(root, pattern)).collect()
}

fn glob(root: &str, pattern: &str) -> Result<String, Failed> {
    let plain = pattern.trim_end_matches('/');
    if plain.is_empty() || pattern.starts_with('!') || pattern.contains(['\n', '\0']) {
        return Err(Failed::new(FailureKind::Invalid, format!("{pattern:?} is not a pattern to leave out")));
    }
    if !plain.contains('/') {
        return Ok(format!("!{pattern}"));
    }
    let mut glob = String::from("!");
    for c in root.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '{' | '}' | '\\') {
            glob.push('\\');
        }
        glob.push(c);
    }
    Ok(format!("{}/{}", glob.trim_end_matches('/'), pattern.trim_start_matches('/')))
}

/// Tells which paths below `root` are left out.
pub(crate) fn matcher(root: &Path, patterns: &[String]) -> Result<Override, Failed> {
    let wrong = |error: ignore::Error| Failed::new(FailureKind::Invalid, error.to_string());
    let mut builder = OverrideBuilder::new("");
    for glob in globs(root, patterns)? {
        builder.add(&glob).map_err(wrong)?;
    }
    builder.build().map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_in_a_gitignore_at_the_root() {
        let root = Path::new("/vol [1]/snapshots/a{b}");
        let is_out = |pattern: &str, path: &str, is_directory| {
            matcher(root, &[pattern.to_owned()]).unwrap().matched(root.join(path), is_directory).is_ignore()
        };
        assert!(is_out("many", "home/many", true) && is_out("*.bin", "home/a.bin", false));
        assert!(is_out("many/", "home/many", true) && !is_out("many/", "home/many", false));
        assert!(is_out("home/many", "home/many", true) && is_out("/home/many", "home/many", true));
        assert!(!is_out("home/many", "other/home/many", true) && !is_out("/many", "home/many", true));
        assert!(is_out("home/*/cache", "home/user/cache", true) && is_out("home/**/x", "home/a/b/x", false));
        for wrong in ["", "/", "!home", "a\nb"] {
            assert!(matcher(root, &[wrong.to_owned()]).is_err(), "{wrong:?}");
        }
    }
}
