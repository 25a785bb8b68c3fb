//! A command in a running project: there and back over an SSH connection that is
//! there, which has the host's ingress, its runner and the helper in it, against
//! `podman exec`.

use std::time::Instant;

use cocalc_core::runner::{Command as Line, ExecRequest, Exit};
use cocalc_ssh::client::{Client, HostKeyCheck, Identity};
use tokio::{io::AsyncReadExt, time::timeout};

use super::{
    LIMIT,
    peer::{Kind, Peer},
};
use crate::{
    Effort, Result,
    container::Image,
    federation::Federation,
    table::{Better, Goal, Table, median},
    tool::time,
};

pub(super) fn measure(
    federation: &Federation,
    image: &Image,
    effort: Effort,
    table: &mut Table,
) -> Result<()> {
    let peer = Peer::new(federation, image, Kind::Start, 3)?;
    peer.start()?;
    let connect = federation.connect(federation.project())?;
    let host = connect.ssh.0.split_once('@').ok_or("an SSH address without a user")?.1;
    let address = format!("{host}:{}", connect.ssh.1);
    let project = federation.project().parse()?;
    let identity = Identity::KeyFile(federation.key());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = runtime.block_on(Client::connect(&address, project, &identity, HostKeyCheck::Any))?;
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    for round in 0..=effort.runs {
        let mut took = [Vec::new(), Vec::new()];
        for _ in 0..effort.rounds {
            let begun = Instant::now();
            runtime.block_on(async { timeout(LIMIT, once(&client)).await? })?;
            took[0].push(begun.elapsed().as_secs_f64() * 1e3);
        }
        for _ in 0..effort.rounds.div_ceil(5) {
            let mut podman = std::process::Command::new("podman");
            podman.args(["--runtime", "runc", "exec", &peer.name(), "true"]);
            took[1].push(time(&mut podman, LIMIT)?.as_secs_f64() * 1e3);
        }
        if round > 0 {
            ours.push(median(&took[0]));
            peers.push(median(&took[1]));
        }
    }
    runtime.block_on(client.close());
    let unit = ("ms", Better::Less);
    table.compare(
        "exec of true, there and back",
        "podman exec",
        unit,
        &ours,
        &peers,
        Some(Goal::AtMost(0.05)),
    );
    Ok(())
}

async fn once(client: &Client) -> Result<()> {
    let request = ExecRequest { command: Line::Line("true".into()), ..ExecRequest::default() };
    let mut process = client.exec(&request).await?;
    process.stdout.read_to_end(&mut Vec::new()).await?;
    match process.handle.wait().await? {
        Exit::Code(0) => Ok(()),
        other => Err(format!("true ended with {other:?}").into()),
    }
}
