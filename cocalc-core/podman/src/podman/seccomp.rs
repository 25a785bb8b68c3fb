//! The filter of system calls.
//!
//! `seccomp.json` is the default profile of containers/common, as Debian 12 has
//! it, for the architectures we run on and without `ioctl`, `socket` and
//! `socketcall`: their rules are made here.

use serde_json::{Value, json};

/// The requests that make Btrfs subvolumes and snapshots. Anybody who owns a
/// directory may make one, and it would escape the project's quota and be left
/// out of its snapshots.
const SUBVOLUME_REQUESTS: [u32; 4] = [0x5000_940e, 0x5000_9401, 0x5000_9417, 0x5000_9418];
/// The address family that leads to the hypervisor, past network namespaces and
/// firewall.
const AF_VSOCK: u32 = 40;

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
        rules.extend(all_but("socket", 0, &[AF_VSOCK], EAFNOSUPPORT));
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
    let arg = |(mask, value): (u32, u32)| json!([{ "index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ" }]);
    let allow = |pattern| json!({ "names": [call], "action": "SCMP_ACT_ALLOW", "args": arg(pattern) });
    let refuse = |value: &u32| {
        let args = arg((u32::MAX, *value));
        json!({ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args })
    };
    let mut patterns = Vec::new();
    differing(refused, 0, 0, &mut patterns);
    refused.iter().map(refuse).chain(patterns.into_iter().map(allow)).collect()
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
        assert!(!allows("socketcall") && !allows("kexec_load"));
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
