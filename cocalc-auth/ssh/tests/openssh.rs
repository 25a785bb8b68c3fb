//! What OpenSSH's own tools say of our certificates, and we of theirs.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by it")]

use std::{path::Path, process::Command, time::Duration};

use cocalc_auth_ssh::{
    Authority, AuthorityError, CertificateError, HostRequest, Kind, Ports, Restrictions, UserRequest,
    certificate_fingerprint, check_host, fingerprint, verify_user,
};
use cocalc_ids::{AccountId, ProjectId, Timestamp};

fn keygen(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("ssh-keygen")
        .current_dir(dir)
        .args(arguments)
        .env("TZ", "UTC")
        .output()
        .expect("ssh-keygen of openssh-client is needed");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn new_key(dir: &Path, name: &str, kind: &[&str]) -> String {
    let mut arguments = vec!["-q", "-N", "", "-C", "", "-f", name];
    arguments.extend(kind);
    keygen(dir, &arguments);
    std::fs::read_to_string(dir.join(format!("{name}.pub"))).unwrap().trim().to_owned()
}

fn project() -> ProjectId {
    "0a7b1c9e-4f52-4a8e-9d3b-1c2d3e4f5a6b".parse().unwrap()
}

fn account() -> AccountId {
    "11111111-2222-4333-8444-555555555555".parse().unwrap()
}

fn request(key: &str) -> UserRequest {
    UserRequest {
        key: key.to_owned(),
        account: account(),
        project: Some(project()),
        session_epoch: 7,
        acl: 3,
        sources: None,
        restrictions: Restrictions::default(),
        life: Duration::from_secs(300),
    }
}

#[test]
fn ssh_keygen_reads_what_the_authority_signs_for_every_kind_of_key() {
    let dir = tempfile::tempdir().unwrap();
    let now = Timestamp::now();
    let authority = Authority::generate(now).unwrap();
    for (name, kind) in [
        ("ed", &["-t", "ed25519"][..]),
        ("ec256", &["-t", "ecdsa", "-b", "256"]),
        ("ec521", &["-t", "ecdsa", "-b", "521"]),
        ("rsa", &["-t", "rsa", "-b", "3072"]),
    ] {
        let key = new_key(dir.path(), name, kind);
        let sources = Some("10.0.0.0/8,127.0.0.1".to_owned());
        let signed = authority.sign_user(&UserRequest { sources, ..request(&key) }, now).unwrap();
        std::fs::write(dir.path().join("cert.pub"), format!("{}\n", signed.text)).unwrap();
        let shown = keygen(dir.path(), &["-L", "-f", "cert.pub"]);
        for expected in [
            "user certificate",
            &format!("Key ID: \"{}/{}/{}\"", account(), project(), signed.serial),
            &format!("Serial: {}", signed.serial),
            &project().to_string(),
            "source-address 10.0.0.0/8,127.0.0.1",
            "permit-pty",
            "permit-port-forwarding",
            "grant@cocalc.com",
            &fingerprint(&authority.public().user[0]).unwrap(),
            &fingerprint(&key).unwrap(),
        ] {
            assert!(shown.contains(expected), "{expected} is not in {shown}");
        }
        let from = |text: &str| text.parse().ok();
        let verify = |source| verify_user(&signed.text, &authority.public().user, project(), source, now);
        let good = verify(from("10.1.1.1")).unwrap();
        assert_eq!((good.account, good.session_epoch, good.acl), (account(), 7, 3));
        assert!(good.restrictions.pty && good.restrictions.ports == Ports::All);
        assert_eq!(verify(from("192.0.2.1")), Err(CertificateError::Source));
        assert_eq!(verify(None), Err(CertificateError::Source));
    }
}

#[test]
fn a_certificate_is_good_for_its_time_its_project_and_its_authority() {
    let dir = tempfile::tempdir().unwrap();
    let key = new_key(dir.path(), "user", &["-t", "ed25519"]);
    let now = Timestamp::from_secs(1_800_000_000);
    let mut authority = Authority::generate(now).unwrap();
    let signed = authority.sign_user(&request(&key), now).unwrap();
    let verify = |authority: &Authority, project, now| {
        verify_user(&signed.text, &authority.public().user, project, None, now).map(|good| good.serial)
    };
    let after = |secs| now.plus(Duration::from_secs(secs));
    assert_eq!(verify(&authority, project(), now), Ok(signed.serial));
    assert_eq!(verify(&authority, project(), after(304)), Ok(signed.serial));
    assert_eq!(verify(&authority, project(), after(305)), Err(CertificateError::Expired));
    let before = Timestamp::from_secs(1_800_000_000 - 66);
    assert_eq!(verify(&authority, project(), before), Err(CertificateError::NotYet));
    assert_eq!(verify(&authority, ProjectId::random(), now), Err(CertificateError::Principal));
    let stranger = Authority::generate(now).unwrap();
    assert_eq!(verify(&stranger, project(), now), Err(CertificateError::Authority));
    // Those of hosts are not those of users.
    let hosts = authority.public().host;
    assert_eq!(verify_user(&signed.text, &hosts, project(), None, now), Err(CertificateError::Authority));

    // Rotation keeps it good, withdrawal does not.
    assert_eq!(authority.rotate(Kind::User, false, now), Err(AuthorityError::TooEarly));
    let first = authority.public().user[0].clone();
    authority.rotate(Kind::User, true, now).unwrap();
    assert_ne!(authority.public().user[0], first);
    let mut authority = Authority::from_bytes(&authority.to_bytes()).unwrap();
    assert_eq!(verify(&authority, project(), now), Ok(signed.serial));
    assert!(authority.withdraw(&fingerprint(&first).unwrap(), now).unwrap());
    assert_eq!(verify(&authority, project(), now), Err(CertificateError::Authority));
    assert_eq!(authority.public().withdrawn, [first]);
    assert!(!authority.withdraw("SHA256:nothing", now).unwrap());

    // What has been retired for long enough goes, by itself.
    let day = Duration::from_secs(24 * 3600);
    assert!(!authority.tend(now).unwrap());
    assert!(authority.tend(now.plus(day * 31)).unwrap());
    assert_eq!(authority.public().user.len(), 3);
    assert!(authority.tend(now.plus(day * 33)).unwrap());
    assert_eq!(authority.public().user.len(), 2);
    assert!(!format!("{authority:?}").contains("seed"));
}

#[test]
fn what_a_certificate_forbids_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let key = new_key(dir.path(), "user", &["-t", "ed25519"]);
    let now = Timestamp::now();
    let authority = Authority::generate(now).unwrap();
    let restrictions = Restrictions {
        command: Some("report --all".to_owned()),
        pty: false,
        ports: Ports::none(),
        listen: Ports::none(),
        ..Restrictions::default()
    };
    let request = UserRequest { restrictions: restrictions.clone(), ..request(&key) };
    let signed = authority.sign_user(&request, now).unwrap();
    std::fs::write(dir.path().join("cert.pub"), format!("{}\n", signed.text)).unwrap();
    let shown = keygen(dir.path(), &["-L", "-f", "cert.pub"]);
    assert!(shown.contains("force-command report --all"), "{shown}");
    assert!(!shown.contains("permit-pty") && !shown.contains("permit-port-forwarding"), "{shown}");
    let verified = verify_user(&signed.text, &authority.public().user, project(), None, now).unwrap();
    assert_eq!(verified.restrictions, restrictions);
    assert_eq!(certificate_fingerprint(&signed.text), fingerprint(&key));
}

#[test]
fn an_account_wide_certificate_opens_every_project() {
    let dir = tempfile::tempdir().unwrap();
    let key = new_key(dir.path(), "user", &["-t", "ed25519"]);
    let now = Timestamp::now();
    let authority = Authority::generate(now).unwrap();
    let signed = authority.sign_user(&UserRequest { project: None, ..request(&key) }, now).unwrap();
    for project in [project(), ProjectId::random()] {
        assert!(verify_user(&signed.text, &authority.public().user, project, None, now).is_ok());
    }
    let bad = |change: fn(&mut UserRequest)| {
        let mut request = request(&key);
        change(&mut request);
        authority.sign_user(&request, now).unwrap_err()
    };
    assert_eq!(bad(|request| request.life = Duration::from_secs(3601)), AuthorityError::Life);
    assert_eq!(bad(|request| request.life = Duration::ZERO), AuthorityError::Life);
    let some = |request: &mut UserRequest| request.restrictions.ports = Ports::Only([80].into());
    assert_eq!(bad(some), AuthorityError::Restrictions);
    let set = |request: &mut UserRequest| {
        request.restrictions.environment = [("A".to_owned(), "1".to_owned())].into();
    };
    assert_eq!(bad(set), AuthorityError::Restrictions);
    assert_eq!(bad(|request| request.key = "ssh-ed25519 AAAA".into()), AuthorityError::Key);
}

/// Signs with ssh-keygen and a key whose public part we are told to trust, and
/// returns what we say of it.
fn theirs(
    arguments: &[&str],
    key_id: &str,
    serial: &str,
) -> Result<cocalc_auth_ssh::UserCertificate, CertificateError> {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_key(dir.path(), "ca", &["-t", "ed25519"]);
    new_key(dir.path(), "user", &["-t", "ed25519"]);
    let mut all = vec!["-q", "-s", "ca", "-I", key_id, "-z", serial];
    all.extend(arguments);
    all.push("user.pub");
    keygen(dir.path(), &all);
    let text = std::fs::read_to_string(dir.path().join("user-cert.pub")).unwrap();
    let text: Vec<&str> = text.split_ascii_whitespace().take(2).collect();
    verify_user(&text.join(" "), &[ca], project(), Some("127.0.0.1".parse().unwrap()), Timestamp::now())
}

#[test]
fn what_a_certificate_demands_is_honoured_or_refuses_it() {
    let key_id = format!("{}/{}/5", account(), project());
    let project = project().to_string();
    let grant = "extension:grant@cocalc.com=1 1";
    let usual = ["-n", &project, "-V", "-1m:+4m", "-O", "clear", "-O", grant];
    let with = |more: &[&str]| {
        let mut all = usual.to_vec();
        all.extend(more);
        theirs(&all, &key_id, "5")
    };
    let bare = with(&[]).unwrap();
    assert!(!bare.restrictions.pty && bare.restrictions.ports == Ports::Only([].into()));
    let more = with(&["-O", "permit-pty", "-O", "permit-X11-forwarding", "-O", "permit-agent-forwarding"]);
    assert!(more.is_ok_and(|good| good.restrictions.pty && good.restrictions.ports != Ports::All));
    let forced = with(&["-O", "force-command=/bin/true x"]).unwrap();
    assert_eq!(forced.restrictions.command.as_deref(), Some("/bin/true x"));
    assert!(with(&["-O", "source-address=127.0.0.0/8"]).is_ok());
    assert_eq!(with(&["-O", "source-address=10.0.0.0/8"]), Err(CertificateError::Source));
    let critical = |name: &str| Err(CertificateError::Critical(name.to_owned()));
    assert_eq!(with(&["-O", "verify-required"]), critical("verify-required"));
    assert_eq!(with(&["-O", "critical:unheard@of.example=1"]), critical("unheard@of.example"));

    assert_eq!(theirs(&usual, "somebody", "5"), Err(CertificateError::KeyId));
    let elsewhere = format!("{}/{}/5", account(), ProjectId::random());
    assert_eq!(theirs(&usual, &elsewhere, "5"), Err(CertificateError::KeyId));
    assert!(theirs(&usual, &format!("{}/*/5", account()), "5").is_ok());
    assert_eq!(theirs(&usual, &key_id, "6"), Err(CertificateError::KeyId));
    let no_grant = ["-n", &project, "-V", "-1m:+4m"];
    assert_eq!(theirs(&no_grant, &key_id, "5"), Err(CertificateError::Grant));
    let no_names = ["-V", "-1m:+4m", "-O", grant];
    assert_eq!(theirs(&no_names, &key_id, "5"), Err(CertificateError::Principal));
    let long = ["-n", &project, "-V", "-1m:+1d", "-O", grant];
    assert_eq!(theirs(&long, &key_id, "5"), Err(CertificateError::Life));
    let forever = ["-n", &project, "-V", "always:forever", "-O", grant];
    assert_eq!(theirs(&forever, &key_id, "5"), Err(CertificateError::Life));
    let of_host = ["-h", "-n", &project, "-V", "-1m:+4m"];
    assert_eq!(theirs(&of_host, &key_id, "5"), Err(CertificateError::Kind));
}

#[test]
fn every_flipped_byte_is_noticed() {
    use base64::Engine;
    let dir = tempfile::tempdir().unwrap();
    let key = new_key(dir.path(), "user", &["-t", "ed25519"]);
    let now = Timestamp::now();
    let authority = Authority::generate(now).unwrap();
    let signed = authority.sign_user(&request(&key), now).unwrap();
    let (algorithm, encoded) = signed.text.split_once(' ').unwrap();
    let engine = base64::engine::general_purpose::STANDARD;
    let blob = engine.decode(encoded).unwrap();
    let trusted = authority.public().user;
    for at in 0..blob.len() {
        let mut bent = blob.clone();
        bent[at] ^= 1;
        let text = format!("{algorithm} {}", engine.encode(bent));
        assert!(verify_user(&text, &trusted, project(), None, now).is_err(), "byte {at}");
    }
    for length in 0..blob.len() {
        let text = format!("{algorithm} {}", engine.encode(&blob[..length]));
        assert!(verify_user(&text, &trusted, project(), None, now).is_err(), "length {length}");
    }
}

#[test]
fn a_host_is_known_by_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let key = new_key(dir.path(), "host", &["-t", "ed25519"]);
    let now = Timestamp::now();
    let authority = Authority::generate(now).unwrap();
    let names = vec!["alpha.example".to_owned(), "127.0.0.1".to_owned()];
    let request = HostRequest { key: key.clone(), id: "host:x".to_owned(), names };
    let signed = authority.sign_host(&request, now).unwrap();
    std::fs::write(dir.path().join("cert.pub"), format!("{}\n", signed.text)).unwrap();
    let shown = keygen(dir.path(), &["-L", "-f", "cert.pub"]);
    assert!(shown.contains("host certificate") && shown.contains("alpha.example"), "{shown}");
    let trusted = authority.public().host;
    assert_eq!(check_host(&signed.text, &trusted, "ALPHA.example", now).unwrap().key, key);
    let refused = |host: &str, now| check_host(&signed.text, &trusted, host, now).unwrap_err();
    assert_eq!(refused("beta.example", now), CertificateError::Principal);
    let late = now.plus(Duration::from_secs(7 * 24 * 3600 + 5));
    assert_eq!(refused("alpha.example", late), CertificateError::Expired);
    let nameless = HostRequest { names: Vec::new(), ..request };
    assert_eq!(authority.sign_host(&nameless, now), Err(AuthorityError::Names));
}
