//! How a container ended, in words.

use crate::oom::Whose;

/// The exit code of a first process that was killed.
const KILLED: i32 = 128 + 9;

/// What podman knows of the end of a first process.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Exit {
    pub(crate) code: i32,
    /// What the runtime complained of; empty if of nothing.
    pub(crate) complaint: String,
    /// Whether the container's memory was used up, at any time.
    pub(crate) memory_used_up: bool,
}

/// What is known of the processes of a container that were killed for memory.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Kills {
    /// How many were counted.
    pub(crate) counted: u64,
    /// Whether there were more, which nobody could count any more.
    pub(crate) more: bool,
}

/// All that is known of an end.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct End {
    /// `None` if podman does not say.
    pub(crate) exit: Option<Exit>,
    /// Whether the kernel says that it killed the first process for memory; `None`
    /// if it does not tell.
    pub(crate) victim: Option<Option<Whose>>,
    pub(crate) kills: Kills,
}

impl End {
    /// The reason, for people.
    pub(crate) fn words(&self) -> String {
        let exit = self.exit.clone().unwrap_or_default();
        let used_up = exit.memory_used_up || self.kills.more || self.kills.counted > 0;
        match self.victim {
            Some(Some(Whose::Group)) => return "killed because its memory was used up".into(),
            Some(Some(Whose::Machine)) => {
                return "killed because the memory of the whole machine was used up".into();
            }
            // What can be guessed: the same is seen where only others were killed, and
            // the first process later and for another reason.
            None if used_up && exit.code == KILLED => return "killed because its memory was used up".into(),
            None | Some(None) => {}
        }
        let first = match &self.exit {
            None => "its first process ended".to_owned(),
            Some(_) if !exit.complaint.is_empty() => exit.complaint,
            Some(_) => format!("its first process ended with code {}", exit.code),
        };
        first + &if used_up { self.kills.words() } else { String::new() }
    }
}

impl Kills {
    /// What adds to the reason of an end, of one whose memory was used up.
    fn words(self) -> String {
        let killed = match (self.counted, self.more) {
            (1, false) => "a process".to_owned(),
            (2.., false) => format!("{} processes", self.counted),
            (1.., true) => format!("at least {} processes", self.counted.saturating_add(1)),
            (0, _) => "at least one process".to_owned(),
        };
        format!("; before that its memory was used up, and {killed} killed for it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_put_down_to_memory_only_if_it_was() {
        let exit = |code, memory_used_up| Some(Exit { code, memory_used_up, ..Exit::default() });
        let kills = |counted, more| Kills { counted, more };
        let words = |exit, victim, kills| End { exit, victim, kills }.words();
        let none = Kills::default();
        // The kernel says so, whatever podman has missed.
        for exit in [None, exit(137, false), exit(137, true), exit(0, false)] {
            let said = words(exit, Some(Some(Whose::Group)), none);
            assert_eq!(said, "killed because its memory was used up");
        }
        let said = words(exit(137, false), Some(Some(Whose::Machine)), none);
        assert_eq!(said, "killed because the memory of the whole machine was used up");
        // Killed for another reason, after or without others that were killed for memory.
        let plain = "its first process ended with code 137";
        let before = "; before that its memory was used up, and";
        assert_eq!(words(exit(137, false), Some(None), none), plain);
        assert_eq!(
            words(exit(137, true), Some(None), none),
            format!("{plain}{before} at least one process killed for it")
        );
        assert_eq!(
            words(exit(137, true), Some(None), kills(1, false)),
            format!("{plain}{before} a process killed for it")
        );
        assert_eq!(
            words(exit(137, true), Some(None), kills(3, true)),
            format!("{plain}{before} at least 4 processes killed for it")
        );
        assert_eq!(
            words(None, Some(None), kills(2, false)),
            format!("its first process ended{before} 2 processes killed for it")
        );
        // Who cannot read the kernel's log takes what is likely.
        assert_eq!(words(exit(137, true), None, none), "killed because its memory was used up");
        assert_eq!(words(exit(137, false), None, kills(0, true)), "killed because its memory was used up");
        assert_eq!(words(exit(137, false), None, none), plain);
        assert_eq!(
            words(exit(1, true), None, kills(1, false)),
            format!("its first process ended with code 1{before} a process killed for it")
        );
        let complaint = Some(Exit { complaint: "no such file".into(), ..Exit::default() });
        assert_eq!(words(complaint, Some(None), none), "no such file");
    }
}
