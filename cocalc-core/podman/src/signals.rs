//! Signals by their POSIX names.

/// Linux numbers, the same on every architecture this runs on (x86-64, ARM).
const SIGNALS: [(&str, u8); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The number of a signal, by its name without `SIG`.
pub(crate) fn number(name: &str) -> Option<u8> {
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// The name of a signal, without `SIG`.
pub(crate) fn name(number: u8) -> String {
    SIGNALS
        .iter()
        .find(|(_, known)| *known == number)
        .map_or_else(|| format!("{number}"), |(name, _)| (*name).into())
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_and_numbers_agree() {
        assert_eq!(super::number("TERM"), Some(15));
        assert_eq!(super::number("SIGTERM"), None);
        assert_eq!(super::name(9), "KILL");
        assert_eq!(super::name(40), "40");
    }
}
