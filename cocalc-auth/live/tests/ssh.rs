//! SSH certificates, the options of keys, and the lists inside projects, at a
//! host on the stream of a master.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking, in its helpers too")]

mod rig;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use cocalc_auth::{
    audit::Event,
    stream::{AccountState, Entry, ProjectAcl, SshKey},
};
use cocalc_auth_live::{AuditLog, InsideKeys, TokenAuth};
use cocalc_auth_ssh::{Authority, Kind, UserRequest, fingerprint};
use cocalc_core::{
    auth::{Admission, Auth, Context, Credential, Denial, Principal, Via},
    ids::{Action, Ports, ProjectId, ProxyId, Restrictions, Role, Scope, Timestamp},
};
use rig::{Rig, account, acl, host, project, relaxed, state};

const SSH: Action = Action::Use(Scope::Ssh);
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

fn request() -> UserRequest {
    UserRequest {
        key: KEY.to_owned(),
        account: account(1),
        project: Some(project(1)),
        session_epoch: 0,
        acl: 1,
        sources: None,
        restrictions: Restrictions::default(),
        life: Duration::from_secs(300),
    }
}

fn certificate(authority: &Authority, request: &UserRequest) -> String {
    authority.sign_user(request, Timestamp::now()).unwrap().text
}

fn from(address: &str) -> Option<IpAddr> {
    Some(address.parse().unwrap())
}

async fn ends(admission: &Admission) -> Denial {
    tokio::time::timeout(Duration::from_secs(60), admission.revoked()).await.expect("it was not ended")
}

/// A rig that knows the keys of an authority.
async fn certified() -> (Rig, Authority) {
    let rig = Rig::new(relaxed()).await;
    let authority = Authority::generate(Timestamp::now()).unwrap();
    announce(&rig, &authority).await;
    (rig, authority)
}

async fn announce(rig: &Rig, authority: &Authority) {
    rig.master.send(Entry::SshAuthorities(authority.public())).await;
    let known = || rig.knowledge.with(|acl| acl.ssh_authorities().version == authority.version());
    rig.until("the authority", known).await;
}

async fn verify(rig: &Rig, credential: &Credential, source: Option<IpAddr>) -> Result<Principal, Denial> {
    rig.auth.verify(credential, &Context { project: project(1), source }).await
}

#[tokio::test]
async fn a_certificate_says_who_and_the_acl_says_what() {
    let (rig, mut authority) = certified().await;
    let plain = Credential::SshCertificate(certificate(&authority, &request()));
    let principal = rig.verify(&plain).await.unwrap();
    assert_eq!(principal.account, account(1));
    assert!(principal.restrictions.are_none());
    let Via::SshCertificate { serial, key_id, fingerprint: of_key, .. } = &principal.via else {
        panic!("{principal:?}")
    };
    assert_eq!(*key_id, format!("{}/{}/{serial}", account(1), project(1)));
    assert_eq!(Some(of_key.clone()), fingerprint(KEY));
    let admission = rig.auth.admit(&principal, project(1), SSH).await.unwrap();
    assert!(rig.auth.admit(&principal, project(1), Action::Use(Scope::Http)).await.is_err());
    assert!(rig.auth.admit(&principal, project(2), SSH).await.is_err());

    // Of another authority, for another project, or signed over.
    let stranger = Authority::generate(Timestamp::now()).unwrap();
    let elsewhere = UserRequest { project: Some(project(2)), ..request() };
    for bad in [
        certificate(&stranger, &request()),
        certificate(&authority, &elsewhere),
        "ssh-ed25519-cert-v01@openssh.com AAAA".to_owned(),
    ] {
        let refused = rig.verify(&Credential::SshCertificate(bad)).await;
        assert!(matches!(refused, Err(Denial::BadCredential(_))), "{refused:?}");
    }
    // Of an account that is no member, whatever was signed.
    let outsider = UserRequest { account: account(9), ..request() };
    let outsider = rig.verify(&Credential::SshCertificate(certificate(&authority, &outsider))).await.unwrap();
    assert!(rig.auth.admit(&outsider, project(1), SSH).await.is_err());

    // Signing out everywhere ends what it opened, and the certificate.
    rig.master.send(Entry::Account(AccountState { session_epoch: 1, ..state(1) })).await;
    assert_eq!(ends(&admission).await, Denial::Forbidden("the account has signed out".to_owned()));
    assert!(rig.auth.admit(&principal, project(1), SSH).await.is_err());
    let again = UserRequest { session_epoch: 1, ..request() };
    let again = Credential::SshCertificate(certificate(&authority, &again));
    let principal = rig.verify(&again).await.unwrap();
    let admission = rig.auth.admit(&principal, project(1), SSH).await.unwrap();

    // Rotating changes nothing for it; withdrawing its authority does.
    let signer = authority.public().user[0].clone();
    authority.rotate(Kind::User, true, Timestamp::now()).unwrap();
    announce(&rig, &authority).await;
    assert!(rig.verify(&again).await.is_ok());
    authority.withdraw(&fingerprint(&signer).unwrap(), Timestamp::now()).unwrap();
    announce(&rig, &authority).await;
    assert_eq!(ends(&admission).await, Denial::Forbidden("a signing key was withdrawn".to_owned()));
    assert!(rig.verify(&again).await.is_err());
    assert!(rig.auth.admit(&principal, project(1), SSH).await.is_err());
}

#[tokio::test]
async fn what_a_certificate_says_of_sources_and_sessions_is_kept() {
    let (rig, authority) = certified().await;
    let restrictions = Restrictions {
        command: Some("report".to_owned()),
        pty: false,
        ports: Ports::none(),
        listen: Ports::none(),
        ..Restrictions::default()
    };
    let request = UserRequest {
        sources: Some("10.0.0.0/8".to_owned()),
        restrictions: restrictions.clone(),
        ..request()
    };
    let credential = Credential::SshCertificate(certificate(&authority, &request));
    assert_eq!(verify(&rig, &credential, from("10.1.2.3")).await.unwrap().restrictions, restrictions);
    assert!(verify(&rig, &credential, from("192.0.2.1")).await.is_err());
    assert!(verify(&rig, &credential, None).await.is_err());
}

#[tokio::test]
async fn a_proxy_attests_a_certificate_only_where_the_owner_lets_it() {
    let (rig, authority) = certified().await;
    let proxy = ProxyId::from_bytes([5; 16]);
    let certificate = certificate(&authority, &request());
    let attested = Credential::AttestedSshCertificate { certificate, proxy: proxy.to_string() };
    assert!(rig.verify(&attested).await.is_err(), "the proxy is unknown");
    rig.master.send(Entry::Proxy { proxy, identity: Some("key".to_owned()) }).await;
    let version = || rig.knowledge.with(|acl| acl.project(project(1)).map(|acl| acl.version));
    for (at, proxy_ssh) in [(2, false), (3, true)] {
        let entry = Entry::Project(ProjectAcl { proxy_ssh, ..acl(1, at, &[1]) });
        rig.master.send(entry).await;
        rig.until("the change", || version() == Some(at)).await;
        assert_eq!(rig.verify(&attested).await.is_ok(), proxy_ssh);
    }
    let principal = rig.verify(&attested).await.unwrap();
    let admission = rig.auth.admit(&principal, project(1), SSH).await.unwrap();
    rig.master.send(Entry::Proxy { proxy, identity: None }).await;
    let withdrawn = "this proxy may not attest for the project".to_owned();
    assert_eq!(ends(&admission).await, Denial::Forbidden(withdrawn));
}

#[tokio::test]
async fn options_of_a_key_are_honoured_or_refuse_it() {
    let rig = Rig::new(relaxed()).await;
    let credential = Credential::SshKey(KEY.to_owned());
    let listed = |options: &[&str]| {
        let keys = options.iter().enumerate().map(|(n, options)| SshKey {
            id: cocalc_core::ids::KeyId::from_bytes([u8::try_from(n).unwrap() + 1; 16]),
            account: account(1),
            key: KEY.to_owned(),
            options: (*options).to_owned(),
        });
        Entry::Account(AccountState { keys: keys.collect(), ..state(1) })
    };
    let set = async |options: &[&str]| {
        rig.master.send(listed(options)).await;
        let seq = rig.master.lock().seq;
        rig.until("the keys", || rig.knowledge.position().is_some_and(|at| at.seq == seq)).await;
    };
    set(&["from=\"10.0.0.0/8\",no-pty"]).await;
    assert!(!verify(&rig, &credential, from("10.0.0.1")).await.unwrap().restrictions.pty);
    for elsewhere in [from("192.0.2.1"), None] {
        assert!(matches!(verify(&rig, &credential, elsewhere).await, Err(Denial::BadCredential(_))));
    }
    // Another entry of the same key, for other places.
    set(&["from=\"10.0.0.0/8\",no-pty", "from=\"192.0.2.0/24\",command=\"x\""]).await;
    assert!(!verify(&rig, &credential, from("10.0.0.1")).await.unwrap().restrictions.pty);
    let other = verify(&rig, &credential, from("192.0.2.1")).await.unwrap();
    assert_eq!(other.restrictions.command.as_deref(), Some("x"));
    // Somebody else lists it, too, with limits: its holder has none.
    let other = SshKey {
        id: cocalc_core::ids::KeyId::from_bytes([9; 16]),
        account: account(2),
        key: KEY.to_owned(),
        options: "command=\"false\"".to_owned(),
    };
    let limits = Entry::Project(ProjectAcl { keys: vec![other], ..acl(1, 2, &[1, 2]) });
    rig.master.send(limits).await;
    set(&[""]).await;
    let holder = verify(&rig, &credential, None).await.unwrap();
    assert!(holder.account == account(1) && holder.restrictions.are_none());
    set(&["no-pty"]).await;
    assert_eq!(verify(&rig, &credential, None).await.unwrap().account, account(2));
    rig.master.send(Entry::Project(acl(1, 3, &[1, 2]))).await;
    // What a newer master lets in, and this host does not know.
    set(&["unheard-of"]).await;
    assert!(matches!(verify(&rig, &credential, from("10.0.0.1")).await, Err(Denial::BadCredential(_))));
    set(&["expiry-time=\"20200101\""]).await;
    assert!(verify(&rig, &credential, from("10.0.0.1")).await.is_err());
}

#[derive(Debug, Default)]
struct Inside(Mutex<String>);

#[async_trait]
impl InsideKeys for Inside {
    async fn file(&self, asked: ProjectId) -> Option<Vec<u8>> {
        (asked == project(1)).then(|| self.0.lock().unwrap().clone().into_bytes())
    }
}

#[tokio::test]
async fn the_list_inside_a_project_counts_while_its_owner_lets_it() {
    let rig = Rig::new(relaxed()).await;
    let folder = tempfile::tempdir().unwrap();
    let audit = AuditLog::open(folder.path()).unwrap();
    let inside = Arc::new(Inside::default());
    let auth = TokenAuth::new(rig.knowledge.clone(), host(), Arc::new(rig::held), Some(audit))
        .inside_keys(inside.clone());
    let credential = Credential::SshKey(KEY.to_owned());
    let verify = async |project: ProjectId| {
        auth.verify(&credential, &Context { project, source: from("127.0.0.1") }).await
    };
    let set = async |version, authorized_keys| {
        let members = vec![(account(1), Role::Collaborator), (account(2), Role::Owner)];
        rig.master
            .send(Entry::Project(ProjectAcl { authorized_keys, members, ..acl(1, version, &[]) }))
            .await;
        let known = || rig.knowledge.with(|acl| acl.project(project(1)).map(|acl| acl.version));
        rig.until("the change", || known() == Some(version)).await;
    };
    *inside.0.lock().unwrap() = format!("# mine\nno-pty {KEY} me\n");
    set(2, false).await;
    assert!(verify(project(1)).await.is_err());
    set(3, true).await;
    let principal = verify(project(1)).await.unwrap();
    assert!(!principal.restrictions.pty);
    assert_eq!(principal.via, Via::InsideSshKey { fingerprint: fingerprint(KEY).unwrap(), proxy: None });
    let admission = auth.admit(&principal, project(1), SSH).await.unwrap();
    let more = auth.authorize(&principal, project(1), Action::Administer).await;
    assert!(more.outcome.is_err());
    for refused in ["tunnel=\"1\"", "from=\"10.0.0.0/8\"", "unheard-of"] {
        *inside.0.lock().unwrap() = format!("{refused} {KEY}\n");
        assert!(matches!(verify(project(1)).await, Err(Denial::BadCredential(_))), "{refused}");
    }
    set(4, false).await;
    let over = "the project's own list of keys does not count".to_owned();
    assert_eq!(ends(&admission).await, Denial::Forbidden(over));

    // Who was there is its key; the owner was not.
    let path = folder.path().join("audit.log");
    let events = || -> Vec<Event> {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line.split_once(' ').unwrap().1).unwrap()).collect()
    };
    rig.until("the event", || events().iter().any(|event| event.kind == "login")).await;
    let login = events().into_iter().find(|event| event.kind == "login").unwrap();
    assert_eq!(login.account, None);
    assert_eq!(login.reason, format!("authorized_keys {}", fingerprint(KEY).unwrap()));
    assert_eq!(login.source.as_deref(), Some("127.0.0.1"));
}
