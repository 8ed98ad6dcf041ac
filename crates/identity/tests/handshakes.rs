//! Who gets through a handshake, at both ends, without a network.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use identity::{
    Admit, ClusterCa, Credential, Expect, Flaw, NODE_LIFE, Peer, Role, Roll, TOKEN_LIFE, Tls,
    explain,
};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConnection, Connection, ServerConnection};
use rustls_pki_types::UnixTime;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn ca() -> ClusterCa {
    ClusterCa::create(SystemTime::now()).unwrap()
}

fn node(ca: &ClusterCa, id: u64, role: Role) -> Credential {
    ca.node(id, role, NODE_LIFE, SystemTime::now()).unwrap()
}

fn tls(credential: Credential) -> Tls {
    Tls::new(credential).unwrap()
}

fn worker(ca: &ClusterCa, id: u64) -> Tls {
    tls(node(ca, id, Role::Worker))
}

/// Moves bytes until one end has nothing to say or one fails; the other then hears of it.
fn shake(
    mut client: Connection,
    mut server: Connection,
) -> (Result<(), String>, Result<(), String>) {
    let pass = |from: &mut Connection, to: &mut Connection| -> Result<bool, rustls::Error> {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(!bytes.is_empty())
    };
    let text = |error: rustls::Error| explain(&error);
    loop {
        match pass(&mut client, &mut server) {
            Err(error) => {
                let heard = pass(&mut server, &mut client).map(|_| ()).map_err(text);
                return (heard, Err(text(error)));
            }
            Ok(up) => match pass(&mut server, &mut client) {
                Err(error) => {
                    let heard = pass(&mut client, &mut server).map(|_| ()).map_err(text);
                    return (Err(text(error)), heard);
                }
                Ok(down) if !up && !down => break,
                Ok(_) => {}
            },
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    (Ok(()), Ok(()))
}

fn meet(
    client: &Tls,
    expect: Expect,
    server: &Tls,
    admit: &Admit,
) -> (Result<(), String>, Result<(), String>) {
    let (client, server) = (client.client(expect).unwrap(), server.server(admit.clone()).unwrap());
    shake(client.into(), server.into())
}

fn welcome(client: &Tls, expect: Expect, server: &Tls, admit: &Admit) -> bool {
    match meet(client, expect, server, admit) {
        (Ok(()), Ok(())) => true,
        (Err(_), Err(_)) => false,
        other => panic!("the ends disagree: {other:?}"),
    }
}

#[test]
fn each_port_admits_whom_it_should() {
    let (ca, now) = (ca(), SystemTime::now());
    let server = tls(node(&ca, 1, Role::Coordinator));
    let callers = [
        worker(&ca, 7),
        tls(node(&ca, 2, Role::Coordinator)),
        tls(ca.operator("ops", NODE_LIFE, now).unwrap()),
        tls(ca.token(Role::Worker, 1, TOKEN_LIFE, now).unwrap()),
    ];
    let ports = [
        (Admit::members(), [true, true, true, true]),
        (Admit::nodes(), [true, true, false, false]),
        (Admit::workers([7, 8]), [true, false, false, false]),
        (Admit::workers([8]), [false; 4]),
        (Admit::default(), [false; 4]),
        (Admit { operators: true, ..Admit::default() }, [false, false, true, false]),
        (Admit { tokens: true, ..Admit::default() }, [false, false, false, true]),
    ];
    for (admit, wanted) in ports {
        for (caller, wanted) in callers.iter().zip(wanted) {
            let welcome = welcome(caller, Expect::Node(1), &server, &admit);
            assert_eq!(welcome, wanted, "{:?} at {admit:?}", caller.peer());
        }
    }
    let (heard, said) = meet(&callers[3], Expect::Node(1), &server, &Admit::nodes());
    let (heard, said) = (heard.unwrap_err(), said.unwrap_err());
    assert!(heard.contains("refused our certificate"), "{heard}");
    assert!(said.contains("token") && said.contains("not admitted"), "{said}");
}

#[test]
fn a_client_reaches_nobody_but_the_expected() {
    let (ca, now) = (ca(), SystemTime::now());
    let client = worker(&ca, 7);
    let servers = [worker(&ca, 1), tls(node(&ca, 2, Role::Coordinator)), worker(&ca, 11)];
    let expected = [
        (Expect::Node(1), [true, false, false]),
        (Expect::Node(2), [false, true, false]),
        (Expect::Node(11), [false, false, true]),
        (Expect::AnyCoordinator, [false, true, false]),
        (Expect::AnyWorker, [true, false, true]),
    ];
    for (expect, wanted) in expected {
        for (server, wanted) in servers.iter().zip(wanted) {
            let welcome = welcome(&client, expect, server, &Admit::members());
            assert_eq!(welcome, wanted, "{:?} as {expect:?}", server.peer());
        }
    }
    let (said, _) = meet(&client, Expect::Node(2), &servers[0], &Admit::members());
    assert_eq!(said.unwrap_err(), "its certificate is another node's");
    // Operators and tokens can never be servers.
    for stranger in [
        ca.operator("ops", NODE_LIFE, now).unwrap(),
        ca.token(Role::Coordinator, 1, TOKEN_LIFE, now).unwrap(),
    ] {
        let stranger = tls(stranger);
        for expect in [Expect::Node(1), Expect::AnyCoordinator, Expect::AnyWorker] {
            assert!(!welcome(&client, expect, &stranger, &Admit::members()));
        }
    }
}

#[test]
fn another_cluster_is_refused_both_ways() {
    let (ours, theirs) = (ca(), ca());
    let (here, there) = (worker(&ours, 1), worker(&theirs, 1));
    let (said, _) = meet(&here, Expect::Node(1), &there, &Admit::members());
    assert_eq!(said.unwrap_err(), "its certificate is not of this cluster");
    // A client of theirs that would take anything: only the server judges.
    let gullible = tls(node(&theirs, 2, Role::Worker)
        .with_roots(vec![theirs.certificate().clone(), ours.certificate().clone()]));
    let mut config = (*gullible.client_config(Expect::Node(1), &[]).unwrap()).clone();
    config.dangerous().set_certificate_verifier(Arc::new(Anything));
    let client =
        ClientConnection::new(Arc::new(config), gullible.server_name(Expect::Node(1)).unwrap());
    let server = here.server(Admit::members()).unwrap();
    let (heard, said) = shake(client.unwrap().into(), server.into());
    assert_eq!(said.unwrap_err(), "its certificate is not of this cluster");
    assert!(heard.unwrap_err().contains("not of the peer's cluster"));
}

/// A client that does not look whom it has reached.
#[derive(Debug)]
struct Anything;

impl rustls::client::danger::ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

fn anonymous() -> ClientConnection {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anything))
        .with_no_client_auth();
    ClientConnection::new(Arc::new(config), "anybody".try_into().unwrap()).unwrap()
}

#[test]
fn without_a_certificate_nobody_gets_in() {
    let server = worker(&ca(), 1).server(Admit::members()).unwrap();
    let (heard, said) = shake(anonymous().into(), server.into());
    assert_eq!(said.unwrap_err(), "it showed no certificate");
    assert_eq!(heard.unwrap_err(), "the peer refused us: it asks for a certificate");
}

/// A clock that a test sets.
#[derive(Debug, Default)]
struct Clock(AtomicU64);

impl Clock {
    fn at(&self, time: SystemTime) {
        let seconds = time.duration_since(UNIX_EPOCH).unwrap().as_secs();
        self.0.store(seconds, Ordering::SeqCst);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let since = Duration::from_secs(self.0.load(Ordering::SeqCst));
        Some(UnixTime::since_unix_epoch(since))
    }
}

#[test]
fn what_has_expired_is_refused_by_the_clock_of_the_other_end() {
    let (ca, now) = (ca(), SystemTime::now());
    let clock = Arc::new(Clock::default());
    clock.at(now);
    let timed = |credential| Tls::with_clock(credential, clock.clone()).unwrap();
    let long = |id| ca.node(id, Role::Worker, 300 * DAY, now).unwrap();
    let (client, server) = (worker(&ca, 7), timed(long(1)));
    let try_now = || meet(&client, Expect::Node(1), &server, &Admit::members());
    assert_eq!(try_now(), (Ok(()), Ok(())));
    clock.at(now + NODE_LIFE - DAY);
    assert_eq!(try_now(), (Ok(()), Ok(())));
    clock.at(now + NODE_LIFE + DAY);
    let (heard, said) = try_now();
    assert_eq!(said.unwrap_err(), "its certificate has expired");
    assert_eq!(heard.unwrap_err(), "the peer refused our certificate: it has expired");
    clock.at(now - DAY);
    assert!(try_now().1.unwrap_err().contains("not valid yet"));
    // And the other way round.
    clock.at(now + NODE_LIFE + DAY);
    let (said, _) = meet(&server, Expect::Node(7), &client, &Admit::members());
    assert_eq!(said.unwrap_err(), "its certificate has expired");
}

#[test]
fn a_removed_node_is_refused_both_ways() {
    let ca = ca();
    let (here, gone) = (worker(&ca, 1), worker(&ca, 7));
    let both = || {
        let inward = welcome(&gone, Expect::Node(1), &here, &Admit::members());
        let outward = welcome(&here, Expect::Node(7), &gone, &Admit::members());
        (inward, outward)
    };
    assert_eq!(both(), (true, true));
    let roll = |given, present: &[u64]| Roll { given, present: present.iter().copied().collect() };
    here.refuse(roll(9, &[1, 3, 4, 5, 6, 8, 9]));
    assert_eq!(both(), (false, false));
    assert!(here.refuses(gone.peer()));
    // It is told so in words of its own.
    let (said, heard) = meet(&gone, Expect::Node(1), &here, &Admit::members());
    let removed = "the peer refused our certificate: this node was removed from the cluster";
    assert_eq!(said.unwrap_err(), removed);
    assert_eq!(heard.unwrap_err(), "it was removed from the cluster");
    // A reload does not forgive.
    here.reload(node(&ca, 1, Role::Worker)).unwrap();
    assert_eq!(both(), (false, false));
    // Nor does a roll that came late.
    here.refuse(roll(9, &[1, 3, 4, 5, 6, 7, 8, 9]));
    assert_eq!(both(), (false, false));
    // Who joined since then is no concern of it.
    let newer = worker(&ca, 10);
    assert!(welcome(&newer, Expect::Node(1), &here, &Admit::members()));
}

#[test]
fn a_renewed_credential_is_used_by_configs_that_exist() {
    let (old, now) = (ca(), SystemTime::now());
    let (client, server) = (worker(&old, 7), worker(&old, 1));
    let server_config = server.server_config(Admit::members(), &[]).unwrap();
    let client_config = client.client_config(Expect::Node(1), &[]).unwrap();
    let name = client.server_name(Expect::Node(1)).unwrap();
    let connect = || {
        let client = ClientConnection::new(client_config.clone(), name.clone()).unwrap();
        shake(client.into(), ServerConnection::new(server_config.clone()).unwrap().into())
    };
    assert_eq!(connect(), (Ok(()), Ok(())));
    // The authority is replaced in steps; at each the two ends understand each other.
    let new = old.successor(now).unwrap();
    let both = vec![old.certificate().clone(), new.certificate().clone()];
    let steps = [
        (node(&old, 1, Role::Worker).with_roots(both.clone()), None),
        (node(&old, 1, Role::Worker).with_roots(both.clone()), Some(&old)),
        (node(&new, 1, Role::Worker).with_roots(both.clone()), Some(&old)),
        (node(&new, 1, Role::Worker).with_roots(both.clone()), Some(&new)),
    ];
    for (renewed, by) in steps {
        server.reload(renewed).unwrap();
        if let Some(by) = by {
            let renewed = node(by, 7, Role::Worker).with_roots(both.clone());
            client.reload(renewed).unwrap();
        }
        assert_eq!(connect(), (Ok(()), Ok(())));
    }
    // In the end the old one counts no more.
    server.reload(node(&new, 1, Role::Worker)).unwrap();
    assert_eq!(connect(), (Ok(()), Ok(())));
    client.reload(node(&old, 7, Role::Worker).with_roots(both)).unwrap();
    let (_, said) = connect();
    assert_eq!(said.unwrap_err(), "its certificate is not of this cluster");
}

#[test]
fn nobody_becomes_another_by_a_reload() {
    let ca = ca();
    let here = worker(&ca, 1);
    let other = here.reload(node(&ca, 2, Role::Worker)).unwrap_err();
    assert!(matches!(other, Flaw::OtherPeer { .. }), "{other}");
    let promoted = here.reload(node(&ca, 1, Role::Coordinator)).unwrap_err();
    assert!(matches!(promoted, Flaw::OtherPeer { .. }), "{promoted}");
    let moved = here.reload(node(&self::ca(), 1, Role::Worker)).unwrap_err();
    assert!(matches!(moved, Flaw::OtherCluster { .. }), "{moved}");
    assert_eq!(here.credential().peer(), &Peer::Node { id: 1, role: Role::Worker });
    assert!(welcome(&worker(&ca, 7), Expect::Node(1), &here, &Admit::members()));
}

#[test]
fn a_session_is_never_resumed() {
    let ca = ca();
    let (client, server) = (worker(&ca, 7), worker(&ca, 1));
    let config = client.client_config(Expect::Node(1), &[]).unwrap();
    let admitting = server.server_config(Admit::members(), &[]).unwrap();
    let name = client.server_name(Expect::Node(1)).unwrap();
    for _ in 0..2 {
        let mut client = ClientConnection::new(config.clone(), name.clone()).unwrap();
        let mut server = ServerConnection::new(admitting.clone()).unwrap();
        let mut bytes = Vec::new();
        for _ in 0..3 {
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut std::mem::take(&mut bytes).as_slice()).unwrap();
            server.process_new_packets().unwrap();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            let mut rest = std::mem::take(&mut bytes);
            let mut rest = rest.as_mut_slice() as &[u8];
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    }
}
