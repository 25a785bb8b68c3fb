//! Certificates of a host's or proxy's SSH host keys, from the master's
//! authority.

use std::{fmt, sync::Arc, time::Duration};

use cocalc_core::{
    BoxError,
    bus::{Bus, Payload},
    connector::Peer,
    control::{PeerReply, PeerRequest, api_subject},
};
use tokio::time::{Instant, sleep};

/// How often it is looked whether there is something to ask for.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long the master may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What is offered now.
struct Offered {
    version: u64,
    renew: Instant,
    ends: Instant,
}

/// Keeps the SSH host keys certified, until the future is dropped: asks the
/// master, gives what it signed to `offer`, and asks again in time before that
/// ends, or when `version`, the version of the authority's keys as the stream
/// tells it, is another. What has ended is not offered any more.
pub async fn keep_certified<E: fmt::Display>(
    peer: Peer,
    bus: Arc<dyn Bus>,
    version: impl Fn() -> u64,
    offer: impl Fn(&[String]) -> Result<(), E>,
) {
    let mut offered: Option<Offered> = None;
    loop {
        let now = Instant::now();
        let known = version();
        let due = offered
            .as_ref()
            .is_none_or(|offered| now >= offered.renew || (known != 0 && known != offered.version));
        if due {
            match ask(&*bus, peer).await {
                Ok((certificates, next)) => match offer(&certificates) {
                    Ok(()) => offered = Some(next),
                    Err(error) => {
                        tracing::warn!(%error, "the master's certificate of the SSH host key is not usable")
                    }
                },
                Err(error) => {
                    tracing::debug!(error = %cocalc_core::chain(&*error), "the SSH host key was not certified");
                }
            }
        }
        if offered.as_ref().is_some_and(|offered| now >= offered.ends) {
            offered = None;
            // Nothing is of any key.
            let _ = offer(&[]);
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn ask(bus: &dyn Bus, peer: Peer) -> Result<(Vec<String>, Offered), BoxError> {
    let asked = Instant::now();
    let payload = Payload::json(&PeerRequest::CertifySshHostKeys)?;
    let answer = bus.request(&api_subject(peer), payload, ANSWER_LIMIT).await?;
    match answer.payload.parse()? {
        PeerReply::SshCertificates { certificates, version, life_secs } => {
            // No clock of ours has to agree with anybody's.
            let life = Duration::from_secs(life_secs.min(30 * 24 * 3600));
            Ok((certificates, Offered { version, renew: asked + life / 2, ends: asked + life }))
        }
        PeerReply::Error { message } => Err(message.into()),
        _ => Err("the master's answer makes no sense".into()),
    }
}
