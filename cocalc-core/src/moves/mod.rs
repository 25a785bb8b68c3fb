//! The move of a project between hosts.
