use proptest::prelude::*;

use super::*;

const E1: Epoch = Epoch::FIRST;

fn e(number: u64) -> Epoch {
    Epoch::new(number).unwrap()
}

fn move_id(number: u8) -> MoveId {
    MoveId::from_random_bytes([number; 16])
}

fn host(number: u8) -> HostId {
    HostId::from_random_bytes([number; 16])
}

fn config() -> ProjectConfig {
    ProjectConfig::default()
}

fn fresh() -> Entry {
    Entry::new(ProjectId::from_random_bytes([9; 16]))
}

fn granted() -> Entry {
    let mut entry = fresh();
    entry.create(E1, config()).unwrap();
    entry
}

fn staged(origin: VolumeUuid) -> Entry {
    let mut entry = fresh();
    entry.reserve(move_id(1), host(1), E1, config()).unwrap();
    entry.stage(move_id(1), origin, Vec::new()).unwrap();
    entry
}

#[test]
fn only_the_granted_epoch_is_permitted() {
    let mut entry = fresh();
    assert!(matches!(entry.permit(E1), Err(Refusal::StaleEpoch { .. })));
    entry.create(E1, config()).unwrap();
    entry.create(E1, config()).unwrap();
    assert_eq!(entry.permit(E1), Ok(()));
    assert!(matches!(entry.permit(e(2)), Err(Refusal::StaleEpoch { .. })));
    assert!(matches!(entry.create(e(2), config()), Err(Refusal::Busy { .. })));
}

#[test]
fn a_frozen_epoch_never_runs_again() {
    let mut entry = granted();
    entry.freeze(move_id(1), E1, true).unwrap();
    assert_eq!(entry.may_run(), None);
    assert!(matches!(entry.permit(E1), Err(Refusal::Busy { .. })));
    // Nobody else can freeze, thaw or grant this epoch any more.
    assert!(entry.freeze(move_id(2), E1, false).is_err());
    assert!(entry.thaw(move_id(1), E1, config(), true).is_err());
    assert!(entry.create(E1, config()).is_err());
    // Frozen again by the same move, it remembers that it ran.
    entry.freeze(move_id(1), E1, false).unwrap();
    assert!(entry.frozen.unwrap().was_running);
    entry.thaw(move_id(1), e(2), config(), false).unwrap();
    assert_eq!(entry.may_run(), Some(e(2)));
    assert!(entry.start_pending, "it ran when it was frozen");
    // The freeze of the old epoch comes again, too late.
    assert!(entry.freeze(move_id(1), E1, true).is_err());
    assert_eq!(entry.may_run(), Some(e(2)));
}

#[test]
fn a_thaw_without_a_freeze_leaves_who_is_at_work_alone() {
    let mut entry = granted();
    let mut thawed = entry.clone();
    thawed.thaw(move_id(1), E1, config(), true).unwrap();
    assert_eq!(thawed.may_run(), Some(E1));
    assert!(!thawed.start_pending);
    // The move is over: nothing of it is accepted any more.
    assert!(thawed.source(move_id(1), E1).is_err() && thawed.freeze(move_id(1), E1, true).is_err());
    assert!(thawed.source(move_id(2), E1).is_ok());
    // And one that has seen a higher epoch stays stopped.
    entry.observe(host(0), host(2), e(3), None);
    assert!(entry.thaw(move_id(1), e(2), config(), true).is_err());
    assert_eq!(entry.may_run(), None);
}

#[test]
fn a_destination_activates_only_what_it_staged() {
    let origin = VolumeUuid::from_random_bytes([5; 16]);
    let mut entry = fresh();
    assert!(entry.activate(move_id(1), e(2), config(), true).is_err());
    entry.reserve(move_id(1), host(1), E1, config()).unwrap();
    assert!(entry.expects(move_id(1), host(1)).is_ok());
    assert!(entry.expects(move_id(1), host(2)).is_err() && entry.expects(move_id(2), host(1)).is_err());
    assert!(matches!(entry.activate(move_id(1), e(2), config(), true), Err(Refusal::Unknown { .. })));
    entry.stage(move_id(1), origin, Vec::new()).unwrap();
    assert!(entry.stage(move_id(1), VolumeUuid::from_random_bytes([6; 16]), Vec::new()).is_err());
    assert!(entry.expects(move_id(1), host(1)).is_err(), "what stands is not sent over");
    // Never under the source's own epoch.
    assert!(entry.activate(move_id(1), E1, config(), true).is_err());
    assert_eq!(entry.may_run(), None);
    entry.activate(move_id(1), e(2), config(), true).unwrap();
    assert_eq!((entry.may_run(), entry.start_pending), (Some(e(2)), true));
    entry.start_settled();
    entry.activate(move_id(1), e(2), config(), true).unwrap();
    assert!(!entry.start_pending, "a repeated command starts nothing that was stopped since");
}

#[test]
fn a_discarded_move_does_not_come_back() {
    let mut entry = staged(VolumeUuid::from_random_bytes([5; 16]));
    assert!(entry.discard(move_id(1)));
    assert!(entry.activate(move_id(1), e(2), config(), true).is_err());
    assert!(entry.stage(move_id(1), VolumeUuid::from_random_bytes([5; 16]), Vec::new()).is_err());
    assert!(entry.needs_slot(), "files of it still lie here");
    entry.discarded(move_id(1));
    assert!(!entry.needs_slot());
    assert!(entry.reserve(move_id(1), host(1), E1, config()).is_err());
    entry.reserve(move_id(2), host(1), E1, config()).unwrap();
}

#[test]
fn a_second_move_waits_for_the_first() {
    let mut entry = staged(VolumeUuid::from_random_bytes([5; 16]));
    assert!(matches!(entry.reserve(move_id(2), host(1), E1, config()), Err(Refusal::Busy { .. })));
    entry.reserve(move_id(1), host(1), E1, config()).unwrap();
    assert!(entry.reserved.unwrap().staged.is_some(), "a repeated reserve changes nothing");
}

#[test]
fn news_of_another_owner_end_what_is_held_and_what_is_expected() {
    let mut entry = granted();
    assert!(!entry.observe(host(0), host(0), e(2), None), "a grant comes by command");
    assert_eq!(entry.may_run(), Some(E1));
    assert!(!entry.observe(host(0), host(1), E1, None), "not below what is held");
    assert!(entry.observe(host(0), host(1), e(2), Some(HostAddress::default())));
    assert_eq!(entry.may_run(), None);
    assert_eq!(entry.route(host(0), false).unwrap().host, host(1));
    let origin = VolumeUuid::from_random_bytes([5; 16]);
    let mut expecting = staged(origin);
    expecting.observe(host(0), host(1), E1, None);
    assert!(expecting.stage(move_id(1), origin, Vec::new()).is_ok(), "the source has it still, as expected");
    expecting.observe(host(0), host(1), e(2), None);
    assert!(expecting.activate(move_id(1), e(2), config(), true).is_err(), "it was aborted");
}

#[test]
fn a_late_retirement_does_not_touch_a_project_that_has_returned() {
    let mut entry = granted();
    entry.freeze(move_id(1), E1, true).unwrap();
    entry.observe(host(0), host(1), e(2), None);
    entry.reserve(move_id(2), host(1), e(2), config()).unwrap();
    let reserved = entry.clone();
    entry.retire(move_id(1), host(1), e(2), HostAddress::default()).unwrap();
    assert_eq!(entry.reserved, reserved.reserved);
    entry.stage(move_id(2), VolumeUuid::from_random_bytes([5; 16]), Vec::new()).unwrap();
    entry.activate(move_id(2), e(3), config(), false).unwrap();
    entry.retire(move_id(1), host(1), e(2), HostAddress::default()).unwrap();
    assert_eq!(entry.may_run(), Some(e(3)));
    assert!(entry.retire(move_id(3), host(1), e(3), HostAddress::default()).is_err());
}

#[test]
fn a_deleted_project_stays_deleted() {
    let mut entry = granted();
    assert!(entry.delete(e(2)).is_err());
    entry.delete(E1).unwrap();
    entry.delete(E1).unwrap();
    assert_eq!((entry.may_run(), entry.needs_slot()), (None, false));
    assert!(entry.create(e(2), config()).is_err());
    assert!(entry.reserve(move_id(1), host(1), e(2), config()).is_err());
}

#[derive(Clone, Debug)]
enum Op {
    Create(u64),
    Observe(u8, u64),
    Reserve(u8, u64),
    Stage(u8),
    Activate(u8, u64),
    Discard(u8),
    Discarded(u8),
    Freeze(u8, u64),
    Thaw(u8, u64),
    Retire(u8, u64),
    Delete(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (m, n) = (1u8..4, 1u64..5);
    prop_oneof![
        n.clone().prop_map(Op::Create),
        (0u8..3, n.clone()).prop_map(|(h, n)| Op::Observe(h, n)),
        (m.clone(), n.clone()).prop_map(|(m, n)| Op::Reserve(m, n)),
        m.clone().prop_map(Op::Stage),
        (m.clone(), n.clone()).prop_map(|(m, n)| Op::Activate(m, n)),
        m.clone().prop_map(Op::Discard),
        m.clone().prop_map(Op::Discarded),
        (m.clone(), n.clone()).prop_map(|(m, n)| Op::Freeze(m, n)),
        (m.clone(), n.clone()).prop_map(|(m, n)| Op::Thaw(m, n)),
        (m, n.clone()).prop_map(|(m, n)| Op::Retire(m, n)),
        n.prop_map(Op::Delete),
    ]
}

fn apply(entry: &mut Entry, op: &Op) -> Result<(), Refusal> {
    let origin = VolumeUuid::from_random_bytes([5; 16]);
    match *op {
        Op::Create(n) => entry.create(e(n), config()),
        Op::Observe(h, n) => {
            entry.observe(host(0), host(h), e(n), None);
            Ok(())
        }
        Op::Reserve(m, n) => entry.reserve(move_id(m), host(1), e(n), config()),
        Op::Stage(m) => entry.stage(move_id(m), origin, Vec::new()),
        Op::Activate(m, n) => entry.activate(move_id(m), e(n), config(), true),
        Op::Discard(m) => {
            entry.discard(move_id(m));
            Ok(())
        }
        Op::Discarded(m) => {
            entry.discarded(move_id(m));
            Ok(())
        }
        Op::Freeze(m, n) => entry.freeze(move_id(m), e(n), true),
        Op::Thaw(m, n) => entry.thaw(move_id(m), e(n), config(), true),
        Op::Retire(m, n) => entry.retire(move_id(m), host(2), e(n), HostAddress::default()),
        Op::Delete(n) => entry.delete(e(n)),
    }
}

proptest! {
    /// Whatever comes, in whatever order and how often.
    #[test]
    fn a_host_never_goes_back(ops in prop::collection::vec(op(), 0..40)) {
        let mut entry = fresh();
        let mut frozen = std::collections::BTreeSet::new();
        let mut highest = None;
        for op in &ops {
            let before = entry.clone();
            let done = apply(&mut entry, op);
            if done.is_err() {
                prop_assert_eq!(&before, &entry, "a refused {:?} changed something", op);
            } else if !matches!(op, Op::Create(_)) {
                // A second time is harmless.
                let once = entry.clone();
                let _ = apply(&mut entry, op);
                prop_assert_eq!(&once, &entry, "{:?} twice", op);
            }
            prop_assert!(entry.seen >= highest, "{:?} forgot an epoch", op);
            highest = entry.seen;
            frozen.extend(entry.frozen.map(|frozen| frozen.epoch));
            if let Some(epoch) = entry.may_run() {
                prop_assert!(!frozen.contains(&epoch), "{:?} revived a frozen epoch", op);
                prop_assert_eq!(entry.seen, Some(epoch), "{:?} runs below what was seen", op);
                prop_assert!(!before.deleted);
            }
            let json = serde_json::to_string(&entry).unwrap();
            prop_assert_eq!(serde_json::from_str::<Entry>(&json).unwrap(), entry.clone());
        }
    }
}
