use std::collections::BTreeSet;

use cocalc_ids::{Epoch, HostId, ProjectId, VolumeUuid};

use super::*;
use crate::{
    control::{
        Carried, CommandError, ErrorCode, HostCommand, MoveCommand, MoveReply, ProjectConfig, ProjectReport,
    },
    router::HostAddress,
    runner,
};

fn spec(deltas: bool) -> MoveSpec {
    MoveSpec {
        move_id: MoveId::from_random_bytes([1; 16]),
        project: ProjectId::from_random_bytes([2; 16]),
        source: HostId::from_random_bytes([3; 16]),
        destination: HostId::from_random_bytes([4; 16]),
        destination_address: HostAddress::default(),
        epoch: Epoch::new(7).unwrap(),
        config: ProjectConfig::default(),
        bytes: 1 << 30,
        stream_version: 2,
        deltas,
        tuning: Tuning::default(),
    }
}

fn origin(number: u8) -> VolumeUuid {
    VolumeUuid::from_random_bytes([number; 16])
}

/// Snapshots of the project's own.
fn own(numbers: &[u8]) -> Vec<Carried> {
    let carried = |n: &u8| Carried { name: format!("daily-{n}").parse().unwrap(), origin: origin(200 + n) };
    numbers.iter().map(carried).collect()
}

/// The receipt of a host that does what it is told.
fn receipt(state: &MoveState, bytes: u64) -> MoveReply {
    let Todo::Command { command: HostCommand::Move { step, project, .. }, .. } = state.todo() else {
        panic!("nothing to do")
    };
    match step {
        MoveCommand::Survey { .. } => MoveReply::Surveyed { bytes: 2 << 30, snapshots: own(&[1, 2, 3]) },
        MoveCommand::Reserve { .. } => MoveReply::Reserved,
        MoveCommand::Carry { snapshot: Carried { name, origin }, .. } => {
            MoveReply::Sent { name, origin, bytes, millis: 60_000, left_out: Vec::new() }
        }
        MoveCommand::Send { name, .. } => {
            let origin = state.frozen.unwrap_or(origin(100));
            let left_out = vec![format!("what {name} left out")];
            MoveReply::Sent { name, origin, bytes, millis: 60_000, left_out }
        }
        MoveCommand::Park { .. } => MoveReply::Parked,
        MoveCommand::Freeze { epoch, name, .. } => {
            // The second was deleted, and a fourth was taken.
            let snapshots = own(&[1, 3, 4]);
            MoveReply::Frozen { epoch, name, origin: origin(9), was_running: true, snapshots }
        }
        MoveCommand::Stage { origin, .. } => MoveReply::Staged { origin },
        MoveCommand::Activate { epoch, .. } => {
            let state = runner::State::Running;
            let status = runner::Status { project, epoch: Some(epoch), state, started: None, reason: None };
            let report = ProjectReport { project, epoch: Some(epoch), status, phases: Vec::new() };
            MoveReply::Activated { epoch, report }
        }
        MoveCommand::Retire { .. } => MoveReply::Retired,
        MoveCommand::Thaw { epoch, .. } => MoveReply::Thawed { epoch },
        MoveCommand::Discard => MoveReply::Discarded,
        MoveCommand::Clean { .. } => MoveReply::Cleaned,
    }
}

fn obey(state: &MoveState, bytes: u64) -> (MoveState, Change) {
    state.after(Event::Receipt(receipt(state, bytes))).expect("its own receipt advances a step")
}

/// Every state on the way that nothing disturbs.
fn line(deltas: bool) -> Vec<(MoveState, Change)> {
    let mut all = vec![(MoveState::new(spec(deltas)), Change::None)];
    while all.last().unwrap().0.outcome().is_none() {
        let next = obey(&all.last().unwrap().0, 100 << 20);
        all.push(next);
    }
    all
}

fn failed(code: ErrorCode) -> Event {
    Event::Failed(CommandError { code, message: "no".into() })
}

#[test]
fn the_line_goes_through_one_commit_and_one_release() {
    for deltas in [true, false] {
        let line = line(deltas);
        let (mut commits, mut releases) = (0, 0);
        for pair in line.windows(2) {
            let ((before, _), (after, change)) = (&pair[0], &pair[1]);
            assert_eq!(after.revision, before.revision + 1);
            assert!(after.step >= before.step, "never back");
            match change {
                Change::Commit { to_host, from, to } => {
                    assert_eq!((*to_host, *from, *to), (after.spec.destination, e(7), e(8)));
                    assert!(before.frozen.is_some() && before.step == Step::Staging);
                    commits += 1;
                }
                Change::Release => {
                    assert_eq!(before.step, Step::Activating);
                    releases += 1;
                }
                Change::Regrant { .. } => panic!("nothing was aborted"),
                Change::None => {}
            }
        }
        assert_eq!((commits, releases), (1, 1));
        assert_eq!(line.last().unwrap().0.outcome(), Some(MoveOutcome::Moved));
    }
}

fn e(number: u64) -> Epoch {
    Epoch::new(number).unwrap()
}

#[test]
fn rounds_end_when_a_delta_is_small_or_no_longer_shrinks_or_there_were_enough() {
    let rounds = |sizes: &[u64]| {
        let mut state = MoveState::new(spec(true));
        while state.step < Step::Seeding {
            state = obey(&state, 0).0;
        }
        for size in sizes {
            assert_eq!(state.step, Step::Seeding, "{sizes:?}");
            let base = match state.todo() {
                Todo::Command {
                    command: HostCommand::Move { step: MoveCommand::Send { base, .. }, .. },
                    ..
                } => base,
                other => panic!("{other:?}"),
            };
            let newest = own(&[3]).remove(0).name;
            let before = state.rounds.last().map_or(newest, |round| round.name.clone());
            assert_eq!(base, Some(before), "deltas build on deltas, the first on the newest snapshot");
            state = obey(&state, *size).0;
        }
        state.step
    };
    let mib = 1 << 20;
    assert_eq!(rounds(&[mib]), Step::Parking, "all of it is small");
    assert_eq!(rounds(&[900 * mib]), Step::Seeding);
    assert_eq!(rounds(&[900 * mib, 50 * mib]), Step::Seeding);
    assert_eq!(rounds(&[900 * mib, 50 * mib, 4 * mib]), Step::Parking, "small enough");
    assert_eq!(rounds(&[900 * mib, 50 * mib, 50 * mib]), Step::Parking, "it writes as fast as it is sent");
    assert_eq!(
        rounds(&[900 * mib, 50 * mib, 40 * mib, 30 * mib, 20 * mib, 10 * mib]),
        Step::Parking,
        "enough"
    );
}

#[test]
fn before_the_commit_every_failure_and_cancel_leads_back_and_after_it_none_does() {
    let events = [
        Event::Cancel,
        failed(ErrorCode::NoSpace),
        failed(ErrorCode::StaleEpoch),
        failed(ErrorCode::NotFound),
        failed(ErrorCode::Invalid),
    ];
    for (state, _) in line(true) {
        for event in &events {
            let after = state.after(event.clone());
            if state.step < Step::Activating {
                let (aborted, change) = after.unwrap();
                assert_eq!(aborted.step, Step::Thawing, "{:?} {event:?}", state.step);
                assert!(aborted.failure.is_some());
                // A grant anew exactly if a freeze may have reached the source.
                let expected = if state.step >= Step::Freezing {
                    (Change::Regrant { from: e(7), to: e(8) }, e(8))
                } else {
                    (Change::None, e(7))
                };
                assert_eq!((change, aborted.new_epoch.unwrap()), expected, "{:?}", state.step);
                let (released, change) = obey(&aborted, 0);
                assert_eq!((released.step, change), (Step::Discarding, Change::Release));
                assert_eq!(released.failure, aborted.failure, "people want to know why");
                let (ended, _) = obey(&released, 0);
                assert_eq!(ended.outcome(), Some(MoveOutcome::Aborted));
            } else if let Some((after, change)) = after {
                assert_eq!((after.step, change), (state.step, Change::None), "forward only");
            }
        }
    }
}

#[test]
fn what_may_work_later_is_tried_again_but_not_for_ever_before_the_commit() {
    for (state, _) in line(true) {
        for event in [Event::NoAnswer, failed(ErrorCode::Unavailable), failed(ErrorCode::Busy)] {
            let mut now = state.clone();
            for attempt in 1..=50 {
                let Some((next, change)) = now.after(event.clone()) else { break };
                if next.step != now.step {
                    assert!(state.cancellable() && attempt == state.spec.tuning.attempts_max);
                    assert_eq!(next.step, Step::Thawing);
                    break;
                }
                assert_eq!(change, Change::None);
                assert_eq!(next.todo(), now.todo(), "the same command again");
                assert!(next.pause() >= now.pause() && !next.pause().is_zero());
                assert!(next.pause().as_millis() <= u128::from(next.spec.tuning.retry_max_ms));
                now = next;
            }
            assert!(now.step == state.step, "a retry changes no step");
        }
    }
}

#[test]
fn receipts_of_other_steps_names_epochs_and_origins_change_nothing() {
    let all: Vec<_> = line(true).into_iter().map(|(state, _)| state).collect();
    for state in &all {
        for other in all.iter().filter(|other| other.outcome().is_none()) {
            let late = receipt(other, 1);
            let own = state.outcome().is_none() && receipt(state, 1) == late;
            assert_eq!(state.after(Event::Receipt(late)).is_some(), own, "{:?} {:?}", state.step, other.step);
        }
    }
    let at = |step| all.iter().find(|state| state.step == step).unwrap();
    let freezing = at(Step::Freezing);
    let MoveReply::Frozen { name, origin, was_running, snapshots, .. } = receipt(freezing, 0) else {
        panic!()
    };
    let stale = MoveReply::Frozen { epoch: e(6), name, origin, was_running, snapshots };
    assert!(freezing.after(Event::Receipt(stale)).is_none());
    let wrong = MoveReply::Staged { origin: self::origin(77) };
    assert!(at(Step::Staging).after(Event::Receipt(wrong)).is_none(), "never committed on another copy");
    // The last stream: before it, what was taken meanwhile is carried.
    let last = all.iter().rfind(|state| state.step == Step::CatchingUp).unwrap();
    let MoveReply::Sent { name, bytes, millis, left_out, .. } = receipt(last, 5) else { panic!() };
    let other = MoveReply::Sent { name, origin: self::origin(77), bytes, millis, left_out };
    let (aborted, change) = last.after(Event::Receipt(other)).unwrap();
    assert_eq!(aborted.step, Step::Thawing);
    assert!(matches!(change, Change::Regrant { .. }));
}

#[test]
fn a_project_given_away_by_force_is_not_thawed() {
    for (state, _) in line(true) {
        match state.after(Event::Lost) {
            Some((lost, change)) => assert_eq!((lost.step, change), (Step::Discarding, Change::None)),
            None => assert!(state.outcome().is_some()),
        }
    }
}

#[test]
fn a_stored_state_is_resumed_as_it_was() {
    for (state, _) in line(true) {
        let json = serde_json::to_string(&state).unwrap();
        let loaded: MoveState = serde_json::from_str(&json).unwrap();
        assert_eq!(loaded, state);
        assert_eq!(loaded.todo(), state.todo());
        assert!(json.len() < 16 << 10, "it stays small");
    }
}

#[test]
fn every_snapshot_of_a_move_is_named_after_it_and_cleaned() {
    let last = line(true).pop().unwrap().0;
    let names: BTreeSet<_> = last.snapshot_names().into_iter().collect();
    assert!(names.iter().all(|name| name.as_str().starts_with(&snapshot_prefix(last.spec.move_id))));
    assert!(last.rounds.iter().all(|round| names.contains(&round.name)));
    assert!(!names.contains(&undo_name(last.spec.move_id)));
}

/// What each stream of a move is: its snapshot, and what it is a delta to.
fn streams(line: &[(MoveState, Change)]) -> Vec<(String, Option<String>)> {
    let prefix = snapshot_prefix(line[0].0.spec.move_id);
    let short = |name: &SnapshotName| name.as_str().replace(&prefix, "");
    let stream = |(state, _): &(MoveState, Change)| match state.todo() {
        Todo::Command { command: HostCommand::Move { step, .. }, .. } => match step {
            MoveCommand::Carry { snapshot, base, .. } => {
                Some((short(&snapshot.name), base.as_ref().map(short)))
            }
            MoveCommand::Send { name, base, .. } => Some((short(&name), base.as_ref().map(short))),
            _ => None,
        },
        _ => None,
    };
    line.iter().filter_map(stream).collect()
}

#[test]
fn snapshots_come_along_each_as_a_delta_to_the_one_before() {
    let streams = streams(&line(true));
    let expected = [
        ("daily-1", None),
        ("daily-2", Some("daily-1")),
        ("daily-3", Some("daily-2")),
        ("0", Some("daily-3")),
        ("1", Some("0")),
        ("2", Some("1")),
        ("daily-4", Some("2")),
        ("final", Some("2")),
    ];
    let expected = expected.map(|(name, base)| (name.to_owned(), base.map(str::to_owned)));
    assert_eq!(streams, expected);
    let whole: Vec<_> = self::streams(&line(false));
    assert!(whole.iter().all(|(_, base)| base.is_none()), "{whole:?}");
    assert_eq!(whole.len(), 5, "three, one that was taken meanwhile, and all of it: {whole:?}");
}

#[test]
fn the_destination_hears_of_every_snapshot_before_it_comes_and_at_the_end_of_those_that_count() {
    let line = line(true);
    let mut announced = BTreeSet::new();
    for (state, _) in &line {
        let Todo::Command { command: HostCommand::Move { step, .. }, .. } = state.todo() else { continue };
        match step {
            MoveCommand::Reserve { snapshots, bytes, .. } => {
                assert_eq!(bytes, 2 << 30, "as the source measured it");
                announced.extend(snapshots);
            }
            MoveCommand::Carry { snapshot, .. } => assert!(announced.contains(&snapshot), "{snapshot:?}"),
            MoveCommand::Stage { snapshots, .. } => assert_eq!(snapshots, own(&[1, 3, 4])),
            _ => {}
        }
    }
    let last = &line.last().unwrap().0;
    assert_eq!((last.progress().snapshots, last.progress().snapshots_arrived), (3, 3));
    assert!(!last.left_out.is_empty(), "people hear of what did not arrive");
}

#[test]
fn a_snapshot_that_was_deleted_meanwhile_is_passed_over() {
    let mut state = MoveState::new(spec(true));
    while state.step != Step::Carrying {
        state = obey(&state, 0).0;
    }
    let [first, second, third] = <[Carried; 3]>::try_from(own(&[1, 2, 3])).unwrap();
    let other = Event::Receipt(MoveReply::Gone { snapshot: second.clone() });
    assert!(state.after(other).is_none(), "it was not asked for");
    for gone in [first, second, third] {
        let event = Event::Receipt(MoveReply::Gone { snapshot: gone });
        assert_eq!(state.step, Step::Carrying);
        state = state.after(event.clone()).unwrap().0;
        assert!(state.after(event).is_none(), "told twice");
    }
    assert_eq!((state.step, state.snapshots.len()), (Step::Seeding, 0));
    let Todo::Command { command: HostCommand::Move { step: MoveCommand::Send { base, .. }, .. }, .. } =
        state.todo()
    else {
        panic!()
    };
    assert_eq!(base, None, "nothing is there to build on");
}

#[test]
fn only_names_that_hosts_make_are_theirs() {
    let id = MoveId::from_random_bytes([1; 16]);
    for (name, internal) in [
        (format!("move-{id}.0"), true),
        (format!("move-{id}.final"), true),
        (format!("undo-{id}"), true),
        ("conflict-7".to_owned(), true),
        ("move-house.1".to_owned(), false),
        (format!("move-{id}"), false),
        ("undo-the-mess".to_owned(), false),
        ("conflict-of-interest".to_owned(), false),
        ("monday".to_owned(), false),
    ] {
        assert_eq!(is_internal(&name.parse().unwrap()), internal, "{name}");
    }
    assert!(is_internal(&undo_name(id)) && is_internal(&conflict_name(None)));
    assert!(is_internal(&snapshot_name(id, "former")));
}

#[test]
fn nested_volumes_end_a_move_at_once() {
    let project = ProjectId::from_random_bytes([2; 16]);
    let paths = vec!["home/docker".into(), "home/a b".into()];
    let error = host::storage_error(crate::storage::Error::NestedVolumes { project, paths });
    assert_eq!(error.code, ErrorCode::Invalid);
    assert!(error.message.contains("home/docker, home/a b; move"), "{}", error.message);
}
