//! The podman and process runners of CoCalc.
