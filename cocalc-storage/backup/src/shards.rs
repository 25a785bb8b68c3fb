//! Which repository a project shares with which others.

use std::collections::BTreeMap;

use cocalc_core::ids::ProjectId;
use serde::{Deserialize, Serialize};

use crate::name::ShardId;

/// Assigns projects to shards, and remembers where each is.
///
/// A project stays where it is for as long as it has backups. A shard that has
/// been given its number of projects is sealed: it takes no more, even when some
/// are erased, so that reading its index and pruning it stay bounded.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Shards {
    projects_max: u32,
    /// How many projects each shard was ever given.
    given: Vec<u32>,
    of: BTreeMap<ProjectId, ShardId>,
}

/// What is known of shards contradicts itself.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardsError {
    /// There is no room in any shard.
    #[error("a shard of no projects")]
    NoRoom,
    /// A project is in a shard that there is not, or that has too many.
    #[error("project {0} is in a shard that cannot have it")]
    Misplaced(ProjectId),
}

impl Shards {
    /// How many projects a shard gets, unless something else was said.
    pub const PROJECTS_MAX: u32 = 500;

    /// None yet; each is sealed at `projects_max` projects.
    ///
    /// # Errors
    ///
    /// If that is none.
    pub fn new(projects_max: u32) -> Result<Self, ShardsError> {
        if projects_max == 0 {
            return Err(ShardsError::NoRoom);
        }
        Ok(Self { projects_max, given: Vec::new(), of: BTreeMap::new() })
    }

    /// Checks what was read from a disk.
    ///
    /// # Errors
    ///
    /// If it contradicts itself.
    pub fn checked(self) -> Result<Self, ShardsError> {
        if self.projects_max == 0 {
            return Err(ShardsError::NoRoom);
        }
        let mut here = vec![0_u32; self.given.len()];
        for (project, shard) in &self.of {
            let known = usize::try_from(shard.0).ok().filter(|index| *index < here.len());
            let Some(index) = known else { return Err(ShardsError::Misplaced(*project)) };
            here[index] += 1;
            if here[index] > self.given[index] {
                return Err(ShardsError::Misplaced(*project));
            }
        }
        Ok(self)
    }

    /// Changes at how many projects a shard is sealed from now on. One that has
    /// more already is sealed.
    ///
    /// # Errors
    ///
    /// If that is none.
    pub fn seal_at(&mut self, projects_max: u32) -> Result<(), ShardsError> {
        if projects_max == 0 {
            return Err(ShardsError::NoRoom);
        }
        self.projects_max = projects_max;
        Ok(())
    }

    /// Where the project is.
    pub fn of(&self, project: ProjectId) -> Option<ShardId> {
        self.of.get(&project).copied()
    }

    /// Where the project would be put now: the first shard that is not sealed, or
    /// the next new one.
    pub fn next(&self) -> ShardId {
        let open = self.given.iter().position(|given| *given < self.projects_max);
        // There are no more shards than projects, and each takes bytes.
        ShardId(u32::try_from(open.unwrap_or(self.given.len())).unwrap_or(u32::MAX))
    }

    /// Where the project is from now on. Keep that before anything is stored.
    pub fn assign(&mut self, project: ProjectId) -> ShardId {
        if let Some(shard) = self.of(project) {
            return shard;
        }
        let shard = self.next();
        let index = shard.0 as usize;
        if index == self.given.len() {
            self.given.push(0);
        }
        if let Some(given) = self.given.get_mut(index) {
            *given += 1;
        }
        self.of.insert(project, shard);
        shard
    }

    /// Takes note that the project's backups are erased. Its room is not given
    /// to another.
    pub fn erased(&mut self, project: ProjectId) -> Option<ShardId> {
        self.of.remove(&project)
    }

    /// Whether the shard takes no more projects.
    pub fn is_sealed(&self, shard: ShardId) -> bool {
        self.given.get(shard.0 as usize).is_some_and(|given| *given >= self.projects_max)
    }

    /// The projects that have backups in a shard.
    pub fn projects(&self, shard: ShardId) -> impl Iterator<Item = ProjectId> + '_ {
        self.of.iter().filter(move |(_, of)| **of == shard).map(|(project, _)| *project)
    }

    /// All shards.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + '_ {
        (0..).zip(&self.given).map(|(number, _)| ShardId(number))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Assign(u8),
        Erase(u8),
        Reload,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => any::<u8>().prop_map(Step::Assign),
            3 => any::<u8>().prop_map(Step::Erase),
            1 => Just(Step::Reload),
        ]
    }

    fn project(number: u8) -> ProjectId {
        format!("00000000-0000-4000-8000-0000000000{number:02x}").parse().unwrap()
    }

    proptest! {
        #[test]
        fn projects_stay_and_sealed_shards_take_no_more(
            projects_max in 1_u32..6,
            steps in proptest::collection::vec(step(), 0..300),
        ) {
            let mut shards = Shards::new(projects_max).unwrap();
            let mut model: HashMap<u8, ShardId> = HashMap::new();
            let mut ever: HashMap<ShardId, u32> = HashMap::new();
            for step in steps {
                match step {
                    Step::Assign(number) => {
                        let would = shards.of(project(number)).unwrap_or(shards.next());
                        let shard = shards.assign(project(number));
                        prop_assert_eq!(shard, would);
                        match model.get(&number) {
                            Some(there) => prop_assert_eq!(*there, shard, "it moved"),
                            None => {
                                let given = ever.entry(shard).or_default();
                                *given += 1;
                                prop_assert!(*given <= projects_max, "{shard:?} got {given}");
                                model.insert(number, shard);
                            }
                        }
                    }
                    Step::Erase(number) => {
                        prop_assert_eq!(shards.erased(project(number)), model.remove(&number));
                    }
                    Step::Reload => {
                        let text = serde_json::to_string(&shards).unwrap();
                        let again: Shards = serde_json::from_str(&text).unwrap();
                        prop_assert_eq!(again.checked().unwrap(), shards.clone());
                    }
                }
                // At most one is not sealed, so that each holds as many as it may.
                prop_assert!(shards.shards().filter(|shard| !shards.is_sealed(*shard)).count() <= 1);
                let listed: usize = shards.shards().map(|shard| shards.projects(shard).count()).sum();
                prop_assert_eq!(listed, model.len());
            }
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        assert_eq!(Shards::new(0), Err(ShardsError::NoRoom));
        let mut shards = Shards::new(2).unwrap();
        shards.assign(project(1));
        shards.of.insert(project(2), ShardId(9));
        assert_eq!(shards.clone().checked(), Err(ShardsError::Misplaced(project(2))));
        shards.of.insert(project(2), ShardId(0));
        assert!(shards.checked().is_err(), "it was given to one project only");
    }
}
