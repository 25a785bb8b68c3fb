//! Users of the project, from its own `/etc/passwd` and `/etc/group`.
//!
//! The library has this file, too, for projects whose helper does not answer.

/// Who a process is to be.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// A user, and how to become it.
#[derive(Clone, Debug)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) home: String,
    pub(crate) shell: String,
    pub(crate) identity: Identity,
}

/// The ordinary user's id.
pub(crate) const ORDINARY: u32 = 1000;

/// How much is read of each file. They are the tenant's: huge ones must not fill the
/// memory.
pub(crate) const BYTES_MAX: u64 = 1 << 20;

/// Finds `name` in the text of both files; without one the ordinary user, who is known
/// by number even where the tenant removed the files or the line.
pub(crate) fn lookup(passwd: &str, group: &str, name: Option<&str>) -> Option<User> {
    let by = |wanted: &dyn Fn(&str, u32) -> bool| {
        passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            wanted(name, uid).then(|| User {
                name: name.into(),
                home: home.into(),
                shell: if shell.is_empty() { "/bin/sh".into() } else { shell.into() },
                identity: Identity { uid, gid, groups: groups(group, name, gid) },
            })
        })
    };
    match name {
        Some(name) => by(&|other, _| other == name),
        None => by(&|_, uid| uid == ORDINARY).or_else(|| {
            Some(User {
                name: "user".into(),
                home: "/home/user".into(),
                shell: "/bin/sh".into(),
                identity: Identity { uid: ORDINARY, gid: ORDINARY, groups: vec![ORDINARY] },
            })
        }),
    }
}

fn groups(group: &str, user: &str, primary: u32) -> Vec<u32> {
    let mut found = vec![primary];
    for line in group.lines() {
        let mut fields = line.split(':').skip(2);
        let (Some(gid), Some(members)) = (fields.next(), fields.next()) else { continue };
        if let Ok(gid) = gid.parse()
            && members.split(',').any(|member| member == user)
            && !found.contains(&gid)
        {
            found.push(gid);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1000::/home/user:\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:\nvideo:x:44:usermore\n";

    #[test]
    fn finds_users_and_their_groups() {
        let user = lookup(PASSWD, GROUP, None).unwrap();
        assert_eq!(user.home, "/home/user");
        assert_eq!((user.name.as_str(), user.shell.as_str()), ("user", "/bin/sh"));
        assert_eq!(user.identity.groups, [1000, 27]);
        assert_eq!(lookup(PASSWD, GROUP, Some("root")).unwrap().identity.uid, 0);
        assert!(lookup(PASSWD, GROUP, Some("nobody")).is_none());
        for passwd in ["", "root:x:0:0:root:/root:/bin/bash"] {
            let user = lookup(passwd, "user:x:1000:\n", None).unwrap();
            assert_eq!((user.identity.uid, user.identity.gid), (1000, 1000));
            assert_eq!(user.identity.groups, [1000], "never more than the ordinary user");
        }
    }
}
