//! SSH user names: nothing panics, only the three spellings of a project are
//! taken for its id, and an alias is never one of them.
#![no_main]

use cocalc_ids::{ProjectAlias, ProjectId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|user: &str| {
    let parsed = ProjectId::from_ssh_user(user).ok();
    assert_eq!(parsed, cocalc_ssh::project_of_user(user));
    if let Some(project) = parsed {
        let id = project.to_string();
        assert!(user == id || user == format!("project-{id}") || user == id.replace('-', ""), "{user:?}");
    }
    if let Ok(alias) = user.parse::<ProjectAlias>() {
        assert_eq!(alias.as_str(), user);
        assert!(parsed.is_none() && user != "jump" && !user.starts_with('-'), "{user:?}");
        // It becomes a word of ~/.ssh/config as it is.
        assert!((3..=32).contains(&user.len()), "{user:?}");
        assert!(user.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{user:?}");
    }
});
