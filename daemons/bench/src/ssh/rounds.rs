//! Short commands: with a connection of their own, and over one that is there.

use std::time::Duration;

use super::{
    LIMIT,
    connection::Connection,
    places::{Place, Places},
};
use crate::{
    Result,
    table::median,
    tool::{run, time},
};

/// Connects, logs in, runs `true`.
pub(super) fn connect(places: &Places, place: Place) -> Result<Duration> {
    time(&mut places.line(place, "true"), LIMIT)
}

/// Runs `true` so often in a connection, each time in another channel; the median
/// of their times, in seconds.
pub(super) fn channel(connection: &Connection<'_>, count: u32) -> Result<f64> {
    let mut took = Vec::new();
    for _ in 0..count {
        took.push(time(&mut connection.line("true"), LIMIT)?.as_secs_f64());
    }
    Ok(median(&took))
}

/// The cipher of what comes down. Of a jump, that of the inner connection.
pub(super) fn cipher(places: &Places, place: Place) -> Result<String> {
    let mut ssh = places.program("ssh");
    let output = run(ssh.args(["-o", "LogLevel=DEBUG", place.alias(), "true"]), LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let found = said.rsplit_once("server->client cipher: ").map_or("unknown", |(_, rest)| rest);
    Ok(found.split_whitespace().next().unwrap_or_default().to_owned())
}
