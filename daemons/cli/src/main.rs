//! The `cocalc` command line: a client of the master's API, `cocalc up`, which
//! runs a whole federation on this machine, and `cocalc doctor`.

mod api;
mod args;
mod audit;
mod browser;
mod doctor;
mod down;
mod failure;
mod output;
mod profile;
mod ssh;
mod up;
mod verbs;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::{
    args::{Arguments, Command},
    failure::Failure,
};

fn main() -> ExitCode {
    // Usage errors leave here, with exit code 2.
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("cocalc: {failure}");
            failure.code()
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let output = arguments.output;
    let done = |()| ExitCode::SUCCESS;
    match arguments.command {
        Command::Up(options) => up::run(&options),
        Command::Down(options) => down::run(&options).map(done),
        Command::Doctor(options) => doctor::run(&options, output),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "cocalc", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Login { url, token, name, oidc, browser } => {
            let token = match (token, oidc) {
                (Some(token), _) => token,
                (None, Some(provider)) => profile::log_in_with(&url, &provider, &browser)?,
                (None, None) => profile::log_in(&url, &name.unwrap_or_default())?,
            };
            profile::save(&url, &token).map(done)
        }
        Command::Logout { wait } => profile::log_out(arguments.url, arguments.token, wait).map(done),
        Command::Audit(verb) => {
            let api = || profile::api(arguments.url, arguments.token);
            audit::run(api, output, &verb).map(done)
        }
        verb => {
            let api = profile::api(arguments.url, arguments.token)?;
            verbs::run(&api, output, verb)
        }
    }
}
