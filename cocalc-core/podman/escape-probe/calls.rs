//! System calls that a project may not make.

use std::process::{Command, Stdio};

use crate::{
    Report,
    sys::{self, Call, EAFNOSUPPORT, ENOSYS, EPERM},
};

/// An address that nothing is mapped at.
const NOWHERE: u64 = 8;

/// Each call with arguments that the kernel itself refuses for another reason
/// (`EFAULT`, `EBADF`, `EINVAL`), or that do nothing.
#[rustfmt::skip]
const DENIED: [(&str, Call, [u64; 6]); 45] = [
    ("bpf", Call(321, 280), [9999, NOWHERE, 8, 0, 0, 0]),
    ("keyctl", Call(250, 219), [0, -3_i64 as u64, 0, 0, 0, 0]),
    ("add_key", Call(248, 217), [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("request_key", Call(249, 218), [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("userfaultfd", Call(323, 282), [1, 0, 0, 0, 0, 0]),
    ("perf_event_open", Call(298, 241), [NOWHERE, 0, 0, 0, 0, 0]),
    ("io_uring_setup", Call(425, 425), [1, NOWHERE, 0, 0, 0, 0]),
    ("io_uring_enter", Call(426, 426), [u64::MAX, 0, 0, 0, 0, 0]),
    ("io_uring_register", Call(427, 427), [u64::MAX, 0, 0, 0, 0, 0]),
    ("mount", Call(165, 40), [NOWHERE, NOWHERE, NOWHERE, 0, 0, 0]),
    ("umount2", Call(166, 39), [NOWHERE, 0, 0, 0, 0, 0]),
    ("pivot_root", Call(155, 41), [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("fsopen", Call(430, 430), [NOWHERE, 0, 0, 0, 0, 0]),
    ("fsconfig", Call(431, 431), [u64::MAX, 0, 0, 0, 0, 0]),
    ("fsmount", Call(432, 432), [u64::MAX, 0, 0, 0, 0, 0]),
    ("fspick", Call(433, 433), [u64::MAX, NOWHERE, 0, 0, 0, 0]),
    ("open_tree", Call(428, 428), [u64::MAX, NOWHERE, 0, 0, 0, 0]),
    ("move_mount", Call(429, 429), [u64::MAX, NOWHERE, u64::MAX, NOWHERE, 0, 0]),
    ("mount_setattr", Call(442, 442), [u64::MAX, NOWHERE, 0, NOWHERE, 32, 0]),
    ("setns", Call(308, 268), [u64::MAX, 0, 0, 0, 0, 0]),
    ("open_by_handle_at", Call(304, 265), [u64::MAX, NOWHERE, 0, 0, 0, 0]),
    ("kexec_load", Call(246, 104), [0, 99_999, NOWHERE, 0, 0, 0]),
    ("kexec_file_load", Call(320, 294), [u64::MAX, u64::MAX, 0, NOWHERE, 99, 0]),
    ("init_module", Call(175, 105), [NOWHERE, 0, NOWHERE, 0, 0, 0]),
    ("finit_module", Call(313, 273), [u64::MAX, NOWHERE, 0, 0, 0, 0]),
    ("delete_module", Call(176, 106), [NOWHERE, 0, 0, 0, 0, 0]),
    ("swapon", Call(167, 224), [NOWHERE, 0, 0, 0, 0, 0]),
    ("swapoff", Call(168, 225), [NOWHERE, 0, 0, 0, 0, 0]),
    ("acct", Call(163, 89), [NOWHERE, 0, 0, 0, 0, 0]),
    ("quotactl", Call(179, 60), [0xffff_ffff, NOWHERE, 0, 0, 0, 0]),
    ("quotactl_fd", Call(443, 443), [u64::MAX, 0xffff_ffff, 0, 0, 0, 0]),
    ("syslog", Call(103, 116), [10, 0, 0, 0, 0, 0]),
    ("sethostname", Call(170, 161), [NOWHERE, 8, 0, 0, 0, 0]),
    ("setdomainname", Call(171, 162), [NOWHERE, 8, 0, 0, 0, 0]),
    ("clock_settime", Call(227, 112), [0, NOWHERE, 0, 0, 0, 0]),
    ("settimeofday", Call(164, 170), [NOWHERE, 0, 0, 0, 0, 0]),
    ("reboot", Call(169, 142), [0, 0, 0, 0, 0, 0]),
    ("fanotify_init", Call(300, 262), [u64::MAX, u64::MAX, 0, 0, 0, 0]),
    ("vmsplice", Call(278, 75), [u64::MAX, NOWHERE, 1, 0, 0, 0]),
    ("move_pages", Call(279, 239), [0, 1, NOWHERE, 0, NOWHERE, 0]),
    ("kcmp", Call(312, 272), [0, 0, 99, 0, 0, 0]),
    ("clone3", Call(435, 435), [NOWHERE, 0, 0, 0, 0, 0]),
    ("statmount", Call(457, 457), [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("listmount", Call(458, 458), [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("lsm_set_self_attr", Call(460, 460), [99, NOWHERE, 0, 0, 0, 0]),
];

/// File systems whose mounts lead somewhere, or whose code is large.
const FILESYSTEMS: [&str; 8] = ["proc", "sysfs", "cgroup", "cgroup2", "overlay", "tmpfs", "btrfs", "devpts"];

/// Families of sockets beyond those that everybody uses.
const FAMILIES: [(&str, u64); 8] = [
    ("vsock", 40),
    ("alg", 38),
    ("tipc", 30),
    ("rds", 21),
    ("key", 15),
    ("can", 29),
    ("xdp", 44),
    ("bluetooth", 31),
];

const CLONE_NEWUSER: u64 = 0x1000_0000;

pub(crate) fn check(report: &mut Report) {
    for (name, number, args) in DENIED {
        let result = sys::call(number, args);
        if let Ok(fd) = result
            && fd > 2
        {
            sys::close(fd);
        }
        let ok = matches!(result, Err(EPERM | ENOSYS));
        report.note(&format!("call {name}"), ok, shown(result.map(drop)));
    }
    for name in FILESYSTEMS {
        let result = sys::fsopen(name);
        if let Ok(fd) = result {
            sys::close(fd.into());
        }
        report.note(&format!("file system {name}"), result.is_err(), shown(result.map(drop)));
    }
    for (name, family) in FAMILIES {
        // As a raw, a datagram and a sequenced socket: families differ.
        let results = [1, 2, 3, 5].map(|kind| sys::call(Call(41, 198), [family, kind, 0, 0, 0, 0]));
        for fd in results.into_iter().flatten() {
            sys::close(fd);
        }
        let ok = results.iter().all(|result| matches!(result, Err(EPERM | EAFNOSUPPORT)));
        report.note(&format!("socket {name}"), ok, format!("{results:?}"));
    }
    for (name, family, kind, protocol) in [("raw", 2, 3, 1), ("packet", 17, 3, 0x0300)] {
        let result = sys::call(Call(41, 198), [family, kind, protocol, 0, 0, 0]);
        if let Ok(fd) = result {
            sys::close(fd);
        }
        report.note(&format!("socket {name}"), result.is_err(), shown(result.map(drop)));
    }
    // In a child: nested namespaces bring capabilities over much of the kernel.
    let child = Command::new("/proc/self/exe").arg("--try-unshare").stdout(Stdio::null()).status();
    let refused = child.as_ref().is_ok_and(|status| status.code() == Some(EPERM));
    report.note("user namespace", refused, format!("{child:?}"));
}

/// Tries to make a user namespace: the error, or 0.
pub(crate) fn unshare_child() -> i32 {
    match sys::call(Call(272, 97), [CLONE_NEWUSER, 0, 0, 0, 0, 0]) {
        Ok(_) => 0,
        Err(error) => error,
    }
}

fn shown(result: Result<(), i32>) -> String {
    match result {
        Ok(()) => "it was done".into(),
        Err(EPERM) => "EPERM".into(),
        Err(ENOSYS) => "ENOSYS".into(),
        Err(error) => std::io::Error::from_raw_os_error(error).to_string(),
    }
}
