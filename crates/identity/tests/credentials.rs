//! Credentials on disk and as tokens: what is written can be read, and anything else is named.

#![allow(clippy::unwrap_used)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use identity::{
    ClusterCa, Credential, FileFlaw, Flaw, IdentityError, KeyRequest, NODE_LIFE, Peer, Role, SKEW,
    TOKEN_LIFE, Tls, private_dir,
};
use tempfile::TempDir;

fn ca() -> ClusterCa {
    ClusterCa::create(SystemTime::now()).unwrap()
}

fn node(ca: &ClusterCa, id: u64) -> Credential {
    ca.node(id, Role::Worker, NODE_LIFE, SystemTime::now()).unwrap()
}

fn place() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn everybody_is_who_their_certificate_says() {
    let (ca, now) = (ca(), SystemTime::now());
    let operator = ca.operator("ops-1", NODE_LIFE, now).unwrap();
    assert_eq!(operator.peer(), &Peer::Operator { name: "ops-1".to_owned() });
    for (id, role) in [(0, Role::Worker), (u64::MAX, Role::Coordinator)] {
        let credential = ca.node(id, role, NODE_LIFE, now).unwrap();
        assert_eq!(credential.peer(), &Peer::Node { id, role });
        assert_eq!(credential.cluster(), ca.cluster());
    }
    let token = ca.token(Role::Coordinator, 3, TOKEN_LIFE, now).unwrap();
    assert!(matches!(token.peer(), Peer::Token { role: Role::Coordinator, uses: 3, .. }));
    for name in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"a".repeat(41)] {
        assert!(ca.operator(name, NODE_LIFE, now).is_err(), "{name:?} was taken");
    }
    assert!(ca.token(Role::Worker, 0, TOKEN_LIFE, now).is_err());
    // The authority itself is nobody.
    assert!(matches!(Peer::read(ca.certificate()), Err(Flaw::Names(_))));
}

#[test]
fn an_authority_is_read_back_and_never_replaced() {
    let place = place();
    let directory = place.path().join("a/b");
    let ca = ca();
    ca.save(&directory).unwrap();
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("ca-key.pem")), 0o600);
    let again = ClusterCa::load(&directory).unwrap();
    assert_eq!(again.cluster(), ca.cluster());
    assert_eq!(again.certificate(), ca.certificate());
    // What it issues is trusted by those who trusted the first.
    let credential = node(&again, 7).with_roots(vec![ca.certificate().clone()]);
    assert!(Tls::new(credential).is_ok());
    let error = ca.save(&directory).unwrap_err();
    assert!(matches!(error, IdentityError::File { why: FileFlaw::Exists, .. }), "{error}");
    // With several roots beside it, its own is found by its key.
    let other = ca.successor(SystemTime::now()).unwrap();
    let beside = place.path().join("other");
    other.save(&beside).unwrap();
    let both = fs::read_to_string(beside.join("ca.pem")).unwrap()
        + &fs::read_to_string(directory.join("ca.pem")).unwrap();
    fs::write(directory.join("ca.pem"), both).unwrap();
    assert_eq!(ClusterCa::load(&directory).unwrap().certificate(), ca.certificate());
    fs::copy(beside.join("ca.pem"), directory.join("ca.pem")).unwrap();
    let error = ClusterCa::load(&directory).unwrap_err().to_string();
    assert!(error.contains("ca.pem") && error.contains("does not belong"), "{error}");
}

#[test]
fn a_credential_is_read_back_from_files() {
    let place = place();
    let directory = place.path().join("node");
    let ca = ca();
    node(&ca, 7).save(&directory).unwrap();
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("node-key.pem")), 0o600);
    let read = Credential::load(&directory).unwrap();
    assert_eq!(read.peer(), &Peer::Node { id: 7, role: Role::Worker });
    assert!(Tls::new(read).is_ok());
    // Saving again replaces it, and leaves nothing else behind.
    node(&ca, 8).save(&directory).unwrap();
    assert_eq!(Credential::load(&directory).unwrap().peer().node(Role::Worker), Some(8));
    let mut names: Vec<_> =
        fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["ca.pem", "node-key.pem", "node.pem"]);
    // A key that was open to others before is closed by writing it.
    chmod(&directory.join("node-key.pem"), 0o666);
    node(&ca, 9).save(&directory).unwrap();
    assert_eq!(mode(&directory.join("node-key.pem")), 0o600);

    let file = place.path().join("operator.pem");
    let operator = ca.operator("ops", NODE_LIFE, SystemTime::now()).unwrap();
    operator.save_file(&file).unwrap();
    assert_eq!(mode(&file), 0o600);
    let read = Credential::load_file(&file).unwrap();
    assert_eq!(read.peer(), operator.peer());
    assert!(Tls::new(read).is_ok());
    let shown = format!("{operator:?}");
    assert!(shown.contains("ops") && !shown.contains("key"), "{shown}");
}

#[test]
fn a_file_that_is_no_good_is_named() {
    let place = place();
    let directory = place.path().join("node");
    let path = |name: &str| directory.join(name);
    let ca = ca();
    let refused = |damage: &dyn Fn()| {
        node(&ca, 7).save(&directory).unwrap();
        damage();
        match Credential::load(&directory) {
            Err(IdentityError::File { path, why }) => {
                (path.file_name().unwrap().to_str().unwrap().to_owned(), why)
            }
            other => panic!("{other:?}"),
        }
    };
    let key = "node-key.pem".to_owned();
    for open in [0o604, 0o640, 0o660, 0o601] {
        let (file, why) = refused(&|| chmod(&path(&key), open));
        assert!(file == key && matches!(why, FileFlaw::Exposed { mode } if mode == open));
    }
    for name in ["node.pem", "node-key.pem", "ca.pem"] {
        let (file, why) = refused(&|| fs::remove_file(path(name)).unwrap());
        assert!(file == name && matches!(why, FileFlaw::Missing), "{file}: {why}");
        let (file, why) = refused(&|| fs::write(path(name), "nothing").unwrap());
        assert!(file == name && matches!(why, FileFlaw::NoPem { .. }), "{file}: {why}");
    }
    let (file, why) = refused(&|| {
        fs::remove_file(path("ca.pem")).unwrap();
        fs::create_dir(path("ca.pem")).unwrap();
    });
    assert!(file == "ca.pem" && matches!(why, FileFlaw::NotOne), "{file}: {why}");
    fs::remove_dir(path("ca.pem")).unwrap();
    let (file, why) = refused(&|| fs::write(path("node.pem"), vec![b'-'; 2 << 20]).unwrap());
    assert!(file == "node.pem" && matches!(why, FileFlaw::NotOne), "{file}: {why}");
    // The authority's certificate in place of the own.
    let (file, why) = refused(&|| {
        fs::copy(path("ca.pem"), path("node.pem")).unwrap();
    });
    assert!(file == "node.pem" && matches!(why, FileFlaw::Content(Flaw::Names(_))));

    chmod(&directory, 0o777);
    let error = node(&ca, 7).save(&directory).unwrap_err();
    assert!(matches!(error, IdentityError::File { why: FileFlaw::Exposed { .. }, .. }));
    assert!(private_dir(&directory).is_err());
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (first, second) = (place(), place());
    let ca = ca();
    node(&ca, 7).save(first.path()).unwrap();
    node(&ca, 7).save(second.path()).unwrap();
    fs::copy(second.path().join("node-key.pem"), first.path().join("node-key.pem")).unwrap();
    let mixed = Credential::load(first.path()).unwrap();
    assert_eq!(Tls::new(mixed).unwrap_err(), Flaw::OtherKey);
    let foreign = node(&ca, 7).with_roots(vec![self::ca().certificate().clone()]);
    assert!(matches!(Tls::new(foreign), Err(Flaw::Untrusted { .. })));
    assert!(matches!(Tls::new(node(&ca, 7).with_roots(vec![])), Err(Flaw::Root(_))));
}

#[test]
fn nothing_is_valid_before_its_time_or_after() {
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 60 * 60);
    let long_ago = ClusterCa::create(now - 400 * day).unwrap();
    let expired = long_ago.node(7, Role::Worker, NODE_LIFE, now - 100 * day).unwrap();
    let peer = expired.peer().clone();
    assert_eq!(Tls::new(expired).unwrap_err(), Flaw::Expired { peer: peer.clone() });
    let early = long_ago.node(7, Role::Worker, NODE_LIFE, now + day).unwrap();
    assert_eq!(Tls::new(early).unwrap_err(), Flaw::NotYet { peer });
    // Clocks may differ a little.
    let ahead = long_ago.node(7, Role::Worker, NODE_LIFE, now + SKEW / 2).unwrap();
    assert!(Tls::new(ahead).is_ok());
    // Nothing outlives its authority, and an authority that has ended issues nothing.
    let credential = long_ago.node(7, Role::Worker, 10_000 * day, now).unwrap();
    let (_, end) = credential.validity().unwrap();
    assert!(end <= now + identity::CA_LIFE - 399 * day, "it outlives its authority");
    let later = now + identity::CA_LIFE;
    assert!(long_ago.node(7, Role::Worker, NODE_LIFE, later).is_err());
}

#[test]
fn a_request_gives_its_key_and_no_name() {
    let (ca, now) = (ca(), SystemTime::now());
    let request = KeyRequest::generate().unwrap();
    let der = request.request().to_vec();
    let certificate = ca.issue_node(&der, 12, Role::Worker, NODE_LIFE, now).unwrap();
    let roots = [ca.certificate().to_vec()];
    let credential = request.complete(certificate.to_vec(), roots).unwrap();
    assert_eq!(credential.peer().node(Role::Worker), Some(12));
    assert!(Tls::new(credential).is_ok());
    // Another one's answer does not fit.
    let other = KeyRequest::generate().unwrap();
    let mixed = other.complete(certificate.to_vec(), [ca.certificate().to_vec()]).unwrap();
    assert_eq!(Tls::new(mixed).unwrap_err(), Flaw::OtherKey);
    // The request is signed: with any byte of what it says flipped, it is refused. What says so is
    // from its version to its attributes; the name of the signature's algorithm is not signed.
    let said = 5..103;
    for at in said {
        let mut damaged = der.clone();
        damaged[at] ^= 1;
        let result = ca.issue_node(&damaged, 12, Role::Worker, NODE_LIFE, now);
        assert!(result.is_err(), "byte {at} of {} does not matter", der.len());
    }
}

#[test]
fn a_token_is_one_line_and_any_slip_is_seen() {
    let ca = ca();
    let token = ca.token(Role::Worker, 2, TOKEN_LIFE, SystemTime::now()).unwrap();
    let line = token.to_token().unwrap();
    assert!(line.starts_with("phx1_"));
    assert!(line.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-'));
    let read = Credential::from_token(&format!("  {line}\n")).unwrap();
    assert_eq!(read.peer(), token.peer());
    assert!(Tls::new(read).is_ok());
    for at in 0..line.len() {
        let mut damaged = line.clone().into_bytes();
        damaged[at] = if damaged[at] == b'A' { b'B' } else { b'A' };
        let damaged = String::from_utf8(damaged).unwrap();
        let result = Credential::from_token(&damaged);
        assert!(matches!(result, Err(Flaw::Token(_))), "character {at} does not matter");
        assert!(Credential::from_token(&line[..at]).is_err());
    }
    assert!(Credential::from_token(&"phx1_A".repeat(10_000)).is_err());
    assert!(Credential::from_token("").is_err());
}
