//! Which images may be deleted.

use std::time::Duration;

use cocalc_ids::{ImageDigest, Timestamp};

/// What is known of an image when it is decided whether it may go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Kept {
    /// Which image.
    pub digest: ImageDigest,
    /// Whether somebody said that it stays, or it is the host's default.
    pub pinned: bool,
    /// Whether a project that is here, or on its way here, has it; or it is
    /// being sent.
    pub in_use: bool,
    /// When it was last used, or came, whichever is later; `None` if nobody
    /// knows.
    pub used: Option<Timestamp>,
    /// Its size in bytes.
    pub bytes: u64,
}

/// When unused images go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Policy {
    /// Once they have not been used for so long.
    pub unused: Duration,
    /// Sooner, the longest unused first, while less than this many bytes are
    /// free.
    pub free_bytes_min: u64,
    /// But never before they have been unused for so long.
    pub unused_min: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        let day = Duration::from_secs(86_400);
        Self { unused: day * 30, free_bytes_min: 4 << 30, unused_min: day }
    }
}

/// The images that may go now, in the order in which they should. One that is
/// pinned or in use is never among them, nor one of which nobody knows when it
/// was used: that is noted first.
pub fn surplus(images: &[Kept], policy: &Policy, now: Timestamp, free_bytes: u64) -> Vec<ImageDigest> {
    let mut idle: Vec<(Duration, &Kept)> = images
        .iter()
        .filter(|image| !image.pinned && !image.in_use)
        .filter_map(|image| Some((now.since(image.used?), image)))
        .collect();
    idle.sort_by_key(|(unused, image)| (std::cmp::Reverse(*unused), image.digest));
    let mut free = free_bytes;
    let mut gone = Vec::new();
    for (unused, image) in idle {
        let old = unused >= policy.unused;
        let pressed = free < policy.free_bytes_min && unused >= policy.unused_min;
        if old || pressed {
            free = free.saturating_add(image.bytes);
            gone.push(image.digest);
        }
    }
    gone
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::from_secs(100_000_000);
    const DAY: u64 = 86_400;

    fn image(id: u8, days: u64) -> Kept {
        Kept {
            digest: ImageDigest::from_bytes([id; 32]),
            pinned: false,
            in_use: false,
            used: Some(Timestamp::from_secs(100_000_000 - i64::try_from(days * DAY).unwrap())),
            bytes: 1 << 30,
        }
    }

    fn ids(images: &[Kept], free: u64) -> Vec<u8> {
        surplus(images, &Policy::default(), NOW, free).iter().map(|digest| digest.as_bytes()[0]).collect()
    }

    #[test]
    fn what_is_old_goes_and_under_pressure_what_is_younger_until_there_is_room() {
        let images = [image(1, 0), image(2, 5), image(3, 40), image(4, 10), image(5, 31)];
        assert_eq!(ids(&images, u64::MAX), [3, 5]);
        // One more makes three free, and the next four.
        assert_eq!(ids(&images, 1 << 30), [3, 5, 4]);
        assert_eq!(ids(&images, 0), [3, 5, 4, 2], "never what was used within a day");
    }

    #[test]
    fn what_is_pinned_in_use_or_unknown_stays() {
        let pinned = Kept { pinned: true, ..image(1, 400) };
        let used = Kept { in_use: true, ..image(2, 400) };
        let unknown = Kept { used: None, ..image(3, 400) };
        assert_eq!(ids(&[pinned, used, unknown], 0), [0_u8; 0]);
        // A clock that went back makes nothing old.
        let ahead = Kept { used: Some(NOW.plus(Duration::from_secs(DAY * 400))), ..image(4, 0) };
        assert_eq!(ids(&[ahead], 0), [0_u8; 0]);
    }

    proptest! {
        #[test]
        fn never_one_in_use_and_never_more_than_it_takes(
            facts in proptest::collection::vec((any::<bool>(), any::<bool>(), 0u64..60, 1u64..8), 0..20),
            free in 0u64..8,
        ) {
            let images: Vec<Kept> = facts.iter().enumerate().map(|(index, (pinned, in_use, days, gib))| Kept {
                pinned: *pinned, in_use: *in_use, bytes: gib << 30, ..image(index as u8, *days)
            }).collect();
            let policy = Policy::default();
            let gone = surplus(&images, &policy, NOW, free << 30);
            let of = |digest: &ImageDigest| images.iter().find(|image| image.digest == *digest).unwrap();
            let mut room = free << 30;
            for digest in &gone {
                let image = of(digest);
                prop_assert!(!image.pinned && !image.in_use);
                let unused = NOW.since(image.used.unwrap());
                prop_assert!(unused >= policy.unused || (room < policy.free_bytes_min && unused >= policy.unused_min));
                room += image.bytes;
            }
            // What is old is always gone.
            for image in &images {
                let old = NOW.since(image.used.unwrap()) >= policy.unused;
                prop_assert!(!old || image.pinned || image.in_use || gone.contains(&image.digest));
            }
        }
    }
}
