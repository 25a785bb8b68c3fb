//! The times that podman prints, in all the shapes it has.

use cocalc_core::ids::Timestamp;
use jiff::fmt::strtime;

/// Parses a time of podman: RFC 3339, or Go's default format with a numeric
/// zone and a zone name after it. `None` for Go's zero time, which means never.
///
/// # Errors
///
/// Anything else; a time is never guessed.
pub fn parse_time(text: &str) -> Result<Option<Timestamp>, ParseTimeError> {
    let refused = || ParseTimeError { text: text.chars().take(64).collect() };
    let time = match text.parse::<jiff::Timestamp>() {
        Ok(time) => time,
        Err(_) => {
            // `2026-11-22 05:57:30.30876139 +0000 UTC`, perhaps with Go's
            // reading of the monotonic clock (`m=+0.1`) behind it.
            let mut words = text.split(' ');
            let (Some(date), Some(time), Some(zone)) = (words.next(), words.next(), words.next()) else {
                return Err(refused());
            };
            strtime::parse("%Y-%m-%dT%H:%M:%S%.f%z", format!("{date}T{time}{zone}"))
                .and_then(|parsed| parsed.to_timestamp())
                .map_err(|_| refused())?
        }
    };
    // Go's zero time is the first second of the year 1.
    if time.as_second() <= -62_135_596_800 {
        return Ok(None);
    }
    Ok(Some(Timestamp::from_millis(time.as_millisecond())))
}

/// Says that a text is not a time as podman prints it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a time as podman prints it: {text:?}")]
pub struct ParseTimeError {
    text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_the_same_time() {
        let expected = Timestamp::from_millis(1_795_327_050_308);
        for text in [
            "2026-11-22T05:57:30.30876139Z",
            "2026-11-22T06:57:30.30876139+01:00",
            "2026-11-22 05:57:30.30876139 +0000 UTC",
            "2026-11-22 06:57:30.30876139 +0100 CET",
            "2026-11-22 05:57:30.30876139 +0000 UTC m=+0.012",
        ] {
            assert_eq!(parse_time(text), Ok(Some(expected)), "{text}");
        }
        assert_eq!(
            parse_time("2026-11-22 05:57:30 +0000 UTC"),
            Ok(Some(Timestamp::from_secs(1_795_327_050)))
        );
    }

    #[test]
    fn the_zero_time_is_never() {
        for text in ["0001-01-01T00:00:00Z", "0001-01-01 00:00:00 +0000 UTC"] {
            assert_eq!(parse_time(text), Ok(None), "{text}");
        }
    }

    #[test]
    fn nothing_is_guessed() {
        for text in
            ["", "21 seconds ago", "2026-11-22", "1795343904", "2026-11-22 05:57:30", "2026-13-01T00:00:00Z"]
        {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
