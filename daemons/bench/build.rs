//! Builds the app that is measured, statically linked, so that it runs in any
//! image.

use std::{env, path::PathBuf, process::Command};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=app");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let output = PathBuf::from(variable("OUT_DIR")?).join("app");
    let status = Command::new(variable("RUSTC")?)
        .args(["--crate-name", "bench_app", "--edition", "2024", "--crate-type", "bin"])
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "strip=symbols"])
        .args(["-C", "target-feature=+crt-static", "--cap-lints", "allow"])
        .args(["--target", &variable("TARGET")?, "app/main.rs", "-o"])
        .arg(&output)
        .status()
        .map_err(|error| format!("could not run the compiler for the app: {error}"))?;
    if !status.success() {
        return Err("the app did not build; a static C library is needed (Debian: libc6-dev)".into());
    }
    Ok(())
}
