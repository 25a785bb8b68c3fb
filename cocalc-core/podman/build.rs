//! Builds what runs inside projects, statically linked: the helper, so that the
//! library can carry it, and the probe that looks for ways out, for the tests.

use std::{env, path::PathBuf, process::Command};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=helper");
    println!("cargo::rerun-if-changed=escape-probe");
    println!("cargo::rerun-if-changed=build.rs");
    build("helper", "cocalc_helper")?;
    build("escape-probe", "cocalc_escape_probe")
}

/// Builds the program in `directory` to a file of that name.
fn build(directory: &str, name: &str) -> Result<(), String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let output = PathBuf::from(variable("OUT_DIR")?).join(directory);
    let status = Command::new(variable("RUSTC")?)
        .args(["--crate-name", name, "--edition", "2024", "--crate-type", "bin"])
        .args(["-C", "opt-level=s", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "target-feature=+crt-static", "--cap-lints", "allow"])
        .args(["--target", &variable("TARGET")?])
        .arg(format!("{directory}/main.rs"))
        .arg("-o")
        .arg(&output)
        .status()
        .map_err(|error| format!("could not run the compiler for {directory}: {error}"))?;
    if !status.success() {
        return Err(format!("{directory} did not build; a static C library is needed (Debian: libc6-dev)"));
    }
    Ok(())
}
