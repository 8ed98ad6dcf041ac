//! Ports of node processes as the kernel lists them, and what strangers get who knock there.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::{Cluster, Ground, Process, demo_model, output};
use crate::network::skipped;

/// How HTTP/2 begins, with an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// How long an answer is waited for: a port that stays silent has answered nothing. The tensor
/// plane takes connections only while a group forms.
const SILENCE: Duration = Duration::from_secs(2);
/// The first byte of a TLS record that is an alert.
const ALERT: u8 = 0x15;
/// The longest alert: a header of five bytes, and two.
const ALERT_LENGTH: usize = 7;
/// States of a connection in the kernel's table.
const LISTENING: &str = "0A";
const ESTABLISHED: &str = "01";

/// Own and other address of a process's connections in `state`, as the kernel writes them.
fn table(process: &Process, state: &str) -> Vec<(String, String)> {
    let proc = format!("/proc/{}", process.id());
    let files = std::fs::read_dir(format!("{proc}/fd")).expect("its open files");
    let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    let sockets: Vec<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("{proc}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let inode = format!("socket:[{}]", fields[9]);
            if fields[3] == state && sockets.contains(&inode) {
                found.push((fields[1].to_owned(), fields[2].to_owned()));
            }
        }
    }
    found
}

/// Addresses on the loopback where a process listens.
fn listening(process: &Process) -> Vec<SocketAddr> {
    let port = |own: &str| u16::from_str_radix(own.rsplit(':').next()?, 16).ok();
    let ports = table(process, LISTENING).into_iter().filter_map(|(own, _)| port(&own));
    ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect()
}

/// Established connections of a process but those of its HTTP port.
pub(crate) fn connections(process: &Process) -> Vec<(String, String)> {
    let http = process.addresses["http"].as_str().and_then(|http| http.rsplit(':').next());
    let http = http.and_then(|port| port.parse::<u16>().ok()).map(|port| format!(":{port:04X}"));
    let all = table(process, ESTABLISHED).into_iter();
    all.filter(|(own, _)| http.as_ref().is_none_or(|http| !own.ends_with(http))).collect()
}

/// What a port does with a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It said nothing past the handshake.
    Refused,
    /// It spoke the protocol behind the handshake.
    Spoke,
}

pub(crate) fn has_openssl() -> bool {
    Command::new("openssl").arg("version").stdout(Stdio::null()).status().is_ok()
}

/// A TLS client of somebody else's making; certificate and key as files.
fn client(address: &str) -> Command {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", address, "-alpn", "h2"]);
    command
}

/// Does a handshake, speaks HTTP/2 and waits for what comes back.
pub(crate) fn hello(address: &str, identity: Option<(&str, &str)>) -> Answer {
    let mut command = client(address);
    command.arg("-quiet");
    if let Some((certificate, key)) = identity {
        command.args(["-cert", certificate, "-key", key]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("openssl");
    let mut stdin = child.stdin.take().expect("its standard input");
    // It may be gone already.
    let _ = stdin.write_all(PREFACE).and_then(|()| stdin.flush());
    let mut said = [0; 9];
    let mut stdout = child.stdout.take().expect("its standard output");
    // Input stays open: what ends the connection is the other side.
    let spoke = stdout.read(&mut said).expect("a pipe") > 0;
    let _ = child.kill();
    let _ = child.wait();
    if spoke { Answer::Spoke } else { Answer::Refused }
}

/// The certificate that a port shows, as PEM.
pub(crate) fn shown(address: &str) -> String {
    let said = output(&mut client(address)).stdout;
    let said = String::from_utf8_lossy(&said).into_owned();
    let end = "-----END CERTIFICATE-----";
    let found = said.find("-----BEGIN CERTIFICATE-----").zip(said.find(end));
    found.map(|(from, to)| said[from..to + end.len()].to_owned()).unwrap_or_default()
}

/// What comes back for bytes that are no TLS.
fn knock(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(SILENCE)).expect("a timeout");
    let mut answer = Vec::new();
    // It may be closed before everything is written.
    let _ = stream.write_all(bytes);
    // Closed, reset or silent: what came until then is what it said.
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn a_port_between_nodes_answers_no_stranger() {
    let mut cluster = Cluster::start(&demo_model(), 2, &[]);
    let strangers = Ground::new();
    let stranger = strangers.data("coordinator-1");
    let stranger = (format!("{stranger}/node.pem"), format!("{stranger}/node-key.pem"));
    let own = cluster.ground.data("worker-1");
    let own = (format!("{own}/node.pem"), format!("{own}/node-key.pem"));
    let http: SocketAddr =
        cluster.coordinator.addresses["http"].as_str().and_then(|at| at.parse().ok()).expect("one");
    let nodes = [&cluster.coordinator, &cluster.workers[0], &cluster.workers[1]];
    let noise: Vec<u8> =
        (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let raw: [(&str, &[u8]); 5] = [
        ("HTTP/2", PREFACE),
        ("HTTP/1", b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"),
        ("noise", &noise),
        ("zeros", &[0; 64]),
        // A TLS record that claims to be a handshake, and is none.
        ("half a hello", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"),
    ];
    for node in nodes {
        let ports = listening(node);
        assert!(ports.iter().any(|port| port.to_string() == node.cluster()), "{ports:?}");
        for port in ports.into_iter().filter(|port| *port != http) {
            for (what, bytes) in raw {
                let answer = knock(port, bytes);
                let alert = answer.first() == Some(&ALERT) && answer.len() == ALERT_LENGTH;
                assert!(answer.is_empty() || alert, "{port} answers {what}: {answer:?}");
            }
            println!("{port} of {} answers nothing but alerts to what is no TLS", node.id());
            if port.to_string() != node.cluster() {
                // Nobody takes a connection here just now, so a handshake would wait for ever.
                continue;
            }
            if !has_openssl() {
                skipped(
                    "a_port_between_nodes_answers_no_stranger, with TLS",
                    "there is no openssl",
                );
                continue;
            }
            let port = port.to_string();
            assert_eq!(hello(&port, None), Answer::Refused, "{port}: no certificate");
            let other = Some((stranger.0.as_str(), stranger.1.as_str()));
            assert_eq!(hello(&port, other), Answer::Refused, "{port}: of another cluster");
            // The same client is answered where it shows a certificate that counts.
            let known = hello(&port, Some((&own.0, &own.1)));
            assert_eq!(known, Answer::Spoke, "{port}: a node of this cluster");
        }
    }
    // Nobody was disturbed.
    cluster.http().ready();
    cluster.workers.clear();
}
