//! Which ports of a project answer.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use cocalc_core::{
    ids::ProjectId,
    runner::{Command, ExecRequest, Result, Runner},
};
use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};

/// What is read of the kernel's tables at most.
const TABLE_BYTES_MAX: u64 = 1 << 20;
const TABLE_LIMIT: Duration = Duration::from_secs(5);
/// So many are tried; a project that listens on more shows the lowest.
const PORTS_MAX: usize = 256;
const DIAL_LIMIT: Duration = Duration::from_secs(2);
const DIALS: usize = 16;

/// The TCP ports on which something listens inside and takes connections, in
/// order. What the inside says is only where to look: each port is tried.
pub(crate) async fn answering(runner: &Arc<dyn Runner>, project: ProjectId) -> Result<Vec<u16>> {
    let argv = ["cat", "/proc/net/tcp", "/proc/net/tcp6"].map(str::to_owned).to_vec();
    let request = ExecRequest { command: Command::Argv(argv), ..ExecRequest::default() };
    let mut process = runner.exec(project, request).await?;
    // Dropping the process ends it, if it does not end by itself.
    let mut table = String::new();
    let _ = timeout(TABLE_LIMIT, read(&mut process.stdout, &mut table)).await;
    drop(process);
    let tries = listening(&table).into_iter().take(PORTS_MAX).map(|port| async move {
        let dialed = timeout(DIAL_LIMIT, runner.dial(project, port)).await;
        matches!(dialed, Ok(Ok(_))).then_some(port)
    });
    Ok(stream::iter(tries).buffered(DIALS).filter_map(std::future::ready).collect().await)
}

async fn read(from: &mut (impl AsyncRead + Unpin), table: &mut String) {
    let mut bytes = Vec::new();
    // What came before an error is used.
    let _ = from.take(TABLE_BYTES_MAX).read_to_end(&mut bytes).await;
    *table = String::from_utf8_lossy(&bytes).into_owned();
}

/// The ports in the kernel's tables (`proc(5)`) on which something listens.
fn listening(table: &str) -> BTreeSet<u16> {
    let port = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        (state == "0A" && port > 0).then_some(port)
    };
    table.lines().filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_ports_are_read_from_the_kernels_tables() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000\n\
            1: 0100007F:0016 0100007F:9999 01 00000000:00000000\n\
            2: 00000000000000000000000001000000:22B8 00000000000000000000000000000000:0000 0A x\n\
            3: 0100007F:0000 00000000:0000 0A\n\
            4: 0100007F:FFFFF 00000000:0000 0A\nnonsense\n\n";
        assert_eq!(listening(table).into_iter().collect::<Vec<_>>(), [8080, 8888]);
    }
}
