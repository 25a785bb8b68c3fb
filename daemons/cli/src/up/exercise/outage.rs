//! The master goes away while the project is in use, and comes back.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{
    access::answers,
    reach::{Connect, Echo, Way, ensure, get},
};
use crate::{
    failure::Failure,
    up::{
        READY_LIMIT, Up,
        configure::{GRACE, LEASE},
        narrator::{Narrator, done, told, wait_for},
        wait_ready,
    },
};

/// A user who is inside when the master goes.
struct User {
    way: Way,
    echo: Echo,
    connect: Connect,
}

/// Shows each tier: fresh, grace, expired, and fresh again.
pub(super) fn run(up: &mut Up, narrator: &Narrator) -> Result<(), Failure> {
    let before = life(up)?;
    let mut users = narrator.step("in use through host and proxy", || {
        let mut users = Vec::new();
        for way in Way::BOTH {
            let connect = Connect::long(up)?;
            let mut echo = Echo::open(&connect.url(way, "echo")?, &connect.token()?)?;
            echo.round("before")?;
            users.push(User { way, echo, connect });
        }
        told(users, "")
    })?;

    let gone = narrator.step("the master stops", || {
        up.supervisor.stop("master");
        told(Instant::now(), "")
    })?;
    narrator.step("grace: open connections and new requests go on", || {
        let mut rounds = 0;
        // Past the lease, and safely within the grace.
        while gone.elapsed() < LEASE + GRACE / 3 {
            for user in &mut users {
                user.echo.round("within the grace")?;
                let answer = ask(user)?;
                ensure(answer == 200, format!("{}: status {answer} in the grace", user.way.name()))?;
                rounds += 1;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        told((), format!("{rounds} rounds, {:.1} s without the master", gone.elapsed().as_secs_f64()))
    })?;
    narrator.step("expired: everything is closed", || {
        let limit = LEASE + GRACE + Duration::from_secs(10);
        for user in &mut users {
            let left = limit.saturating_sub(gone.elapsed()).max(Duration::from_millis(1));
            ensure(user.echo.ended(left)?, format!("{}: the WebSocket stays open", user.way.name()))?;
        }
        let closed = gone.elapsed();
        ensure(
            closed + Duration::from_secs(1) >= GRACE,
            format!("closed after {closed:?}, before the grace ended"),
        )?;
        for user in &users {
            let status = ask(user)?;
            ensure(status == 403, format!("{}: new access has status {status}", user.way.name()))?;
        }
        told((), format!("closed after {:.1} s", closed.as_secs_f64()))
    })?;
    narrator.step("the master is back: it opens again", || {
        up.supervisor.resume("master");
        wait_ready(&up.supervisor, "master", &up.plan.master_url())?;
        for way in Way::BOTH {
            let connect = wait_for("a connect token", READY_LIMIT, || Ok(Connect::long(up).ok()))?;
            wait_for(format!("access, {}", way.name()), READY_LIMIT, || {
                let url = connect.url(way, "hello")?;
                let bearer = format!("Bearer {}", connect.token()?);
                Ok((get(&url, &[("authorization", &bearer)])?.status == 200).then_some(()))
            })?;
            Echo::open(&connect.url(way, "echo")?, &connect.token()?)?.round("after")?;
        }
        done()
    })?;
    narrator.step("the project never stopped", || {
        let after = life(up)?;
        ensure(before == after, format!("{before} became {after}"))?;
        told((), format!("same process since {}", after["started"]))
    })?;
    up.refresh()
}

/// The status of a new request with the user's token.
fn ask(user: &User) -> Result<u16, Failure> {
    let url = user.connect.url(user.way, "hello")?;
    let bearer = format!("Bearer {}", user.connect.token()?);
    Ok(get(&url, &[("authorization", &bearer)])?.status)
}

/// What identifies the app's process.
fn life(up: &Up) -> Result<Value, Failure> {
    let seen = answers(&Connect::long(up)?, Way::Direct)?.json();
    Ok(serde_json::json!({ "pid": seen["pid"], "started": seen["started"] }))
}
