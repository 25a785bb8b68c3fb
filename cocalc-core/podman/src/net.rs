//! One network namespace per project, with a way out and no way aside.
//!
//! Each project has one address, on its own cable (a veth pair) to the host.
//! What arrives from a cable and is meant for the host itself, for another
//! project of any runner on this machine, for a link-local or private network,
//! or for what the project's policy does not allow is dropped by an nftables
//! table of this runner; the rest is masqueraded and goes out. Only IPv4 does.
//! Ports of a project are reached by sockets made inside its namespace, never
//! over the cable; so is its resolver.

mod dns;
mod rules;
mod sockets;

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use cocalc_core::{ids::ProjectId, runner::NetworkPolicy};
use serde::{Deserialize, Serialize};

use self::rules::Rules;
use crate::{
    command::{CommandError, run_blocking},
    kernel, mounts,
};

pub(crate) use dns::{ADDRESS as RESOLVER, QUESTIONS_PER_SEC, Resolver, Servers};
pub(crate) use sockets::Sockets;

/// The beginning of every cable's name on the host, whichever runner made it.
const CABLE: &str = "cc";
/// What bounds every project of a runner, whatever its own policy says.
/// Networks of IPv6 are of no use: only IPv4 leaves a project.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Fences {
    /// Private networks that projects may reach all the same. Link-local ones
    /// (`169.254.0.0/16`) never.
    pub allow: Vec<cocalc_core::runner::Network>,
    /// What else no project may reach.
    pub deny: Vec<cocalc_core::runner::Network>,
}

/// Why a network could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetError {
    #[error("could not {what}")]
    Io { what: &'static str, source: io::Error },
    #[error("could not {what}")]
    Tool { what: &'static str, source: CommandError },
    #[error("slot {slot} is beyond the runner's {slots} addresses")]
    Slot { slot: u32, slots: u32 },
}

/// The network of one runner.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// Six hexadecimal digits that tell this runner's cables and table apart.
    tag: String,
    fences: Fences,
    /// The gateway's address; projects have the following ones.
    first: Ipv4Addr,
    slots: u32,
    directory: PathBuf,
}

impl Network {
    pub(crate) fn new(tag: String, fences: Fences, first: Ipv4Addr, slots: u32, directory: PathBuf) -> Self {
        Self { tag, fences, first, slots, directory }
    }

    /// Makes the table of rules, replacing a former one, with the policies of the
    /// projects that are there. Blocks.
    pub(crate) fn open(&self) -> Result<(), NetError> {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .map_err(|source| NetError::Io { what: "turn on forwarding", source })?;
        let listing =
            fs::read_dir(&self.directory).map_err(|source| NetError::Io { what: "list networks", source })?;
        let kept: Vec<Kept> = listing
            .filter_map(|entry| entry.ok()?.path().to_str()?.strip_suffix(POLICY).map(PathBuf::from))
            .filter_map(|path| self.kept(&path))
            .collect();
        let policies = kept.iter().map(|kept| (kept.slot, &kept.policy));
        nft(&self.rules().table(policies), "set the firewall")
    }

    fn rules(&self) -> Rules<'_> {
        let pool = (self.first, self.address(self.slots.saturating_sub(1)));
        Rules { tag: &self.tag, pool, fences: &self.fences }
    }

    /// What tells this runner's cables and table apart.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// The policy that is in force for a project.
    pub(crate) fn policy(&self, project: ProjectId) -> NetworkPolicy {
        self.kept(&self.path(project)).map_or(NetworkPolicy::Full, |kept| kept.policy)
    }

    /// The policy that is in force for the namespace held at `path`.
    fn kept(&self, path: &Path) -> Option<Kept> {
        serde_json::from_slice(&fs::read(policy_file(path)).ok()?).ok()
    }

    /// Where the namespace of a project is held.
    pub(crate) fn path(&self, project: ProjectId) -> PathBuf {
        self.directory.join(project.to_string())
    }

    /// Makes the namespace, the cable and the rules of a project, unless they are
    /// there. Blocks.
    pub(crate) fn create(
        &self,
        project: ProjectId,
        slot: u32,
        policy: &NetworkPolicy,
    ) -> Result<(), NetError> {
        let io = |what| move |source| NetError::Io { what, source };
        if slot >= self.slots {
            return Err(NetError::Slot { slot, slots: self.slots });
        }
        let path = self.path(project);
        let connected = *policy != NetworkPolicy::None;
        let same = self.policy(project) == *policy;
        if is_namespace(&path) && connected == self.cable_exists(slot) && same {
            return Ok(());
        }
        self.remove(project, Some(slot))?;
        fs::File::create(&path).map_err(io("hold a network namespace"))?;
        let made = std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, || self.create_here(&path, slot, connected))
                .map_err(io("start a thread"))?
                .join()
                .unwrap_or_else(|_| Err(io("run a thread")(io::Error::other("it failed"))))
        })
        // Its rules are there before anything comes over its cable.
        .and_then(|()| self.enforce(&path, slot, policy))
        .and_then(|()| if connected { self.connect_host(slot) } else { Ok(()) });
        if made.is_err() {
            let _ = self.remove(project, Some(slot));
        }
        made
    }

    fn enforce(&self, path: &Path, slot: u32, policy: &NetworkPolicy) -> Result<(), NetError> {
        let kept = Kept { slot, policy: policy.clone() };
        let io = |source| NetError::Io { what: "keep a network policy", source };
        let text = serde_json::to_vec(&kept).map_err(|error| io(error.into()))?;
        // Kept first: who opens the table anew must know of it.
        fs::write(policy_file(path), text).map_err(io)?;
        let rules = self.rules();
        match rules.policy(slot, policy) {
            text if text.is_empty() => Ok(()),
            text => nft(&format!("{}{text}", rules.no_policy(slot)), "set a project's firewall"),
        }
    }

    /// The project's side; leaves the thread in the new namespace.
    fn create_here(&self, path: &Path, slot: u32, connected: bool) -> Result<(), NetError> {
        let io = |what| move |source| NetError::Io { what, source };
        kernel::unshare_network().map_err(io("make a network namespace"))?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", path)
            .map_err(|error| io("hold a network namespace")(error.into()))?;
        // Root inside is nobody here: it could bind no port below 1024, and
        // ping would not work either.
        for (name, value) in [("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 2147483647")] {
            fs::write(format!("/proc/sys/net/ipv4/{name}"), value)
                .map_err(io("open low ports to the project"))?;
        }
        let mut batch = String::from("link set lo up\n");
        if connected {
            let (cable, address, gateway) = (self.cable(slot), self.address(slot), self.first);
            let mtu = outside_mtu();
            // The child inherits this thread's namespace, and names the
            // host's by this process, whose other threads are still there.
            batch.push_str(&format!(
                "link add eth0 mtu {mtu} type veth peer name {cable} mtu {mtu} netns {pid}\n\
                 addr add {address}/32 dev eth0\n\
                 link set eth0 up\n\
                 route add {gateway}/32 dev eth0 scope link\n\
                 route add default via {gateway} dev eth0\n",
                pid = std::process::id(),
            ));
            // Nothing but IPv4 leaves; a link-local address would be a way to
            // the host.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        }
        ip(&batch, "connect the project's network")
    }

    /// The host's side of the cable.
    fn connect_host(&self, slot: u32) -> Result<(), NetError> {
        let (cable, address, gateway) = (self.cable(slot), self.address(slot), self.first);
        // Kernels without IPv6 have no such file.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{cable}/disable_ipv6"), "1");
        // Only this project's address may come from its cable.
        fs::write(format!("/proc/sys/net/ipv4/conf/{cable}/rp_filter"), "1")
            .map_err(|source| NetError::Io { what: "refuse forged addresses", source })?;
        ip(
            &format!(
                "addr add {gateway}/32 dev {cable}\nlink set {cable} up\n\
                 route add {address}/32 dev {cable} scope link\n"
            ),
            "connect the host's end of a project's network",
        )
    }

    /// The number with which a project's network was made; `None` if it has none.
    pub(crate) fn slot(&self, project: ProjectId) -> Option<u32> {
        Some(self.kept(&self.path(project))?.slot)
    }

    /// Removes the namespace, and the cable and the rules of this number, if it has
    /// one; harmless if they are not there. Blocks.
    pub(crate) fn remove(&self, project: ProjectId, slot: Option<u32>) -> Result<(), NetError> {
        let path = self.path(project);
        let io = |what| move |source| NetError::Io { what, source };
        let kept = self.kept(&path);
        if let Some(slot) = slot.filter(|slot| self.cable_exists(*slot)) {
            // At once: a namespace takes its cables along only when the kernel
            // gets to it.
            let _ = ip(&format!("link del {}\n", self.cable(slot)), "remove a cable");
        }
        mounts::unmount(&path).map_err(io("let go of a network namespace"))?;
        if let Some(kept) = kept
            && matches!(kept.policy, NetworkPolicy::Only { .. })
            && slot == Some(kept.slot)
        {
            nft(&self.rules().no_policy(kept.slot), "remove a project's firewall")?;
        }
        for path in [path.clone(), policy_file(&path)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io("let go of a network namespace")(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What a project has received and sent over its cable, in bytes; `None`
    /// without one.
    pub(crate) fn traffic(&self, slot: u32) -> Option<(u64, u64)> {
        let counters = Path::new("/sys/class/net").join(self.cable(slot)).join("statistics");
        let count = |name: &str| fs::read_to_string(counters.join(name)).ok()?.trim().parse().ok();
        // The host's end sends what the project receives.
        Some((count("tx_bytes")?, count("rx_bytes")?))
    }

    fn cable(&self, slot: u32) -> String {
        format!("{CABLE}{}{slot:x}", self.tag)
    }

    fn cable_exists(&self, slot: u32) -> bool {
        Path::new("/sys/class/net").join(self.cable(slot)).exists()
    }

    fn address(&self, slot: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits().wrapping_add(slot).wrapping_add(1))
    }
}

/// The cables of the runner with this tag.
pub(crate) fn cables(tag: &str) -> Vec<String> {
    let prefix = format!("{CABLE}{tag}");
    let all = fs::read_dir("/sys/class/net").into_iter().flatten().filter_map(Result::ok);
    all.filter_map(|cable| cable.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix))
        .collect()
}

/// The table of the runner with this tag, as the firewall's tool calls it, if it
/// is there. Blocks.
pub(crate) fn table(tag: &str) -> Option<String> {
    let name = format!("table inet cocalc_{tag}");
    let mut nft = Command::new("nft");
    nft.args(["list", "tables"]);
    let all = run_blocking(nft, "").unwrap_or_default();
    all.lines().any(|line| line.trim() == name).then_some(name)
}

/// Removes every cable and the table of the runner with this tag. Blocks.
pub(crate) fn remove_all(tag: &str) -> Result<(), NetError> {
    for name in cables(tag) {
        // One that went away meanwhile is not missed.
        let _ = ip(&format!("link del {name}\n"), "remove a cable");
    }
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"]);
    let table = format!("table inet cocalc_{tag}");
    match run_blocking(nft, &format!("{table} {{}}\ndelete {table}\n")) {
        // Without the tool there is no table either.
        Ok(_) | Err(CommandError::Spawn { .. }) => Ok(()),
        Err(source) => Err(NetError::Tool { what: "remove the firewall's table", source }),
    }
}

fn ip(batch: &str, what: &'static str) -> Result<(), NetError> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    run_blocking(command, batch).map(drop).map_err(|source| NetError::Tool { what, source })
}

/// Changes the firewall, all or nothing. Blocks.
fn nft(batch: &str, what: &'static str) -> Result<(), NetError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    run_blocking(command, batch).map(drop).map_err(|source| NetError::Tool { what, source })
}

/// A policy that is in force, as the file beside the namespace says.
#[derive(Debug, Deserialize, Serialize)]
struct Kept {
    slot: u32,
    policy: NetworkPolicy,
}

/// How that file's name ends.
const POLICY: &str = ".policy";

fn policy_file(namespace: &Path) -> PathBuf {
    let mut path = namespace.as_os_str().to_owned();
    path.push(POLICY);
    path.into()
}

/// Whether a namespace is mounted at `path`, and not only an empty file there.
fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// The magic number of the file system of namespaces.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// The largest packet that the way out takes: a larger one would have to be
/// refused on every connection first.
fn outside_mtu() -> u32 {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let device = routes.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let device = fields.next()?;
        (fields.next()? == "00000000").then_some(device)
    });
    device
        .and_then(|device| fs::read_to_string(format!("/sys/class/net/{device}/mtu")).ok())
        .and_then(|mtu| mtu.trim().parse().ok())
        .map_or(1500, |mtu: u32| mtu.clamp(576, 1500))
}
