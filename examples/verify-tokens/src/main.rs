//! A gateway of one's own that lets users in with connect tokens.
//!
//! Without arguments it plays both parts, the master's and the gateway's, and
//! shows what is let in and what is not. With `ring.json ISSUER HOST PROJECT`
//! it verifies tokens from standard input.

use std::{io::BufRead, process::ExitCode, time::Duration};

use cocalc_auth::{
    mint::{NewToken, SigningRing},
    stream::PublicRing,
    token::{Algorithm, Expect, TokenError, Verifier},
};
use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.as_slice() {
        [] => demonstrate(),
        [ring, issuer, host, project] => verify_input(ring, issuer, host, project),
        _ => Err("usage: verify-tokens [RING.json ISSUER HOST PROJECT]".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("verify-tokens: {error}");
            ExitCode::from(2)
        }
    }
}

/// What a gateway does with each request.
fn let_in(verifier: &Verifier, token: &str, expect: &Expect<'_>, now: Timestamp) -> bool {
    match verifier.verify(token, expect, now) {
        Ok(claims) => {
            println!("let in: account {} may use {:?} until {}", claims.sub, claims.scp, claims.expires());
            true
        }
        // The one thing that may be told: the user asks for a new token.
        Err(TokenError::Expired) => {
            println!("401 token_expired");
            false
        }
        Err(why) => {
            println!("403 access_denied (for the log: {why})");
            false
        }
    }
}

fn verify_input(ring: &str, issuer: &str, host: &str, project: &str) -> Result<bool> {
    let ring: PublicRing = serde_json::from_slice(&std::fs::read(ring)?)?;
    let verifier = Verifier::new(&ring);
    for kid in verifier.refused() {
        eprintln!("key {kid} is not used: it is weak or malformed");
    }
    let expect = Expect { issuer, host: Some(host.parse()?), project: project.parse()? };
    let mut all = true;
    for line in std::io::stdin().lock().lines() {
        all &= let_in(&verifier, line?.trim(), &expect, Timestamp::now());
    }
    Ok(all)
}

fn demonstrate() -> Result<bool> {
    let issuer = "https://master.example";
    let (host, project) = (HostId::random(), ProjectId::random());
    let now = Timestamp::now();

    // The master's part, to have something to show.
    let ring = SigningRing::generate(Algorithm::EdDsa, now)?;
    let new = NewToken::new(issuer, host, AccountId::random(), project, Epoch::FIRST)
        .scopes([Scope::Http, Scope::Ws]);
    let token = ring.mint(&new, now)?.token;
    let stranger = SigningRing::generate(Algorithm::EdDsa, now)?.mint(&new, now)?.token;

    // The gateway's part: public keys only.
    let verifier = Verifier::new(&ring.public());
    let expect = Expect { issuer, host: Some(host), project };
    let other = Expect { project: ProjectId::random(), ..expect };
    let outcomes = [
        let_in(&verifier, &token, &expect, now),
        let_in(&verifier, &token, &other, now),
        let_in(&verifier, &token, &expect, now.plus(Duration::from_secs(120))),
        let_in(&verifier, &stranger, &expect, now),
    ];
    Ok(outcomes == [true, false, false, false])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lets_in_what_it_should_and_nothing_else() {
        assert!(demonstrate().unwrap());
    }
}
