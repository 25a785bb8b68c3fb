use proptest::prelude::*;

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

fn limits(timeout: Duration) -> IdleLimits {
    IdleLimits { timeout: Some(timeout), presence: 4 * HOUR, warning: 10 * MINUTE }
}

/// A project with an idle time of half an hour, watched twice a minute.
struct Day {
    record: Record,
    now: Duration,
    limits: IdleLimits,
    busy: Option<&'static str>,
    warned_at: Option<Duration>,
    stopped_at: Option<Duration>,
}

impl Day {
    fn new() -> Self {
        let mut record = Record::default();
        let now = 100 * HOUR;
        record.started(now);
        Self { record, now, limits: limits(30 * MINUTE), busy: None, warned_at: None, stopped_at: None }
    }

    /// Lets time go by; `each` happens every half minute.
    fn pass(&mut self, time: Duration, mut each: impl FnMut(&mut Record, Duration)) -> &mut Self {
        let end = self.now + time;
        while self.now < end && self.stopped_at.is_none() {
            self.now += MINUTE / 2;
            each(&mut self.record, self.now);
            let circumstances = Circumstances { limits: self.limits, busy: self.busy };
            match self.record.verdict(&circumstances, self.now) {
                Verdict::Warn { .. } => drop(self.warned_at.get_or_insert(self.now)),
                Verdict::Stop { .. } => self.stopped_at = Some(self.now),
                Verdict::Waits { .. } => {}
                Verdict::Never | Verdict::Runs { .. } => self.warned_at = None,
            }
        }
        self
    }

    fn runs(&self) -> bool {
        self.stopped_at.is_none()
    }
}

fn nothing(_: &mut Record, _: Duration) {}

#[test]
fn work_in_an_ssh_session_keeps_it_and_a_silent_session_does_not() {
    let mut day = Day::new();
    // Somebody types a line every twenty minutes, and thinks in between.
    for _ in 0..30 {
        day.pass(20 * MINUTE, nothing);
        assert!(day.runs());
        let now = day.now;
        day.record.worked(Source::Ssh, now);
    }
    let left = day.now;
    day.pass(2 * HOUR, nothing);
    let stopped = day.stopped_at.unwrap();
    assert!(stopped - left >= 30 * MINUTE && stopped - left <= 31 * MINUTE);
    assert!(stopped - day.warned_at.unwrap() >= 10 * MINUTE);
}

#[test]
fn what_a_forgotten_terminal_shows_does_not_keep_it_for_ever() {
    let mut day = Day::new();
    let begun = day.now;
    day.pass(24 * HOUR, |record, now| record.present(Source::Ssh, now));
    let stopped = day.stopped_at.unwrap();
    assert!(stopped - begun >= 4 * HOUR && stopped - begun <= 4 * HOUR + 5 * MINUTE);
}

#[test]
fn a_running_kernel_is_work_as_long_as_it_computes() {
    let mut day = Day::new();
    day.pass(12 * HOUR, |record, now| record.worked(Source::Cpu, now));
    assert!(day.runs() && day.warned_at.is_none());
    // It has its result, and waits for the next cell, its socket open.
    day.pass(29 * MINUTE, nothing);
    assert!(day.runs());
    day.pass(5 * MINUTE, nothing);
    assert!(!day.runs());
}

#[test]
fn a_long_upload_is_work_to_its_end() {
    let mut day = Day::new();
    day.pass(9 * HOUR, |record, now| record.worked(Source::Http, now));
    assert!(day.runs() && day.warned_at.is_none());
}

#[test]
fn a_background_job_counts_by_what_it_uses_or_because_it_says_so() {
    let mut day = Day::new();
    day.pass(6 * HOUR, |record, now| record.worked(Source::Network, now));
    assert!(day.runs());
    // It waits for a queue elsewhere: neither CPU nor network.
    let until = day.now + 10 * HOUR;
    day.record.declare([("wait-for-results".to_owned(), until)].into());
    day.pass(9 * HOUR, nothing);
    assert!(day.runs() && day.warned_at.is_none());
    assert_eq!(day.record.jobs(day.now).count(), 1);
    day.record.declare(BTreeMap::new());
    day.pass(HOUR, nothing);
    assert!(!day.runs(), "it is done, and half an hour is over since long");
}

#[test]
fn a_visible_tab_that_nobody_touches_defers_the_stop_and_one_click_extends_it() {
    let mut day = Day::new();
    let begun = day.now;
    let polls = |record: &mut Record, now: Duration| record.present(Source::Http, now);
    day.pass(3 * HOUR + 45 * MINUTE, polls);
    assert!(day.runs() && day.warned_at.is_none(), "somebody may be reading");
    day.pass(10 * MINUTE, polls);
    assert!(day.warned_at.is_some(), "in good time");
    let until = day.now + 2 * HOUR;
    day.record.keep(Some(until));
    day.pass(109 * MINUTE, polls);
    assert!(day.runs() && day.warned_at.is_none());
    day.pass(HOUR, polls);
    assert!(day.stopped_at.unwrap() >= until && day.stopped_at.unwrap() > begun + 5 * HOUR);
}

#[test]
fn it_is_never_stopped_during_a_move_or_a_backup() {
    let mut day = Day::new();
    day.busy = Some("a backup");
    day.pass(8 * HOUR, nothing);
    assert!(day.runs());
    day.busy = None;
    day.pass(MINUTE, nothing);
    assert!(!day.runs());
}

#[test]
fn a_machine_that_slept_warns_before_it_stops() {
    let mut day = Day::new();
    day.pass(5 * MINUTE, nothing);
    day.now += 12 * HOUR;
    let woke = day.now;
    day.pass(HOUR, nothing);
    assert!(day.stopped_at.unwrap() - woke >= 10 * MINUTE);
}

#[test]
fn a_restart_of_the_daemon_neither_forgets_nor_prolongs() {
    let mut day = Day::new();
    let started = day.now;
    day.pass(15 * MINUTE, nothing);
    let text = serde_json::to_string(&day.record.save(day.now)).unwrap();
    day.now += 3 * MINUTE;
    day.record = Record::restore(&serde_json::from_str(&text).unwrap(), 3 * MINUTE, day.now);
    day.pass(HOUR, nothing);
    let ran = day.stopped_at.unwrap() - started;
    assert!(ran >= 30 * MINUTE && ran <= 32 * MINUTE, "{ran:?}");
}

#[derive(Clone, Debug)]
enum Step {
    Worked(Source),
    Present(Source),
    Keep(Option<u64>),
    Job(u64),
    NoJobs,
    Busy(bool),
    Restart(u64),
    Nothing,
}

fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
    let source = prop::sample::select(Source::ALL.to_vec());
    let step = prop_oneof![
        2 => source.clone().prop_map(Step::Worked),
        2 => source.prop_map(Step::Present),
        1 => prop::option::of(0_u64..20_000).prop_map(Step::Keep),
        1 => (0_u64..20_000).prop_map(Step::Job),
        1 => Just(Step::NoJobs),
        1 => any::<bool>().prop_map(Step::Busy),
        1 => (0_u64..600).prop_map(Step::Restart),
        6 => Just(Step::Nothing),
    ];
    prop::collection::vec((prop_oneof![4 => 1_u64..120, 1 => 120_u64..10_000], step), 1..200)
}

proptest! {
    /// Whatever happens: a stop comes only after a warning that is old enough,
    /// with no work since the warning, not while kept, declared or busy, and not
    /// sooner than the idle time; and what is left alone is stopped in the end.
    #[test]
    fn no_stop_without_warning_and_no_idle_project_for_ever(
        steps in steps(),
        timeout in 60_u64..7200,
        presence in 0_u64..20_000,
        warning in 0_u64..900,
    ) {
        let secs = Duration::from_secs;
        let limits = IdleLimits {
            timeout: Some(secs(timeout)),
            presence: secs(presence),
            warning: secs(warning.min(timeout / 2)),
        };
        let mut now = secs(1_000_000);
        let mut record = Record::default();
        record.started(now);
        let (mut busy, mut worked, mut warned) = (false, now, None::<Duration>);
        let (mut kept, mut job) = (None::<Duration>, None::<Duration>);
        // At the end it is left alone, so that the second half is seen too.
        let alone = std::iter::once((1, Step::Busy(false)))
            .chain(std::iter::repeat_n((600, Step::Nothing), 200));
        let mut stopped = false;
        for (gap, step) in steps.into_iter().chain(alone) {
            now += secs(gap);
            match step {
                Step::Worked(source) => {
                    record.worked(source, now);
                    worked = now;
                }
                Step::Present(source) => record.present(source, now),
                Step::Keep(left) => {
                    kept = left.map(|left| now + secs(left));
                    record.keep(kept);
                }
                Step::Job(left) => {
                    job = Some(now + secs(left));
                    record.declare([("job".to_owned(), now + secs(left))].into());
                }
                Step::NoJobs => {
                    job = None;
                    record.declare(BTreeMap::new());
                }
                Step::Busy(is) => busy = is,
                Step::Restart(away) => {
                    let saved = record.save(now);
                    now += secs(away);
                    record = Record::restore(&saved, secs(away), now);
                    warned = None;
                }
                Step::Nothing => {}
            }
            let circumstances = Circumstances { limits, busy: busy.then_some("a move") };
            match record.verdict(&circumstances, now) {
                Verdict::Never => prop_assert!(false, "there is a limit"),
                Verdict::Runs { until } => {
                    prop_assert!(until > now);
                    warned = None;
                }
                Verdict::Warn { until } => {
                    prop_assert!(until > now);
                    warned.get_or_insert(now);
                }
                Verdict::Waits { .. } => prop_assert!(busy),
                Verdict::Stop { idle } => {
                    let warned_at = warned.unwrap_or(now);
                    prop_assert!(now - warned_at >= limits.warning, "warned {:?} ago", now - warned_at);
                    prop_assert!(worked <= warned_at);
                    prop_assert!(now - worked >= secs(timeout) && idle == now - worked);
                    prop_assert!(!busy && kept.is_none_or(|kept| kept <= now));
                    prop_assert!(job.is_none_or(|job| job <= now));
                    stopped = true;
                    break;
                }
            }
        }
        prop_assert!(stopped, "left alone for 33 hours, it still runs");
    }

    #[test]
    fn what_is_saved_is_what_was(
        ages in prop::collection::btree_map(prop::sample::select(Source::ALL.to_vec()), 0_u64..1_000_000, 0..8),
        keep in prop::option::of(1_u64..1_000_000),
    ) {
        let now = Duration::from_secs(5_000_000);
        let saved = Saved { work: ages, keep_ms: keep, ..Saved::default() };
        prop_assert_eq!(Record::restore(&saved, Duration::ZERO, now).save(now), saved);
    }
}
