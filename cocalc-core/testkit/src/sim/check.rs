//! What must hold when a move has ended and the faults have stopped.

use std::{collections::BTreeMap, time::Duration};

use cocalc_core::moves::{MoveOutcome, is_internal, undo_name};
use cocalc_ids::ProjectId;

use super::{host, world::Shared};

pub(super) async fn at_the_end(world: &Shared) {
    let (owner, project) = {
        let mut world = world.lock();
        let outcome = world.stored.outcome();
        let expected = usize::from(outcome == Some(MoveOutcome::Moved));
        if world.row.0 != expected || outcome.is_none() {
            world.violate("the map and the outcome differ");
        }
        if world.row.2.is_some() {
            world.violate("the fence is still there");
        }
        (world.row.0, world.project)
    };
    // Whoever asks can start it at its owner; at the other host, nobody can.
    let wanted = world.lock().wanted;
    if wanted {
        for host in [1 - owner, owner] {
            host::try_start(world, host).await;
        }
    }
    inspect(world, owner, project, wanted);
    if owner == 1 {
        expire(world).await;
    }
}

fn inspect(world: &Shared, owner: usize, project: ProjectId, wanted: bool) {
    let mut world = world.lock();
    world.check();
    let (epoch, written) = (world.row.1, world.written);
    let entries = [0, 1].map(|h: usize| world.machines[h].ledger.get(&project).cloned());
    let mut wrong = Vec::new();
    if entries[owner].as_ref().and_then(|e| e.may_run()) != Some(epoch) {
        wrong.push("the owner does not hold the grant");
    }
    if world.machines[owner].live != Some(written) {
        wrong.push("the owner does not have what was written");
    }
    if wanted && world.machines[owner].running != Some(epoch) {
        wrong.push("the owner cannot start it");
    }
    if !wanted && world.machines[owner].running.is_some() {
        wrong.push("it was stopped, and runs now");
    }
    let other = &world.machines[1 - owner];
    if entries[1 - owner].as_ref().and_then(|e| e.may_run()).is_some() {
        wrong.push("the other host holds a grant");
    }
    if other.live.is_some() || other.running.is_some() {
        wrong.push("there is a second live copy");
    }
    if entries.iter().flatten().any(|entry| entry.reserved.is_some()) {
        wrong.push("a reservation is left");
    }
    if entries[1 - owner].as_ref().is_some_and(|entry| entry.slot.is_some()) {
        wrong.push("the other host keeps a slot");
    }
    if owner == 1 {
        let undo = other.snapshots.get(&undo_name(world.stored.spec.move_id));
        if undo.is_none() {
            wrong.push("the source kept no undo");
        }
        let undo = world.machines.iter().flat_map(|machine| machine.snapshots.keys());
        if undo.filter(|name| name.as_str().starts_with("undo-")).count() > 1 {
            wrong.push("the undo of an earlier move is left");
        }
    }
    let left = world.machines.iter().flat_map(|machine| machine.snapshots.keys());
    let left = left.filter(|name| name.as_str().starts_with("move-")).count();
    if left > 0 {
        wrong.push("snapshots of the move are left");
    }
    let own = |machine: &super::world::Machine| -> BTreeMap<_, _> {
        let all = machine.snapshots.iter().filter(|(name, _)| !is_internal(name));
        all.map(|(name, frozen)| (name.clone(), *frozen)).collect()
    };
    if own(&world.machines[owner]) != world.own {
        let (has, should) = (own(&world.machines[owner]), world.own.clone());
        world.event(&format!("{:?} instead of {:?}", has.keys(), should.keys()));
        wrong.push("the owner has other snapshots than the project");
    }
    if entries[owner].as_ref().is_some_and(|entry| !entry.stale.is_empty()) {
        wrong.push("the owner still has to delete what is of an earlier stay");
    }
    if owner == 0 {
        let left = own(&world.machines[1]);
        if left.iter().any(|(name, frozen)| world.earlier.get(name) != Some(frozen)) {
            wrong.push("what an aborted move has brought is left");
        }
        // One that had the name of another made way for it.
        let (before, replaced) = (&world.earlier, &world.replaced);
        if before.keys().any(|name| !left.contains_key(name) && !replaced.contains(name)) {
            wrong.push("an aborted move has deleted snapshots of an earlier stay");
        }
    }
    for what in wrong {
        world.violate(what);
    }
}

/// A day later nothing is left at the source.
async fn expire(world: &Shared) {
    for _ in 0..3 {
        let daemon = world.lock().machines[0].daemon.clone();
        if let Some(daemon) = daemon {
            daemon.stop.run_until_cancelled(daemon.moves.expire_undo(Duration::from_secs(86_400))).await;
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    let mut world = world.lock();
    if !world.machines[0].snapshots.is_empty() {
        world.violate("the undo does not expire");
    }
}
