//! Authentication that is connected: the ACL stream, storage and timers.
