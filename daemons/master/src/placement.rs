//! Which host a new project goes to. Pure.

use cocalc_ids::{HostId, ImageDigest};

/// Below this much free space a host takes no new project.
const FREE_BYTES_MIN: u64 = 512 * 1024 * 1024;

/// What is known of a host when a project is placed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Candidate {
    /// Which host.
    pub host: HostId,
    /// Whether it was heard of within its lease.
    pub alive: bool,
    /// Whether an operator keeps new projects away from it.
    pub cordoned: bool,
    /// Whether it isolates projects from each other.
    pub isolation: bool,
    /// The images it has.
    pub images: Vec<ImageDigest>,
    /// Free bytes on its volume.
    pub free_bytes: u64,
    /// How many projects it has.
    pub projects: u64,
}

/// What a project needs of its host.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Needs {
    /// The image it must have; `None` for its default.
    pub image: Option<ImageDigest>,
    /// The limit of the project's volume.
    pub quota_bytes: Option<u64>,
    /// The only host that will do.
    pub only: Option<HostId>,
}

/// Why no host will do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NoPlace {
    /// There are no hosts, or not the one that was asked for.
    #[error("there is no such host")]
    NoHost,
    /// None of them is connected.
    #[error("no host is connected")]
    NotAlive,
    /// All that are connected are cordoned.
    #[error("every connected host is cordoned")]
    Cordoned,
    /// None has the image, nor could fetch it from one that has.
    #[error("no connected host has that image")]
    NoImage,
    /// None has space.
    #[error("no connected host has enough free space")]
    NoSpace,
}

/// Chooses a host: isolating ones first, then those that have the image, then
/// the one with the fewest
/// projects, then the most free space, then the lowest id, so that the same
/// facts always give the same answer. An operator who names a cordoned host
/// gets it.
///
/// # Errors
///
/// Says which requirement left nobody.
pub fn place(candidates: &[Candidate], needs: &Needs) -> Result<HostId, NoPlace> {
    let mut left: Vec<&Candidate> =
        candidates.iter().filter(|host| needs.only.is_none_or(|only| only == host.host)).collect();
    let mut keep = |reason: NoPlace, fits: &dyn Fn(&Candidate) -> bool| {
        left.retain(|host| fits(host));
        if left.is_empty() { Err(reason) } else { Ok(()) }
    };
    keep(NoPlace::NoHost, &|_| true)?;
    keep(NoPlace::NotAlive, &|host| host.alive)?;
    keep(NoPlace::Cordoned, &|host| !host.cordoned || needs.only.is_some())?;
    // Who has not got it can fetch it, from any that is connected, cordoned or
    // not.
    let has = |host: &Candidate| needs.image.is_none_or(|image| host.images.contains(&image));
    let somebody = candidates.iter().any(|host| host.alive && has(host));
    keep(NoPlace::NoImage, &|host| has(host) || (somebody && host.isolation))?;
    // A quota is a limit, not a reservation: hosts are overcommitted up to it.
    let space = FREE_BYTES_MIN.max(needs.quota_bytes.unwrap_or(0) / 10);
    keep(NoPlace::NoSpace, &|host| host.free_bytes >= space)?;
    left.into_iter()
        .min_by_key(|host| {
            (!host.isolation, !has(host), host.projects, std::cmp::Reverse(host.free_bytes), host.host)
        })
        .map(|host| host.host)
        .ok_or(NoPlace::NoHost)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidate(id: u8) -> Candidate {
        Candidate {
            host: HostId::from_bytes([id; 16]),
            alive: true,
            cordoned: false,
            isolation: true,
            images: vec![ImageDigest::from_bytes([1; 32])],
            free_bytes: 100 << 30,
            projects: 0,
        }
    }

    #[test]
    fn each_requirement_is_named_when_it_leaves_nobody() {
        let image = ImageDigest::from_bytes([9; 32]);
        let one = |change: fn(&mut Candidate), needs: Needs| {
            let mut host = candidate(1);
            change(&mut host);
            place(&[host], &needs)
        };
        let none = Needs::default();
        assert_eq!(place(&[], &none), Err(NoPlace::NoHost));
        assert_eq!(one(|host| host.alive = false, none), Err(NoPlace::NotAlive));
        assert_eq!(one(|host| host.cordoned = true, none), Err(NoPlace::Cordoned));
        assert_eq!(one(|_| (), Needs { image: Some(image), ..none }), Err(NoPlace::NoImage));
        assert_eq!(one(|host| host.free_bytes = 1, none), Err(NoPlace::NoSpace));
        let only = Needs { only: Some(HostId::from_bytes([1; 16])), ..none };
        assert!(one(|host| host.cordoned = true, only).is_ok());
    }

    #[test]
    fn a_host_that_has_the_image_is_preferred_and_another_may_fetch_it() {
        let image = ImageDigest::from_bytes([9; 32]);
        let needs = Needs { image: Some(image), ..Needs::default() };
        let mut has = Candidate { images: vec![image], projects: 50, ..candidate(2) };
        assert_eq!(
            place(&[candidate(1), has.clone()], &needs),
            Ok(has.host),
            "although it has more projects"
        );
        has.cordoned = true;
        assert_eq!(
            place(&[candidate(1), has.clone()], &needs),
            Ok(candidate(1).host),
            "it fetches the image"
        );
        let only = Needs { only: Some(candidate(1).host), ..needs };
        assert_eq!(place(&[candidate(1), has.clone()], &only), Ok(candidate(1).host));
        has.alive = false;
        assert_eq!(place(&[candidate(1), has], &needs), Err(NoPlace::NoImage), "nobody is there who has it");
    }

    proptest! {
        #[test]
        fn the_order_of_hosts_does_not_matter(
            facts in proptest::collection::vec((any::<bool>(), any::<bool>(), 0u64..4, 0u64..4), 0..8),
            turn in 0usize..8,
        ) {
            let mut hosts: Vec<Candidate> = facts
                .iter()
                .enumerate()
                .map(|(index, (alive, cordoned, projects, space))| Candidate {
                    alive: *alive,
                    cordoned: *cordoned,
                    projects: *projects,
                    free_bytes: space << 30,
                    ..candidate(index as u8)
                })
                .collect();
            let first = place(&hosts, &Needs::default());
            if let Ok(chosen) = first {
                let chosen = hosts.iter().find(|host| host.host == chosen).unwrap();
                prop_assert!(chosen.alive && !chosen.cordoned && chosen.free_bytes >= FREE_BYTES_MIN);
                let fewest = hosts
                    .iter()
                    .filter(|host| host.alive && !host.cordoned && host.free_bytes >= FREE_BYTES_MIN)
                    .map(|host| host.projects)
                    .min();
                prop_assert_eq!(Some(chosen.projects), fewest);
            }
            let middle = turn.min(hosts.len());
            hosts.rotate_left(middle);
            prop_assert_eq!(place(&hosts, &Needs::default()), first);
        }
    }
}
