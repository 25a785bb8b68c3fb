//! The firewall's rules, as text for its tool.

use std::{
    fmt::Write,
    net::{IpAddr, Ipv4Addr},
};

use cocalc_core::runner::{Destination, NetworkPolicy, Place};

use super::{CABLE, Fences};

/// What no project ever reaches: link-local addresses, with the metadata
/// services of clouds among them, and what is no host's.
const NEVER: &str = "0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 240.0.0.0/4";
/// What a project reaches only where the host allows it: the networks of
/// companies, homes and carriers, and those of tests and protocols.
const PRIVATE: &str = "10.0.0.0/8, 100.64.0.0/10, 172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15";
/// How many addresses the names of one project may have at a time.
pub(super) const ADDRESSES_MAX: usize = 1024;

/// The rules of one runner.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    /// What tells this runner's cables and table apart.
    pub(super) tag: &'a str,
    /// The projects' addresses: the first and the last.
    pub(super) pool: (Ipv4Addr, Ipv4Addr),
    pub(super) fences: &'a Fences,
}

impl Rules<'_> {
    /// The whole table, replacing a former one in one transaction, so that at no
    /// time a project reaches more than it may. Cables of all runners are fenced
    /// off from each other.
    pub(super) fn table<'p>(&self, policies: impl IntoIterator<Item = (u32, &'p NetworkPolicy)>) -> String {
        let tag = self.tag;
        let (first, last) = self.pool;
        let mut text = format!(
            r#"table inet cocalc_{tag} {{}}
delete table inet cocalc_{tag}
table inet cocalc_{tag} {{
    set never {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {NEVER} }}; }}
    set private {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {PRIVATE} }}; }}
    set allowed {{ type ipv4_addr; flags interval; auto-merge;{allowed} }}
    set denied {{ type ipv4_addr; flags interval; auto-merge;{denied} }}
    map policies {{ type ifname : verdict; }}
    chain input {{
        type filter hook input priority filter - 5; policy accept;
        iifname "{CABLE}{tag}*" counter drop
    }}
    chain forward {{
        type filter hook forward priority filter - 5; policy accept;
        iifname "{CABLE}{tag}*" oifname "{CABLE}*" counter drop
        iifname "{CABLE}{tag}*" meta nfproto != ipv4 counter drop
        iifname "{CABLE}{tag}*" ip daddr @never counter drop
        iifname "{CABLE}{tag}*" ip daddr @denied counter drop
        iifname "{CABLE}{tag}*" ip daddr @private ip daddr != @allowed counter drop
        oifname "{CABLE}{tag}*" ct state established,related accept
        oifname "{CABLE}{tag}*" counter drop
        iifname vmap @policies
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {first}-{last} oifname != "{CABLE}*" masquerade
    }}
}}
"#,
            allowed = elements(&self.fences.allow),
            denied = elements(&self.fences.deny),
        );
        for (slot, policy) in policies {
            text.push_str(&self.policy(slot, policy));
        }
        text
    }

    /// The rules of one project's policy; none for one that reaches everything.
    pub(super) fn policy(&self, slot: u32, policy: &NetworkPolicy) -> String {
        let NetworkPolicy::Only { allow } = policy else { return String::new() };
        let table = format!("inet cocalc_{}", self.tag);
        let mut text = format!(
            "add set {table} named_{slot} {{ type ipv4_addr . inet_service; flags timeout; size {ADDRESSES_MAX}; }}\n\
             add set {table} whole_{slot} {{ type ipv4_addr; flags timeout; size {ADDRESSES_MAX}; }}\n\
             add chain {table} only_{slot}\n"
        );
        let mut rule = |what: &str| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "add rule {table} only_{slot} {what}");
        };
        rule("ct state established,related accept");
        for Destination { place, port } in allow.iter() {
            // Nothing but IPv4 leaves.
            let Place::Network(network) = place else { continue };
            if network.address().is_ipv4() {
                match port {
                    Some(port) => {
                        rule(&format!(
                            "ip daddr {network} meta l4proto {{ tcp, udp }} th dport {port} accept"
                        ));
                    }
                    None => rule(&format!("ip daddr {network} accept")),
                }
            }
        }
        rule(&format!("meta l4proto {{ tcp, udp }} ip daddr . th dport @named_{slot} accept"));
        rule(&format!("ip daddr @whole_{slot} accept"));
        rule("counter reject with icmpx admin-prohibited");
        let element = self.element(slot);
        let _ = writeln!(text, "add element {table} policies {element}");
        text
    }

    /// Takes a project's policy away, if there is one.
    pub(super) fn no_policy(&self, slot: u32) -> String {
        let table = format!("inet cocalc_{}", self.tag);
        let element = self.element(slot);
        // Adding what may be there already makes deleting it safe.
        format!(
            "add chain {table} only_{slot}\n\
             add element {table} policies {element}\ndelete element {table} policies {element}\n\
             flush chain {table} only_{slot}\ndelete chain {table} only_{slot}\n\
             add set {table} named_{slot} {{ type ipv4_addr . inet_service; flags timeout; size {ADDRESSES_MAX}; }}\n\
             delete set {table} named_{slot}\n\
             add set {table} whole_{slot} {{ type ipv4_addr; flags timeout; size {ADDRESSES_MAX}; }}\n\
             delete set {table} whole_{slot}\n"
        )
    }

    fn element(&self, slot: u32) -> String {
        format!("{{ \"{CABLE}{tag}{slot:x}\" : jump only_{slot} }}", tag = self.tag)
    }
}

/// Lets a project reach an address of a name, at these ports, for a time.
pub(super) fn admit(tag: &str, slot: u32, address: Ipv4Addr, ports: &[Option<u16>], secs: u32) -> String {
    let table = format!("inet cocalc_{tag}");
    let mut text = String::new();
    for port in ports {
        let (set, key) = match port {
            Some(port) => (format!("named_{slot}"), format!("{address} . {port}")),
            None => (format!("whole_{slot}"), address.to_string()),
        };
        // An element that is there keeps its time, so it is made anew.
        let _ = write!(
            text,
            "add element {table} {set} {{ {key} }}\ndelete element {table} {set} {{ {key} }}\n\
             add element {table} {set} {{ {key} timeout {secs}s }}\n"
        );
    }
    text
}

fn elements(networks: &[cocalc_core::runner::Network]) -> String {
    let all: Vec<String> = networks
        .iter()
        .filter(|network| matches!(network.address(), IpAddr::V4(_)))
        .map(ToString::to_string)
        .collect();
    if all.is_empty() { String::new() } else { format!(" elements = {{ {} }};", all.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_with_a_list_has_rules_of_its_own() {
        let fences = Fences { allow: vec!["10.1.0.0/16".parse().unwrap()], deny: Vec::new() };
        let pool = ([100, 100, 0, 1].into(), [100, 100, 0, 9].into());
        let rules = Rules { tag: "abcdef", pool, fences: &fences };
        let policy: NetworkPolicy = serde_json::from_str(
            r#"{"policy":"only","allow":["a.org:443","192.0.2.0/24:5432","198.51.100.7","2001:db8::1"]}"#,
        )
        .unwrap();
        let table = rules.table([(26, &policy), (27, &NetworkPolicy::Full), (28, &NetworkPolicy::None)]);
        for line in [
            "set allowed { type ipv4_addr; flags interval; auto-merge; elements = { 10.1.0.0/16 }; }",
            "set denied { type ipv4_addr; flags interval; auto-merge; }",
            "add rule inet cocalc_abcdef only_26 ip daddr 192.0.2.0/24 meta l4proto { tcp, udp } th dport 5432 accept",
            "add rule inet cocalc_abcdef only_26 ip daddr 198.51.100.7 accept",
            "add element inet cocalc_abcdef policies { \"ccabcdef1a\" : jump only_26 }",
        ] {
            assert!(table.contains(line), "{line}: {table}");
        }
        assert!(!table.contains("2001:db8") && !table.contains("only_27") && !table.contains("only_28"));
        let admitted = admit("abcdef", 26, [192, 0, 2, 1].into(), &[Some(443), None], 60);
        assert!(admitted.contains("named_26 { 192.0.2.1 . 443 timeout 60s }"), "{admitted}");
        assert!(admitted.contains("whole_26 { 192.0.2.1 timeout 60s }"), "{admitted}");
    }
}
