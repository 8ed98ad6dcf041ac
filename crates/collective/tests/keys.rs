//! Keys of TLS wear out: after so many records both ends go over to new ones, in the middle of
//! everything. With AES that is after 2^24 records, some minutes of a busy link; here after 20.

mod support;

use std::sync::{Arc, OnceLock};

use collective::{Kind, Link};
use identity::Tls;
use rustls::crypto::ring::{self, cipher_suite::TLS13_AES_128_GCM_SHA256};
use rustls::crypto::{CipherSuiteCommon, CryptoProvider};
use rustls::time_provider::DefaultTimeProvider;
use rustls::{SupportedCipherSuite, Tls13CipherSuite};
use support::nodes::{Node, credential};
use support::{HERE, SOON, addresses, bits, each, endpoints, values};

/// Records under one key.
const RECORDS: u64 = 20;

/// The node that holds a rank, with keys that wear out at once.
fn hasty(rank: usize) -> Node {
    static SUITE: OnceLock<Tls13CipherSuite> = OnceLock::new();
    let usual = TLS13_AES_128_GCM_SHA256.tls13().expect("a suite of TLS 1.3");
    let suite = SUITE.get_or_init(|| {
        let (suite, hash_provider) = (usual.common.suite, usual.common.hash_provider);
        Tls13CipherSuite {
            common: CipherSuiteCommon { suite, hash_provider, confidentiality_limit: RECORDS },
            hkdf_provider: usual.hkdf_provider,
            aead_alg: usual.aead_alg,
            quic: None,
        }
    });
    let cipher_suites = vec![SupportedCipherSuite::Tls13(suite)];
    let provider = CryptoProvider { cipher_suites, ..ring::default_provider() };
    let credential = credential(100 + rank as u64);
    let tls = Tls::with_provider(credential, Arc::new(DefaultTimeProvider), provider);
    Node { tls: tls.expect("a good credential") }
}

#[test]
fn keys_are_replaced_while_both_ends_send() {
    let endpoints = endpoints(2);
    let peers = addresses(&endpoints);
    each(endpoints.iter().enumerate().collect(), |(rank, endpoint)| {
        let link = endpoint.connect(HERE, rank, &peers, &hasty(rank), SOON);
        let mut link = link.expect("connected");
        link.set_timeout(SOON);
        // Small frames, which the caller writes, and ones of hundreds of records, which it does
        // not; what is read ahead while waiting is part of it.
        for sequence in 0..300 {
            let count = if sequence % 50 == 7 { 1 << 20 } else { 300 };
            let sent = values(count, sequence as u32);
            let mut into = vec![0.0; count];
            link.send(1 - rank, Kind::Partials, sequence, &sent).expect("sent");
            link.receive(1 - rank, Kind::Partials, sequence, &mut into).expect("received");
            assert_eq!(bits(&into), bits(&sent), "frame {sequence}");
        }
    });
}
