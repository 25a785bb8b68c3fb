//! The modes of a terminal, as SSH says them (RFC 4254, section 8), given to the
//! kernel: numbers of asm-generic/termbits.h, which x86-64 and Arm share.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use crate::sys::{self, Termios};

/// What SSH says for a character that does nothing, and what the kernel has.
const DISABLED: (u32, u8) = (255, 0);
/// That a line that is shown ends with a return.
const ONLCR: u32 = 0o4;
/// How long a runtime may take to have a terminal as it wants it.
const RUNTIME_LIMIT: Duration = Duration::from_secs(2);
/// The bits of the speed.
const SPEED_BITS: u32 = 0o010_017;

/// The control characters: the opcode, and the place among the kernel's.
const CHARACTERS: [(u8, usize); 15] = [
    (1, 0),   // VINTR
    (2, 1),   // VQUIT
    (3, 2),   // VERASE
    (4, 3),   // VKILL
    (5, 4),   // VEOF
    (6, 11),  // VEOL
    (7, 16),  // VEOL2
    (8, 8),   // VSTART
    (9, 9),   // VSTOP
    (10, 10), // VSUSP
    (12, 12), // VREPRINT
    (13, 14), // VWERASE
    (14, 15), // VLNEXT
    (16, 7),  // VSWTCH
    (18, 13), // VDISCARD
];
const INPUT: [(u8, u32); 13] = [
    (30, 0o4),     // IGNPAR
    (31, 0o10),    // PARMRK
    (32, 0o20),    // INPCK
    (33, 0o40),    // ISTRIP
    (34, 0o100),   // INLCR
    (35, 0o200),   // IGNCR
    (36, 0o400),   // ICRNL
    (37, 0o1000),  // IUCLC
    (38, 0o2000),  // IXON
    (39, 0o4000),  // IXANY
    (40, 0o10000), // IXOFF
    (41, 0o20000), // IMAXBEL
    (42, 0o40000), // IUTF8
];
const LOCAL: [(u8, u32); 13] = [
    (50, 0o1),       // ISIG
    (51, 0o2),       // ICANON
    (52, 0o4),       // XCASE
    (53, 0o10),      // ECHO
    (54, 0o20),      // ECHOE
    (55, 0o40),      // ECHOK
    (56, 0o100),     // ECHONL
    (57, 0o200),     // NOFLSH
    (58, 0o400),     // TOSTOP
    (59, 0o100_000), // IEXTEN
    (60, 0o1000),    // ECHOCTL
    (61, 0o4000),    // ECHOKE
    (62, 0o40000),   // PENDIN
];
const OUTPUT: [(u8, u32); 6] = [
    (70, 0o1),   // OPOST
    (71, 0o2),   // OLCUC
    (72, ONLCR), // ONLCR
    (73, 0o10),  // OCRNL
    (74, 0o20),  // ONOCR
    (75, 0o40),  // ONLRET
];
const CONTROL: [(u8, u32); 4] = [
    (90, 0o40),   // CS7
    (91, 0o60),   // CS8
    (92, 0o400),  // PARENB
    (93, 0o1000), // PARODD
];
/// The speed of input, and of output: a terminal of Linux has one for both.
const SPEEDS: [u8; 2] = [128, 129];
const BAUDS: [(u32, u32); 31] = [
    (0, 0o0),
    (50, 0o1),
    (75, 0o2),
    (110, 0o3),
    (134, 0o4),
    (150, 0o5),
    (200, 0o6),
    (300, 0o7),
    (600, 0o10),
    (1200, 0o11),
    (1800, 0o12),
    (2400, 0o13),
    (4800, 0o14),
    (9600, 0o15),
    (19200, 0o16),
    (38400, 0o17),
    (57600, 0o10001),
    (115_200, 0o10002),
    (230_400, 0o10003),
    (460_800, 0o10004),
    (500_000, 0o10005),
    (576_000, 0o10006),
    (921_600, 0o10007),
    (1_000_000, 0o10010),
    (1_152_000, 0o10011),
    (1_500_000, 0o10012),
    (2_000_000, 0o10013),
    (2_500_000, 0o10014),
    (3_000_000, 0o10015),
    (3_500_000, 0o10016),
    (4_000_000, 0o10017),
];

/// Has a terminal that a container runtime has made as every new one is. runc takes
/// the returns from it, from outside and at the same time, and puts them into its own
/// user's terminal: there they would come into what programs show that know what they
/// do. So this waits until it has, and undoes it. One that does not is not waited for
/// long.
pub(crate) fn await_runtime(terminal: &File) {
    let begun = Instant::now();
    loop {
        match sys::modes(terminal) {
            Some(mut has) if has.output & ONLCR == 0 => {
                has.output |= ONLCR;
                return sys::set_modes(terminal, &has);
            }
            Some(_) if begun.elapsed() < RUNTIME_LIMIT => std::thread::sleep(Duration::from_millis(1)),
            _ => return,
        }
    }
}

/// Reads modes from a command line, as `53=0,1=3`. What makes no sense is left out.
pub(crate) fn parse(modes: &str) -> Vec<(u8, u32)> {
    let one = |text: &str| {
        let (code, value) = text.split_once('=')?;
        Some((code.parse().ok()?, value.parse().ok()?))
    };
    modes.split(',').filter_map(one).collect()
}

/// Gives a terminal the modes that somebody asks for. What is unknown, or cannot
/// be, is left as it is: a terminal that is not quite as wished is better than none.
pub(crate) fn set_modes(terminal: &File, modes: &[(u8, u32)]) {
    if modes.is_empty() {
        return;
    }
    if let Some(mut has) = sys::modes(terminal) {
        for (code, value) in modes {
            set(&mut has, *code, *value);
        }
        sys::set_modes(terminal, &has);
    }
}

fn set(modes: &mut Termios, code: u8, value: u32) {
    if let Some((_, place)) = CHARACTERS.iter().find(|(known, _)| *known == code) {
        let character = if value == DISABLED.0 { Some(DISABLED.1) } else { u8::try_from(value).ok() };
        if let (Some(slot), Some(character)) = (modes.characters.get_mut(*place), character) {
            *slot = character;
        }
        return;
    }
    if SPEEDS.contains(&code) {
        if let Some((_, bits)) = BAUDS.iter().find(|(baud, _)| *baud == value) {
            modes.control = modes.control & !SPEED_BITS | bits;
        }
        return;
    }
    let groups: [(&[(u8, u32)], &mut u32); 4] = [
        (&INPUT, &mut modes.input),
        (&LOCAL, &mut modes.local),
        (&OUTPUT, &mut modes.output),
        (&CONTROL, &mut modes.control),
    ];
    for (known, flags) in groups {
        if let Some((_, bits)) = known.iter().find(|(known, _)| *known == code) {
            *flags = if value == 0 { *flags & !bits } else { *flags | bits };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_set_in_a_real_terminal_and_unknown_ones_left() {
        let (_master, slave) = sys::open_pty().unwrap();
        let new = sys::modes(&slave).unwrap();
        // What nobody knows changes nothing, however much of it there is.
        let unknown: Vec<(u8, u32)> =
            (0..=255).filter(|code| !is_known(*code)).map(|code| (code, 1)).collect();
        assert_eq!(unknown.len(), 256 - 53);
        set_modes(&slave, &unknown);
        set_modes(&slave, &[(129, 12_345), (128, u32::MAX), (1, 70_000)]);
        assert_eq!(sys::modes(&slave).unwrap(), new);
        set_modes(&slave, &[(1, 7), (3, 255), (53, 0), (36, 0), (72, 0), (128, 9600), (129, 115_200)]);
        let now = sys::modes(&slave).unwrap();
        assert_eq!((now.characters[0], now.characters[2]), (7, 0));
        assert_eq!((now.local & 0o10, now.input & 0o400, now.output & 0o4), (0, 0, 0));
        assert_eq!(now.control & SPEED_BITS, 0o10002);
        set_modes(&slave, &[(53, 1), (36, 1), (72, 1)]);
        let now = sys::modes(&slave).unwrap();
        assert_eq!((now.local, now.input, now.output), (new.local, new.input, new.output));
    }

    #[test]
    fn what_a_runtime_takes_from_a_terminal_is_given_back_and_what_is_asked_for_counts() {
        let (master, slave) = sys::open_pty().unwrap();
        let new = sys::modes(&slave).unwrap();
        let runtime = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            let mut has = sys::modes(&master).unwrap();
            has.output &= !ONLCR;
            sys::set_modes(&master, &has);
            master
        });
        await_runtime(&slave);
        let _master = runtime.join().unwrap();
        assert_eq!(sys::modes(&slave).unwrap(), new);
        set_modes(&slave, &parse("72=0,x=1,,53=0,1=7,3=,999=1,2=99999999999"));
        let now = sys::modes(&slave).unwrap();
        assert_eq!((now.output & ONLCR, now.local & 0o10, now.characters[0]), (0, 0, 7));
        assert_eq!(now.characters[1..], new.characters[1..]);
        assert_eq!(parse(""), []);
    }

    fn is_known(code: u8) -> bool {
        let flags = INPUT.iter().chain(&LOCAL).chain(&OUTPUT).chain(&CONTROL);
        CHARACTERS.iter().any(|(known, _)| *known == code)
            || SPEEDS.contains(&code)
            || flags.map(|(known, _)| known).any(|known| *known == code)
    }
}
