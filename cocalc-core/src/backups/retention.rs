//! Which backups go. Pure: a list and the time in, ids out.
//!
//! The rule is that of snapshots (`snapshots::superfluous`): of the newest so
//! many hours, days, weeks and months *that have a backup* the newest one is
//! kept, so nothing goes because a clock says that it is old. Besides, the
//! newest of those that people asked for are kept.

use std::collections::BTreeSet;

use cocalc_ids::Timestamp;

use super::{Backup, BackupKind, Policy};
use crate::snapshots::retention::{SLACK, day, hour, kept_times, month, week};

/// The ids of the backups that `policy` does not keep, oldest first. The newest
/// one, and the newest that is not of a time to come, are never among them.
///
/// What is kept now includes all that will be kept at any later time: whether
/// it is applied often or seldom makes no difference in the end.
pub fn superfluous(policy: &Policy, backups: &[Backup], now: Timestamp) -> Vec<String> {
    let fields = policy.fields();
    if !fields.enabled {
        return Vec::new();
    }
    let mut dated: Vec<&Backup> = backups.iter().collect();
    // Two hosts may have backed it up in one moment: then the ids decide.
    dated.sort_by(|a, b| (a.taken, &a.id).cmp(&(b.taken, &b.id)));
    let split = dated.partition_point(|backup| backup.taken <= now.plus(SLACK));
    let (past, future) = dated.split_at(split);
    let mut kept: BTreeSet<&str> = BTreeSet::new();
    for part in [past, future] {
        let times: Vec<Timestamp> = part.iter().map(|backup| backup.taken).collect();
        let periods: [(u16, &dyn Fn(Timestamp) -> i64); 4] =
            [(fields.hourly, &hour), (fields.daily, &day), (fields.weekly, &week), (fields.monthly, &month)];
        for at in kept_times(&times, &periods) {
            // The last of a moment.
            kept.extend(part.iter().rev().find(|backup| backup.taken == at).map(|backup| backup.id.as_str()));
        }
        let manual = part.iter().rev().filter(|backup| backup.kind == BackupKind::Manual);
        kept.extend(manual.take(fields.manual.into()).map(|backup| backup.id.as_str()));
    }
    dated.iter().filter(|backup| !kept.contains(backup.id.as_str())).map(|backup| backup.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use cocalc_ids::{Epoch, HostId, ProjectId};
    use proptest::prelude::*;

    use super::{super::PolicyFields, *};

    const NOW: i64 = 1_795_737_088;
    const DAY: i64 = 86_400;

    fn backup(n: usize, secs: i64, kind: BackupKind) -> Backup {
        Backup {
            id: format!("{n:04}"),
            project: ProjectId::from_bytes([1; 16]),
            host: HostId::from_bytes([2; 16]),
            epoch: Epoch::FIRST,
            kind,
            taken: Timestamp::from_secs(secs),
            bytes: 0,
            added_bytes: 0,
            files: 0,
            files_read: 0,
        }
    }

    fn list(times: &[(i64, bool)]) -> Vec<Backup> {
        let kind = |manual| if manual { BackupKind::Manual } else { BackupKind::Scheduled };
        times.iter().enumerate().map(|(n, (at, manual))| backup(n, *at, kind(*manual))).collect()
    }

    fn left(policy: &Policy, all: &[Backup], now: i64) -> Vec<Backup> {
        let gone = superfluous(policy, all, Timestamp::from_secs(now));
        all.iter().filter(|backup| !gone.contains(&backup.id)).cloned().collect()
    }

    #[test]
    fn a_year_of_daily_backups_leaves_days_weeks_and_months() {
        let all = list(&(0..365).map(|day| (NOW - day * DAY, false)).rev().collect::<Vec<_>>());
        let kept = left(&Policy::default(), &all, NOW);
        assert!((12..=17).contains(&kept.len()), "{}", kept.len());
        let ages: Vec<i64> = kept.iter().map(|backup| (NOW - backup.taken.secs()) / DAY).collect();
        assert!((0..7).all(|age| ages.contains(&age)), "{ages:?}");
        assert!(ages.iter().max().is_some_and(|oldest| *oldest > 120), "{ages:?}");
    }

    #[test]
    fn those_of_people_stay_and_the_policy_can_be_off() {
        let fields =
            PolicyFields { hourly: 0, daily: 1, weekly: 0, monthly: 0, manual: 2, ..Default::default() };
        let policy = Policy::try_from(fields.clone()).unwrap();
        let all = list(&[
            (NOW - 900, true),
            (NOW - 800, true),
            (NOW - 700, true),
            (NOW - 600, false),
            (NOW, false),
        ]);
        let kept: Vec<String> = left(&policy, &all, NOW).into_iter().map(|backup| backup.id).collect();
        assert_eq!(kept, ["0001", "0002", "0004"]);
        let off = Policy::try_from(PolicyFields { enabled: false, ..fields }).unwrap();
        assert_eq!(left(&off, &all, NOW), all);
    }

    fn policies() -> impl Strategy<Value = Policy> {
        (0_u16..30, 0_u16..10, 0_u16..6, 0_u16..6, 0_u16..4).prop_map(
            |(hourly, daily, weekly, monthly, manual)| {
                let fields =
                    PolicyFields { hourly, daily, weekly, monthly, manual, ..PolicyFields::default() };
                Policy::try_from(fields).unwrap()
            },
        )
    }

    fn times() -> impl Strategy<Value = Vec<(i64, bool)>> {
        let at = prop_oneof![NOW - 800 * DAY..NOW, NOW - DAY..NOW, NOW..NOW + 800 * DAY, Just(NOW)];
        proptest::collection::vec((at, any::<bool>()), 0..60)
    }

    proptest! {
        #[test]
        fn twice_is_once_and_the_newest_stay(policy in policies(), times in times()) {
            let all = list(&times);
            let once = left(&policy, &all, NOW);
            prop_assert_eq!(left(&policy, &once, NOW), once.clone());
            let newest = |list: &[Backup], until: i64| {
                list.iter().filter(|b| b.taken.secs() <= until).map(|b| (b.taken, b.id.clone())).max()
            };
            prop_assert_eq!(newest(&once, i64::MAX), newest(&all, i64::MAX));
            prop_assert_eq!(newest(&once, NOW + 60), newest(&all, NOW + 60));
        }

        #[test]
        fn the_order_of_the_list_does_not_matter(policy in policies(), times in times(), turn in 0_usize..60) {
            let all = list(&times);
            let mut turned = all.clone();
            turned.rotate_left(turn.min(all.len()));
            let now = Timestamp::from_secs(NOW);
            prop_assert_eq!(superfluous(&policy, &all, now), superfluous(&policy, &turned, now));
        }

        #[test]
        fn nothing_goes_that_is_needed_later(
            policy in policies(), times in times(), new in times(), later in 0_i64..400 * DAY,
        ) {
            let mut all: Vec<(i64, bool)> = times.into_iter().filter(|(at, _)| *at <= NOW).collect();
            all.sort();
            let known = all.len();
            let mut coming: Vec<(i64, bool)> =
                new.into_iter().filter(|(at, _)| (NOW + 1..=NOW + later).contains(at)).collect();
            coming.sort();
            all.extend(coming);
            let all = list(&all);
            let direct = left(&policy, &all, NOW + later);
            let mut kept = left(&policy, &all[..known], NOW);
            kept.extend_from_slice(&all[known..]);
            prop_assert_eq!(left(&policy, &kept, NOW + later), direct);
        }

        #[test]
        fn a_clock_that_goes_back_wipes_nothing(policy in policies(), times in times(), back in 0_i64..900 * DAY) {
            let all: Vec<_> = times.into_iter().filter(|(at, _)| *at <= NOW).collect();
            let kept = left(&policy, &list(&all), NOW);
            prop_assert_eq!(left(&policy, &kept, NOW - back), kept);
        }
    }
}
