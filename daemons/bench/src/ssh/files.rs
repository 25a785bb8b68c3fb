//! Large files and many small ones, both ways.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    LIMIT,
    connection::Connection,
    places::{Place, Places, clear},
};
use crate::{
    Effort, Result,
    federation::Federation,
    tool::{finish, run},
};

type Measure = fn(&Connection<'_>) -> Result<Duration>;

/// One file, as it is and by SFTP.
pub(super) const STREAMS: [(&str, Measure); 4] =
    [("ssh cat, down", cat_down), ("ssh cat, up", cat_up), ("sftp get", get), ("sftp put", put)];
/// Small files.
pub(super) const TREES: [(&str, Measure); 2] = [("rsync up", rsync_up), ("rsync down", rsync_down)];

/// Makes both here, and puts them where each server has its files.
pub(super) fn make(federation: &Federation, places: &Places, effort: Effort) -> Result<()> {
    let mut blob = Command::new("dd");
    blob.args(["if=/dev/urandom", "bs=1M", &format!("count={}", effort.ssh_mib)]);
    run(blob.arg(format!("of={}", places.blob().display())), LIMIT)?;
    // A source tree: a few kilobytes each, twenty of them in a directory.
    for number in 0..effort.small_files {
        let directory = places.tree().join(format!("{}", number / 20));
        if number % 20 == 0 {
            std::fs::create_dir_all(&directory)?;
        }
        let line = format!("{number} {}\n", "x".repeat(number as usize % 61));
        std::fs::write(directory.join(format!("{number}.txt")), line.repeat(1 + number as usize % 97))?;
    }
    for place in [Place::Host, Place::Sshd] {
        let connection = Connection::open(places, place)?;
        let mut rsync = connection.rsync();
        rsync.arg(places.blob()).arg(places.tree()).arg(format!("{}:", connection.name()));
        run(&mut rsync, LIMIT)?;
    }
    run(Command::new("sync").arg("-f").arg(&federation.hosts()?[0].volume), LIMIT).map(drop)
}

/// Runs a client whose output is thrown away.
pub(super) fn timed(mut client: Command) -> Result<Duration> {
    let begun = Instant::now();
    let child = client.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    finish("ssh", child, LIMIT)?;
    Ok(begun.elapsed())
}

fn cat_down(connection: &Connection<'_>) -> Result<Duration> {
    timed(connection.line("cat blob"))
}

fn cat_up(connection: &Connection<'_>) -> Result<Duration> {
    let mut ssh = connection.line("cat >/dev/null");
    ssh.stdin(std::fs::File::open(connection.places.blob())?);
    timed(ssh)
}

fn get(connection: &Connection<'_>) -> Result<Duration> {
    sftp(connection, "get blob /dev/null")
}

fn put(connection: &Connection<'_>) -> Result<Duration> {
    let took = sftp(connection, &format!("put {} up", connection.places.blob().display()))?;
    run(&mut connection.line("rm up && sync"), LIMIT)?;
    Ok(took)
}

fn sftp(connection: &Connection<'_>, line: &str) -> Result<Duration> {
    let batch = connection.places.file("batch");
    std::fs::write(&batch, format!("{line}\n"))?;
    let mut sftp = connection.program("sftp");
    sftp.args(["-q", "-b"]).arg(batch).arg(connection.name());
    timed(sftp)
}

fn rsync_up(connection: &Connection<'_>) -> Result<Duration> {
    let mut up = connection.rsync();
    up.arg(connection.places.tree()).arg(format!("{}:up/", connection.name()));
    let took = timed(up)?;
    run(&mut connection.line("rm -r up && sync"), LIMIT)?;
    Ok(took)
}

fn rsync_down(connection: &Connection<'_>) -> Result<Duration> {
    let to = connection.places.memory.path().join("down");
    let mut down = connection.rsync();
    down.arg(format!("{}:tree", connection.name())).arg(&to);
    let took = timed(down)?;
    same(&connection.places.tree(), &to.join("tree"))?;
    clear(&to)?;
    Ok(took)
}

/// What has come must be what was there.
fn same(one: &Path, other: &Path) -> Result<()> {
    run(Command::new("diff").args(["--recursive", "--brief"]).args([one, other]), LIMIT).map(drop)
}
