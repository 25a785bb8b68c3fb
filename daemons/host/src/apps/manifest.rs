//! `~/.cocalc/apps.toml`, which a tenant writes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use cocalc_core::apps::{App, AppName};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use serde::Deserialize;

/// The largest file, and what is in it.
const FILE_BYTES_MAX: u64 = 64 << 10;
const APPS_MAX: usize = 32;
const COMMAND_BYTES_MAX: usize = 4096;
const PATH_BYTES_MAX: usize = 512;

/// What it declares.
#[derive(Debug, Deserialize, Eq, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    #[serde(default)]
    pub(crate) apps: BTreeMap<AppName, App>,
}

/// Which version of the file was read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Stamp {
    inode: u64,
    size: i64,
    changed: (i64, i64),
}

/// What was found.
#[derive(Debug)]
pub(super) enum Read {
    Unchanged,
    Missing,
    Found(Stamp, Result<Manifest, String>),
}

/// Reads the file beneath a volume, unless it is as `before`. Links lead nowhere.
pub(super) fn read(volume: &Path, before: Option<Stamp>) -> Read {
    let open = || -> io::Result<File> {
        let root = File::open(volume)?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        // A pipe that nobody writes to must not be waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(openat2(&root, "home/.cocalc/apps.toml", flags, Mode::empty(), resolve)?.into())
    };
    let Ok(file) = open() else { return Read::Missing };
    let Ok(about) = fstat(&file) else { return Read::Missing };
    let changed = (about.st_ctime, i64::try_from(about.st_ctime_nsec).unwrap_or(0));
    let stamp = Stamp { inode: about.st_ino, size: about.st_size, changed };
    if before == Some(stamp) {
        return Read::Unchanged;
    }
    if FileType::from_raw_mode(about.st_mode) != FileType::RegularFile {
        return Read::Found(stamp, Err("apps.toml is not a regular file".to_owned()));
    }
    let mut text = String::new();
    let parsed = match file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text) {
        Ok(count) if count as u64 > FILE_BYTES_MAX => {
            Err(format!("apps.toml is larger than {FILE_BYTES_MAX} bytes"))
        }
        Ok(_) => parse(&text),
        Err(error) => Err(format!("apps.toml cannot be read: {error}")),
    };
    Read::Found(stamp, parsed)
}

/// Parses what a tenant wrote.
pub(super) fn parse(text: &str) -> Result<Manifest, String> {
    let manifest: Manifest = toml::from_str(text).map_err(|error| {
        let place = error.span().map(|span| {
            let line = text.get(..span.start).map_or(1, |before| before.matches('\n').count() + 1);
            format!(", line {line}")
        });
        let message: String = error.message().chars().filter(|c| !c.is_control()).take(200).collect();
        format!("apps.toml{}: {message}", place.unwrap_or_default())
    })?;
    if manifest.apps.len() > APPS_MAX {
        return Err(format!("apps.toml: more than {APPS_MAX} apps"));
    }
    let mut ports = BTreeMap::new();
    for (name, app) in &manifest.apps {
        let refuse = |what: &str| Err(format!("apps.toml, app {name}: {what}"));
        if app.command.trim().is_empty()
            || app.command.len() > COMMAND_BYTES_MAX
            || app.command.contains('\0')
        {
            return refuse("command: 1 to 4096 bytes without NUL");
        }
        if app.port == Some(0) {
            return refuse("port: 1 to 65535");
        }
        if let Some(port) = app.port
            && let Some(other) = ports.insert(port, name)
        {
            return refuse(&format!("port {port} is that of app {other}"));
        }
        if let Some(path) = &app.ready {
            let plain = path.bytes().all(|byte| (0x21..0x7f).contains(&byte));
            if app.port.is_none() || !path.starts_with('/') || path.len() > PATH_BYTES_MAX || !plain {
                return refuse("ready: a path such as /health, of an app with a port");
            }
        }
        if app.viewable && app.port.is_none() {
            return refuse("viewable: only an app with a port can be viewed");
        }
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use cocalc_core::apps::Restart;

    use super::*;

    #[test]
    fn apps_are_declared() {
        let manifest = parse(
            "[apps.web]\ncommand = 'python3 -m http.server 8000'\nport = 8000\nready = '/health'\n\
             restart = 'on-failure'\nviewable = true\n[apps.worker]\ncommand = './work'\n",
        )
        .unwrap();
        let web = &manifest.apps[&"web".parse().unwrap()];
        assert_eq!((web.port, web.restart, web.viewable), (Some(8000), Restart::OnFailure, true));
        assert_eq!(manifest.apps[&"worker".parse().unwrap()].restart, Restart::Always);
        assert!(parse("").unwrap().apps.is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_named_with_its_place() {
        let many: String = (0..33).map(|n| format!("[apps.a{n}]\ncommand = 'x'\n")).collect();
        let long = format!("[apps.a]\ncommand = '{}'", "x".repeat(4097));
        let deep = format!("[apps.a]\ncommand = {}1{}", "[".repeat(10_000), "]".repeat(10_000));
        for (text, complaint) in [
            ("[apps.a]\ncommand = 'x'\nport = 70000", "line 3"),
            ("[apps.a]\ncommand = 'x'\nprot = 7", "prot"),
            ("[apps.A]\ncommand = 'x'", "name"),
            ("[apps.'../x']\ncommand = 'x'", "name"),
            ("[apps.a]\ncommand = ''", "command"),
            ("[apps.a]\nport = 1", "command"),
            ("[apps.a]\ncommand = 'x'\nport = 0", "port"),
            ("[apps.a]\ncommand = 'x'\nport = 1\n[apps.b]\ncommand = 'y'\nport = 1", "that of app a"),
            ("[apps.a]\ncommand = 'x'\nready = '/x'", "ready"),
            ("[apps.a]\ncommand = 'x'\nport = 1\nready = \"/x\\r\\nHost: y\"", "ready"),
            ("[apps.a]\ncommand = 'x'\nviewable = true", "viewable"),
            ("[apps.a]\ncommand = 'x'\nrestart = 'often'", "line 3"),
            ("not toml", "line 1"),
            (&many, "more than 32"),
            (&long, "command"),
            (&deep, "apps.toml"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(complaint), "{text:.60}: {error}");
            assert!(error.len() < 400 && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_file_is_read_beneath_the_home_and_only_if_it_is_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read(dir.path(), None), Read::Missing));
        let home = dir.path().join("home/.cocalc");
        std::fs::create_dir_all(&home).unwrap();
        let path = home.join("apps.toml");
        std::fs::write(&path, "[apps.a]\ncommand = 'x'\n").unwrap();
        let Read::Found(stamp, Ok(manifest)) = read(dir.path(), None) else { panic!() };
        assert_eq!(manifest.apps.len(), 1);
        assert!(matches!(read(dir.path(), Some(stamp)), Read::Unchanged));
        std::fs::write(&path, vec![b'#'; 70_000]).unwrap();
        let Read::Found(_, Err(complaint)) = read(dir.path(), Some(stamp)) else { panic!() };
        assert!(complaint.contains("larger"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(read(dir.path(), None), Read::Missing));
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        let Read::Found(_, Err(complaint)) = read(dir.path(), None) else { panic!() };
        assert!(complaint.contains("regular"));
    }
}
