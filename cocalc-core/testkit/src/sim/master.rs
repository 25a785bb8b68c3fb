//! The master: the stored move, its controllers, and the way to the hosts.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use cocalc_core::{
    BoxError,
    control::{HostCommand, HostReply},
    moves::{Change, MoveEffects, MoveState, NoAnswer, Saved, Step, drive},
};
use cocalc_ids::HostId;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use super::world::{Fault, Shared};

struct Effects(Shared);

impl fmt::Debug for Effects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Effects")
    }
}

/// Drives the move to its end, through crashes of the master.
pub(super) async fn run(world: Shared) {
    let (cancel, cancelled) = watch::channel(false);
    let cancel_at = {
        let mut world = world.lock();
        world.fault(Fault::Cancelled).then(|| world.millis(30_000))
    };
    if let Some(delay) = cancel_at {
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = cancel.send(true);
            // The channel stays open as long as the move may be cancelled.
            cancel.closed().await;
        });
    }
    let mut controllers = vec![control(&world, &cancelled)];
    while world.lock().stored.outcome().is_none() {
        tokio::time::sleep(Duration::from_millis(1000)).await;
        let crash = {
            let mut world = world.lock();
            world.fault(Fault::MasterCrash) | std::mem::take(&mut world.kill_master)
        };
        if crash {
            world.lock().event("the master crashes");
            for controller in controllers.drain(..) {
                controller.abort();
            }
            let (delay, second) = {
                let mut world = world.lock();
                (world.millis(3000), world.fault(Fault::SecondController))
            };
            tokio::time::sleep(delay).await;
            controllers.push(control(&world, &cancelled));
            if second {
                controllers.push(control(&world, &cancelled));
            }
        }
    }
}

fn control(world: &Shared, cancelled: &watch::Receiver<bool>) -> JoinHandle<()> {
    let (world, cancelled) = (world.clone(), cancelled.clone());
    tokio::spawn(async move {
        let effects = Effects(world.clone());
        loop {
            let state = world.lock().stored.clone();
            if drive(&effects, state, cancelled.clone()).await.is_ok() {
                return;
            }
            // Another controller has advanced it; look where it is now.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
}

#[async_trait]
impl MoveEffects for Effects {
    async fn command(
        &self,
        host: HostId,
        command: HostCommand,
        timeout: Duration,
    ) -> Result<HostReply, NoAnswer> {
        let HostCommand::Move { move_id, project, step } = command else { return Err(NoAnswer) };
        self.step().await;
        let (index, delays, lost) = {
            let mut world = self.0.lock();
            let index = world.machine_of(host);
            let mut delays = vec![world.millis(50)];
            let lost = (world.fault(Fault::Lost), world.fault(Fault::Lost));
            while world.fault(Fault::Repeated) {
                delays.push(world.millis(60_000));
            }
            (index, delays, lost)
        };
        let (answer, answered) = oneshot::channel();
        let mut answer = Some(answer);
        for (copy, delay) in delays.into_iter().enumerate() {
            let answer = answer.take();
            if copy == 0 && lost.0 {
                continue;
            }
            let (world, step) = (self.0.clone(), step.clone());
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let Some(daemon) = world.lock().machines[index].daemon.clone() else { return };
                let done = daemon.moves.execute(move_id, project, step);
                let reply = daemon.stop.run_until_cancelled(done).await;
                if let Some(HostReply::Error(error)) = &reply {
                    world.lock().event(&format!("host {index} refuses: {}", error.message));
                }
                let back = world.lock().millis(50);
                tokio::time::sleep(back).await;
                if let (Some(reply), Some(answer)) = (reply, answer)
                    && !lost.1
                {
                    let _ = answer.send(reply);
                }
            });
        }
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(reply)) => Ok(reply),
            _ => Err(NoAnswer),
        }
    }

    async fn save(&self, state: &MoveState, expected: u64, change: Change) -> Result<Saved, BoxError> {
        let delay = self.0.lock().millis(10);
        tokio::time::sleep(delay).await;
        self.step().await;
        let saved = self.store(state, expected, change);
        self.step().await;
        tokio::time::sleep(delay).await;
        Ok(saved)
    }

    async fn pause(&self, _host: Option<HostId>, delay: Duration) {
        tokio::time::sleep(delay).await;
    }

    fn progress(&self, _state: &MoveState) {}
}

impl Effects {
    /// A point where the master may crash; then this never returns.
    async fn step(&self) {
        let crash = {
            let mut world = self.0.lock();
            let crash = world.fault(Fault::MasterStep);
            world.kill_master |= crash;
            crash
        };
        if crash {
            std::future::pending::<()>().await;
        }
    }

    fn store(&self, state: &MoveState, expected: u64, change: Change) -> Saved {
        let mut world = self.0.lock();
        let move_id = Some(state.spec.move_id);
        if world.stored.revision != expected {
            return Saved::Superseded;
        }
        let (_, epoch, fence) = world.row;
        let fits = match change {
            Change::None => true,
            Change::Commit { from, .. } | Change::Regrant { from, .. } => epoch == from && fence == move_id,
            Change::Release => fence == move_id,
        };
        if !fits {
            world.violate("nobody else changes the row, and yet the move lost it");
            return Saved::Lost;
        }
        let why = state.failure.as_ref().map_or("", |failure| &failure.message);
        let what = format!("stored {:?} after {:?}: {change:?} {why}", state.step, world.stored.step);
        world.event(&what);
        match change {
            Change::None => {}
            Change::Commit { to_host, to, from } => {
                let project = world.project;
                let source = world.machines[0].ledger.get(&project);
                if source.and_then(|entry| entry.frozen).is_none_or(|frozen| frozen.epoch != from) {
                    world.violate("committed, although the source has not frozen");
                }
                if world.machines[1].live != Some(world.written) {
                    world.violate("committed, although the destination lacks what was written");
                }
                let to_host = world.machine_of(to_host);
                world.row = (to_host, to, fence);
            }
            Change::Regrant { to, .. } => world.row.1 = to,
            Change::Release => world.row.2 = None,
        }
        if world.stored.step == Step::Activating && state.step == Step::Thawing {
            world.violate("aborted after the commit");
        }
        world.stored = state.clone();
        Saved::Yes
    }
}
