//! What people may write before the `@`.

use cocalc_core::ids::ProjectId;

/// The project that the SSH user name `user` asks for: the project's id,
/// `project-<id>`, or the id's 32 digits; `None` for any other name.
///
/// ```
/// let id = "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b";
/// let project = cocalc_ssh::project_of_user(id);
/// assert_eq!(project, cocalc_ssh::project_of_user(&format!("project-{id}")));
/// assert_eq!(project, cocalc_ssh::project_of_user("0a7b1c9e4f524a8e9d3b1c2d3e4f5a6b"));
/// assert_eq!(None, cocalc_ssh::project_of_user("root"));
/// ```
pub fn project_of_user(user: &str) -> Option<ProjectId> {
    ProjectId::from_ssh_user(user).ok()
}
