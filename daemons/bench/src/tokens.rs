//! Connect tokens verified per second, against the bare signature check. One
//! thread, in this process.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use cocalc_auth::{
    mint::{NewToken, SigningRing},
    token::{Algorithm, Expect, Verifier},
};
use cocalc_ids::{AccountId, Epoch, HostId, ProjectId, Scope, Timestamp};
use ed25519_dalek::{Signature, VerifyingKey};

use crate::{
    Effort, Result,
    table::{Better, Table},
};

/// Verifications by one side before it is the other's turn.
const BATCH: u32 = 20;

pub(crate) fn measure(effort: Effort, table: &mut Table) -> Result<()> {
    let issuer = "https://master.example";
    let (host, project) = (HostId::random(), ProjectId::random());
    let now = Timestamp::now();
    let ring = SigningRing::generate(Algorithm::EdDsa, now)?;
    let new = NewToken::new(issuer, host, AccountId::random(), project, Epoch::FIRST).scopes([Scope::Http]);
    let token = ring.mint(&new, now)?.token;
    let verifier = Verifier::new(&ring.public());
    let expect = Expect { issuer, host: Some(host), project };

    let (message, signature) = token.rsplit_once('.').ok_or("a token without a signature")?;
    let signature = Signature::from_slice(&URL_SAFE_NO_PAD.decode(signature)?)?;
    let public = ring.public();
    let current = public
        .keys
        .iter()
        .find(|key| key.kid == ring.current_kid())
        .ok_or("a ring without its current key")?;
    let key: [u8; 32] =
        URL_SAFE_NO_PAD.decode(&current.key)?.try_into().map_err(|_| "a key of a wrong size")?;
    let key = VerifyingKey::from_bytes(&key)?;

    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..effort.runs {
        let limit = Duration::from_millis(u64::from(effort.seconds) * 400);
        let (mut verifying, mut checking) = (Duration::ZERO, Duration::ZERO);
        let mut count = 0.0;
        // By turns in short batches: what else the machine does hits both.
        while verifying + checking < limit {
            verifying += batch(|| {
                verifier.verify(black_box(&token), &expect, now).map(|claims| drop(black_box(claims))).is_ok()
            })?;
            checking += batch(|| key.verify_strict(black_box(message).as_bytes(), &signature).is_ok())?;
            count += f64::from(BATCH);
        }
        ours.push(count / verifying.as_secs_f64());
        bare.push(count / checking.as_secs_f64());
    }
    let unit = ("verifications/s", Better::More);
    table.add("connect token verified", "ed25519-dalek verify_strict", unit, &ours, &bare);
    Ok(())
}

/// How long it takes to do something a number of times.
fn batch(mut once: impl FnMut() -> bool) -> Result<Duration> {
    let begun = Instant::now();
    for _ in 0..BATCH {
        if !once() {
            return Err("a good signature was refused".into());
        }
    }
    Ok(begun.elapsed())
}
