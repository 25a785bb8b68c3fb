//! What must hold when a move has ended and the faults have stopped.

use cocalc_core::moves::{MoveOutcome, undo_name};

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
    for what in wrong {
        world.violate(what);
    }
}
