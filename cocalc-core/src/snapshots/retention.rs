//! Which automatic snapshots go. Pure: a list and the time in, names out.
//!
//! Time is cut into periods: intervals, hours, days, weeks from Monday, months,
//! all in UTC. Of the newest so many periods *that have a snapshot*, the newest
//! one is kept. So a project that nobody touches for a year keeps what it has,
//! and nothing is deleted because a clock says that it is old.
//!
//! Snapshots of times to come, made while the clock was wrong, are thinned out
//! by the same rule but on their own: they neither count against the others
//! nor stay in any number.

use std::{collections::BTreeSet, time::Duration};

use cocalc_ids::{SnapshotName, Timestamp};

use super::{Policy, auto_time};

/// The automatic snapshots among `names` that `policy` does not keep, oldest
/// first. Snapshots of people, the newest automatic one, and the newest that
/// is not of a time to come, are never among them.
///
/// What is kept now includes all that will be kept at any later time: whether
/// it is applied often or seldom makes no difference in the end.
pub fn superfluous<'a>(
    policy: &Policy,
    names: impl IntoIterator<Item = &'a SnapshotName>,
    now: Timestamp,
) -> Vec<SnapshotName> {
    if !policy.fields().enabled {
        return Vec::new();
    }
    let (past, future) = sorted(names, now);
    let mut kept = keep(policy, &past);
    kept.append(&mut keep(policy, &future));
    past.iter().chain(&future).filter(|(at, _)| !kept.contains(at)).map(|(_, name)| (*name).clone()).collect()
}

/// The automatic snapshots among `names` that may go when space is short, in
/// the order in which they go: the oldest first. The newest stays, and the
/// newest that is not of a time to come.
pub fn expendable<'a>(
    names: impl IntoIterator<Item = &'a SnapshotName>,
    now: Timestamp,
) -> Vec<SnapshotName> {
    let (mut past, mut future) = sorted(names, now);
    past.pop();
    future.pop();
    past.into_iter().chain(future).map(|(_, name)| name.clone()).collect()
}

/// The automatic snapshot that was taken last: the newest, unless it is of a
/// time to come and there are others.
pub fn latest<'a>(
    names: impl IntoIterator<Item = &'a SnapshotName>,
    now: Timestamp,
) -> Option<&'a SnapshotName> {
    let (past, future) = sorted(names, now);
    past.last().or(future.last()).map(|(_, name)| *name)
}

type Dated<'a> = Vec<(Timestamp, &'a SnapshotName)>;

/// By so much a snapshot may be of a time to come and count as of now: a name
/// that is taken is passed over for the next second's.
pub(crate) const SLACK: Duration = Duration::from_secs(60);

/// The automatic ones, each with its time, oldest first: those up to `now`, and
/// those of times to come.
fn sorted<'a>(names: impl IntoIterator<Item = &'a SnapshotName>, now: Timestamp) -> (Dated<'a>, Dated<'a>) {
    let mut dated: Dated<'a> =
        names.into_iter().filter_map(|name| auto_time(name).map(|at| (at, name))).collect();
    dated.sort();
    dated.dedup();
    let split = dated.partition_point(|(at, _)| *at <= now.plus(SLACK));
    let future = dated.split_off(split);
    (dated, future)
}

/// The times of those that are kept.
fn keep(policy: &Policy, dated: &Dated<'_>) -> BTreeSet<Timestamp> {
    let fields = policy.fields();
    let interval = i64::from(fields.interval_secs);
    let times: Vec<Timestamp> = dated.iter().map(|(at, _)| *at).collect();
    kept_times(
        &times,
        &[
            (fields.frequent, &|at| at.secs().div_euclid(interval)),
            (fields.hourly, &hour),
            (fields.daily, &day),
            (fields.weekly, &week),
            (fields.monthly, &month),
        ],
    )
}

/// Gives a time the number of the period in which it is.
pub(crate) type Period<'a> = &'a dyn Fn(Timestamp) -> i64;

/// Of `times`, oldest first, those that are kept: the newest, and of the newest
/// so many of each kind of period that have one, the newest one.
pub(crate) fn kept_times(times: &[Timestamp], periods: &[(u16, Period<'_>)]) -> BTreeSet<Timestamp> {
    let mut kept: BTreeSet<Timestamp> = times.last().copied().into_iter().collect();
    for (keep, period) in periods {
        let mut seen = BTreeSet::new();
        for at in times.iter().rev() {
            let new = seen.insert(period(*at));
            if seen.len() > usize::from(*keep) {
                break;
            }
            if new {
                kept.insert(*at);
            }
        }
    }
    kept
}

const DAY: i64 = 86_400;

pub(crate) fn hour(at: Timestamp) -> i64 {
    at.secs().div_euclid(3_600)
}

pub(crate) fn day(at: Timestamp) -> i64 {
    at.secs().div_euclid(DAY)
}

pub(crate) fn week(at: Timestamp) -> i64 {
    // 1970-01-01 was a Thursday, three days after a Monday.
    (at.secs().div_euclid(DAY) + 3).div_euclid(7)
}

pub(crate) fn month(at: Timestamp) -> i64 {
    let at = jiff::Timestamp::from_second(at.secs()).unwrap_or_default();
    let date = at.to_zoned(jiff::tz::TimeZone::UTC).date();
    i64::from(date.year()) * 12 + i64::from(date.month())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::PolicyFields, *};
    use crate::snapshots::auto_name;

    const NOW: i64 = 1_795_737_088;

    fn names(secs: &[i64]) -> Vec<SnapshotName> {
        secs.iter().map(|secs| auto_name(Timestamp::from_secs(*secs))).collect()
    }

    fn left(policy: &Policy, names: &[SnapshotName], now: i64) -> Vec<SnapshotName> {
        let gone = superfluous(policy, names, Timestamp::from_secs(now));
        names.iter().filter(|name| !gone.contains(name)).cloned().collect()
    }

    /// The plain reading of the promise, in its own words: of the newest
    /// `keep` periods that have one, the newest.
    fn promised(names: &[SnapshotName], keep: u16, period: impl Fn(i64) -> i64) -> BTreeSet<SnapshotName> {
        let mut times: Vec<i64> = names.iter().map(|name| auto_time(name).unwrap().secs()).collect();
        times.sort_unstable();
        let mut newest = std::collections::BTreeMap::new();
        for at in times {
            newest.insert(period(at), at);
        }
        newest.values().rev().take(keep.into()).map(|at| auto_name(Timestamp::from_secs(*at))).collect()
    }

    #[test]
    fn months_at_full_pace_leave_what_the_policy_says() {
        let fields = PolicyFields { interval_secs: 3_600, ..PolicyFields::default() };
        let policy = Policy::try_from(fields).unwrap();
        let (mut kept, mut all) = (Vec::new(), Vec::new());
        for step in 0..(200 * 24) {
            let at = NOW + step * 3_600;
            kept.push(auto_name(Timestamp::from_secs(at)));
            all.push(at);
            kept = left(&policy, &kept, at);
            assert!(kept.len() <= policy.kept_max());
        }
        // The same as if it had been applied once, at the end.
        let end = NOW + (200 * 24 - 1) * 3_600;
        assert_eq!(kept, left(&policy, &names(&all), end));
        let times: Vec<i64> = kept.iter().map(|name| auto_time(name).unwrap().secs()).collect();
        let age = |secs: i64| times.iter().filter(|at| end - **at <= secs).count();
        assert_eq!(age(23 * 3_600), 24, "every hour of a day: {times:?}");
        assert!(age(7 * DAY) >= 24 + 5, "every day of a week");
        assert!(end - times[0] > 120 * DAY, "and half a year back");
    }

    #[test]
    fn nobody_touches_it_for_a_year_and_it_loses_nothing() {
        let policy = Policy::default();
        let kept = left(&policy, &names(&[NOW, NOW + 900, NOW + 1_800, NOW + DAY]), NOW + DAY);
        assert_eq!(left(&policy, &kept, NOW + 365 * DAY), kept);
    }

    #[test]
    fn a_clock_that_was_ahead_pushes_nothing_out() {
        let policy = Policy::default();
        let good: Vec<i64> = (0..40).map(|step| NOW - step * 900).collect();
        let wrong: Vec<i64> = (0..40).map(|step| NOW + 400 * DAY + step * 900).collect();
        let before = left(&policy, &names(&good), NOW);
        let after = left(&policy, &names(&[good, wrong].concat()), NOW);
        assert!(before.iter().all(|name| after.contains(name)));
        assert!(after.len() <= 2 * policy.kept_max(), "and they don't stay in any number");
    }

    #[test]
    fn weeks_begin_on_monday() {
        let at = |text: &str| auto_time(&format!("auto-{text}Z").parse().unwrap()).unwrap();
        assert_eq!(week(at("2026-11-22T23-59-59")) + 1, week(at("2026-11-23T00-00-00")));
        assert_eq!(week(at("2026-11-23T00-00-00")), week(at("2026-11-29T23-59-59")));
        assert_eq!(month(at("2026-11-30T23-59-59")) + 1, month(at("2026-12-01T00-00-00")));
        assert_eq!(month(at("2026-12-31T23-59-59")) + 1, month(at("2027-01-01T00-00-00")));
    }

    fn policies() -> impl Strategy<Value = Policy> {
        let kind = || 0_u16..6;
        (60_u32..7_200, kind(), kind(), kind(), kind(), kind()).prop_map(
            |(interval_secs, frequent, hourly, daily, weekly, monthly)| {
                let fields = PolicyFields {
                    interval_secs,
                    frequent,
                    hourly,
                    daily,
                    weekly,
                    monthly,
                    ..PolicyFields::default()
                };
                Policy::try_from(fields).unwrap()
            },
        )
    }

    /// Times near and far, past and future, some in the same periods.
    fn times() -> impl Strategy<Value = Vec<i64>> {
        let near = (-7_200_i64..7_200).prop_map(|by| NOW + by);
        let days = (-40_i64 * DAY..40 * DAY).prop_map(|by| NOW + by);
        let years = (-800_i64 * DAY..800 * DAY).prop_map(|by| NOW + by);
        proptest::collection::vec(prop_oneof![near, days, years], 0..60)
    }

    proptest! {
        #[test]
        fn people_s_own_are_never_touched(policy in policies(), times in times(), own in "[a-z0-9][a-zA-Z0-9._:+-]{0,30}") {
            let own: SnapshotName = own.parse().unwrap();
            prop_assume!(auto_time(&own).is_none());
            let mut all = names(&times);
            let without = left(&policy, &all, NOW);
            all.push(own.clone());
            let with = left(&policy, &all, NOW);
            prop_assert!(with.contains(&own));
            prop_assert_eq!(&with[..with.len() - 1], &without[..]);
            prop_assert!(!expendable(&all, Timestamp::from_secs(NOW)).contains(&own));
        }

        #[test]
        fn the_newest_stays_and_the_number_is_bounded(policy in policies(), times in times()) {
            let all = names(&times);
            let kept = left(&policy, &all, NOW);
            prop_assert_eq!(kept.iter().max(), all.iter().max());
            let past = |list: &[SnapshotName]| -> Vec<SnapshotName> {
                list.iter().filter(|name| auto_time(name).unwrap().secs() <= NOW + 60).cloned().collect()
            };
            prop_assert_eq!(past(&kept).into_iter().max(), past(&all).into_iter().max());
            let distinct: BTreeSet<_> = kept.iter().collect();
            prop_assert!(distinct.len() <= 2 * policy.kept_max());
            let spare = expendable(&all, Timestamp::from_secs(NOW));
            prop_assert!(all.iter().max().is_none_or(|newest| !spare.contains(newest)));
        }

        #[test]
        fn twice_is_once(policy in policies(), times in times()) {
            let once = left(&policy, &names(&times), NOW);
            prop_assert_eq!(left(&policy, &once, NOW), once);
        }

        #[test]
        fn the_order_of_the_list_does_not_matter(policy in policies(), times in times(), turn in 0_usize..60) {
            let all = names(&times);
            let mut turned = all.clone();
            turned.rotate_left(turn.min(all.len()));
            let now = Timestamp::from_secs(NOW);
            prop_assert_eq!(superfluous(&policy, &all, now), superfluous(&policy, &turned, now));
        }

        #[test]
        fn nothing_goes_that_is_needed_later(
            policy in policies(), times in times(), new in times(), later in 0_i64..400 * DAY,
        ) {
            // Of times that have come; what follows comes after.
            let times: Vec<i64> = times.into_iter().filter(|at| *at <= NOW).collect();
            let new: Vec<i64> = new.into_iter().filter(|at| (NOW..=NOW + later).contains(at)).collect();
            let direct: BTreeSet<_> = left(&policy, &names(&[times.clone(), new.clone()].concat()), NOW + later).into_iter().collect();
            let mut kept = left(&policy, &names(&times), NOW);
            kept.extend(names(&new));
            let stepwise: BTreeSet<_> = left(&policy, &kept, NOW + later).into_iter().collect();
            prop_assert_eq!(stepwise, direct);
        }

        #[test]
        fn each_period_keeps_what_was_promised(policy in policies(), times in times()) {
            let times: Vec<i64> = times.into_iter().filter(|at| *at <= NOW).collect();
            let all = names(&times);
            let kept: BTreeSet<_> = left(&policy, &all, NOW).into_iter().collect();
            let fields = policy.fields();
            let mut all_promised: BTreeSet<SnapshotName> = all.iter().max().cloned().into_iter().collect();
            all_promised.append(&mut promised(&all, fields.frequent, |at| at.div_euclid(fields.interval_secs.into())));
            all_promised.append(&mut promised(&all, fields.hourly, |at| at.div_euclid(3_600)));
            all_promised.append(&mut promised(&all, fields.daily, |at| at.div_euclid(DAY)));
            all_promised.append(&mut promised(&all, fields.weekly, |at| week(Timestamp::from_secs(at))));
            all_promised.append(&mut promised(&all, fields.monthly, |at| month(Timestamp::from_secs(at))));
            prop_assert_eq!(kept, all_promised);
        }

        #[test]
        fn a_clock_that_goes_back_wipes_nothing(policy in policies(), times in times(), back in 0_i64..900 * DAY) {
            let times: Vec<i64> = times.into_iter().filter(|at| *at <= NOW).collect();
            let kept = left(&policy, &names(&times), NOW);
            let then = left(&policy, &kept, NOW - back);
            prop_assert_eq!(then, kept);
        }
    }
}
