//! The filter of system calls.
//!
//! `seccomp.json` is the default profile of containers/common, as Debian 12 has
//! it, for the architectures we run on, with less in it: no mounts (root in a
//! project could not make any, and their calls are a large part of the kernel),
//! no keyrings, no log of the kernel's. The rules of `ioctl`, `socket`,
//! `socketcall`, `clone` and `unshare` are made here.

use serde_json::{Value, json};

/// The requests that make Btrfs subvolumes and snapshots. Anybody who owns a
/// directory may make one, and it would escape the project's quota and be left
/// out of its snapshots.
const SUBVOLUME_REQUESTS: [u32; 4] = [0x5000_940e, 0x5000_9401, 0x5000_9417, 0x5000_9418];
/// The families of sockets that there are: local ones, IPv4, IPv6, the kernel's
/// tables of them, and packets (for which no project has the capability). Others
/// lead past network namespaces and firewall, to the hypervisor for instance, or
/// into code that few people look at.
const FAMILIES: [u32; 5] = [1, 2, 10, 16, 17];
/// The flags by which `clone` and `unshare` make namespaces: in a user namespace
/// of its own, a process would be root over most of the kernel's interfaces.
/// What falls back without them goes on; sandboxes that need them, such as
/// rootless containers, do not run in projects. `clone3` has them behind a
/// pointer, where no filter sees them: the C library falls back to `clone`.
const NAMESPACES: [u32; 7] =
    [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
/// The flag for times, which `clone` has for something else.
const NEW_TIME: u32 = 0x80;

const EPERM: u32 = 1;
const EAFNOSUPPORT: u32 = 97;

/// The profile, for podman.
pub(crate) fn profile() -> Value {
    // The file is ours, and a test parses it.
    let mut profile: Value = serde_json::from_str(include_str!("seccomp.json")).unwrap_or_default();
    if let Some(rules) = profile["syscalls"].as_array_mut() {
        rules.extend(all_but("ioctl", 1, &SUBVOLUME_REQUESTS, EPERM));
        // Its arguments are behind a pointer, where no filter sees them. Only
        // 32-bit programs use it. Before `socket`: libseccomp makes each rule of
        // that one also for this, without the argument, where they contradict
        // each other unless all is decided.
        rules.push(json!({ "names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM }));
        rules.extend(only("socket", 0, &FAMILIES, EAFNOSUPPORT));
        rules.extend(no_flags("clone", 0, &NAMESPACES, EPERM));
        rules.extend(no_flags("unshare", 0, &[&NAMESPACES[..], &[NEW_TIME]].concat(), EPERM));
    }
    profile
}

/// Rules that allow a call unless the argument at `index` is one of `refused`.
///
/// The kernel looks at the argument's lower 32 bits only, so the filter must,
/// too; and of two rules that both match a call, which one counts depends on
/// their order. So what is allowed is spelled out: all that differ from the
/// refused values, by their first bits.
fn all_but(call: &str, index: u32, refused: &[u32], errno: u32) -> Vec<Value> {
    let mut patterns = Vec::new();
    differing(refused, 0, 0, &mut patterns);
    let refuse = refused.iter().map(|value| rule(call, index, (u32::MAX, *value), Some(errno)));
    refuse.chain(patterns.into_iter().map(|pattern| rule(call, index, pattern, None))).collect()
}

/// Rules that refuse a call unless the argument at `index` is one of `allowed`.
fn only(call: &str, index: u32, allowed: &[u32], errno: u32) -> Vec<Value> {
    let mut patterns = Vec::new();
    differing(allowed, 0, 0, &mut patterns);
    let allow = allowed.iter().map(|value| rule(call, index, (u32::MAX, *value), None));
    allow.chain(patterns.into_iter().map(|pattern| rule(call, index, pattern, Some(errno)))).collect()
}

/// Rules that allow a call unless the argument at `index` has one of `flags`.
fn no_flags(call: &str, index: u32, flags: &[u32], errno: u32) -> Vec<Value> {
    let none = rule(call, index, (flags.iter().fold(0, |all, flag| all | flag), 0), None);
    let refuse = flags.iter().map(|flag| rule(call, index, (*flag, *flag), Some(errno)));
    std::iter::once(none).chain(refuse).collect()
}

/// A rule for a call whose argument, under a mask, has a value.
fn rule(call: &str, index: u32, (mask, value): (u32, u32), errno: Option<u32>) -> Value {
    let args = json!([{ "index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" }]);
    match errno {
        None => json!({ "names": [call], "action": "SCMP_ACT_ALLOW", "args": args }),
        Some(errno) => {
            json!({ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args })
        }
    }
}

/// Collects, as mask and value, what begins with the first `bits` of `prefix`
/// and is none of `values`.
fn differing(values: &[u32], prefix: u32, bits: u32, patterns: &mut Vec<(u32, u32)>) {
    let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
    if values.iter().all(|value| value & mask != prefix) {
        patterns.push((mask, prefix));
    } else if bits < 32 {
        differing(values, prefix, bits + 1, patterns);
        differing(values, prefix | (1 << (31 - bits)), bits + 1, patterns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_parses_and_refuses_by_default() {
        let profile = profile();
        assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
        let rules = profile["syscalls"].as_array().unwrap();
        let allows = |name: &str| {
            rules.iter().any(|rule| {
                rule["action"] == "SCMP_ACT_ALLOW"
                    && rule["names"].as_array().unwrap().iter().any(|other| other == name)
            })
        };
        assert!(allows("openat") && allows("ioctl") && allows("socket"));
        for refused in ["socketcall", "kexec_load", "mount", "keyctl", "clone3", "io_uring_setup", "syslog"] {
            assert!(!allows(refused), "{refused}");
        }
    }

    #[test]
    fn patterns_match_everything_but_the_refused_values_once() {
        let mut patterns = Vec::new();
        differing(&SUBVOLUME_REQUESTS, 0, 0, &mut patterns);
        let matching = |value: u32| patterns.iter().filter(|(mask, want)| value & mask == *want).count();
        for refused in SUBVOLUME_REQUESTS {
            assert_eq!(matching(refused), 0);
            for bit in 0..32 {
                let near = refused ^ (1 << bit);
                assert_eq!(matching(near), usize::from(!SUBVOLUME_REQUESTS.contains(&near)), "{near:#x}");
            }
        }
        for value in (0..=u32::MAX).step_by(65_521) {
            assert_eq!(matching(value), usize::from(!SUBVOLUME_REQUESTS.contains(&value)), "{value:#x}");
        }
    }
}
