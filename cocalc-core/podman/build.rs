//! Builds the helper that runs inside projects, statically linked, so that the
//! library can carry it.

use std::{env, path::PathBuf, process::Command};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=helper");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let output = PathBuf::from(variable("OUT_DIR")?).join("helper");
    let status = Command::new(variable("RUSTC")?)
        .args(["--crate-name", "cocalc_helper", "--edition", "2024", "--crate-type", "bin"])
        .args(["-C", "opt-level=s", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "target-feature=+crt-static", "--cap-lints", "allow"])
        .args(["--target", &variable("TARGET")?, "helper/main.rs", "-o"])
        .arg(&output)
        .status()
        .map_err(|error| format!("could not run the compiler for the helper: {error}"))?;
    if !status.success() {
        return Err("the helper did not build; a static C library is needed (Debian: libc6-dev)".into());
    }
    Ok(())
}
