//! SSH user names: nothing panics, and only the three spellings of a project
//! are taken.
#![no_main]

use cocalc_ids::ProjectId;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|user: &str| {
    let parsed = ProjectId::from_ssh_user(user).ok();
    assert_eq!(parsed, cocalc_ssh::project_of_user(user));
    if let Some(project) = parsed {
        let id = project.to_string();
        assert!(user == id || user == format!("project-{id}") || user == id.replace('-', ""), "{user:?}");
    }
});
