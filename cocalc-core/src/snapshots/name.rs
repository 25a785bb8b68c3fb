//! The names of automatic snapshots, which say when they were taken.

use cocalc_ids::{SnapshotName, Timestamp};

/// What the names of automatic snapshots begin with. People's own names must
/// not: they would be taken for automatic ones.
pub const AUTO_PREFIX: &str = "auto-";

/// In UTC, with dashes, so that it is a file name everywhere and names sort
/// like times.
const FORMAT: &str = "auto-%Y-%m-%dT%H-%M-%SZ";

/// The years that fit: 0000 to 9999, less a day on either side.
const SECS_MIN: i64 = -62_167_132_800;
const SECS_MAX: i64 = 253_402_214_400;

/// The name of an automatic snapshot of this second, for instance
/// `auto-2026-11-26T23-51-28Z`.
pub fn auto_name(at: Timestamp) -> SnapshotName {
    let at = jiff::Timestamp::from_second(at.secs().clamp(SECS_MIN, SECS_MAX)).unwrap_or_default();
    let text = at.strftime(FORMAT).to_string();
    #[expect(clippy::expect_used, reason = "digits, dashes and letters, and far below 100 of them")]
    text.parse().expect("the name of a time")
}

/// The second in which an automatic snapshot was taken; `None` for any other
/// name, however near.
pub fn auto_time(name: &SnapshotName) -> Option<Timestamp> {
    let civil = jiff::civil::DateTime::strptime(FORMAT, name.as_str()).ok()?;
    let at = Timestamp::from_secs(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_second());
    // One spelling only.
    (auto_name(at) == *name).then_some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_people_name_is_not_automatic() {
        for near in [
            "auto",
            "auto-",
            "auto-2026-11-26",
            "auto-2026-11-26T23:51:28Z",
            "auto-2026-11-26T23-51-28",
            "auto-2026-11-26T23-51-28Z2",
            "auto-2026-11-26T23-51-60Z",
            "auto-2026-13-26T23-51-28Z",
            "auto-2026-02-30T23-51-28Z",
            "auto-+026-11-26T23-51-28Z",
            "Auto-2026-11-26T23-51-28Z",
            "2026-11-26T23-51-28Z",
        ] {
            assert_eq!(auto_time(&near.parse().unwrap()), None, "{near}");
        }
        let at = auto_time(&"auto-2026-11-26T23-51-28Z".parse().unwrap()).unwrap();
        assert_eq!(at, Timestamp::from_secs(1_795_737_088));
    }

    proptest! {
        #[test]
        fn a_time_has_one_name_and_names_sort_like_times(
            a in SECS_MIN..=SECS_MAX, b in SECS_MIN..=SECS_MAX,
        ) {
            let (a, b) = (Timestamp::from_secs(a), Timestamp::from_secs(b));
            prop_assert_eq!(auto_time(&auto_name(a)), Some(a));
            prop_assert_eq!(auto_name(a).cmp(&auto_name(b)), a.cmp(&b));
        }

        #[test]
        fn no_clock_is_too_wrong_for_a_name(millis in any::<i64>()) {
            let name = auto_name(Timestamp::from_millis(millis));
            prop_assert!(auto_time(&name).is_some());
        }
    }
}
