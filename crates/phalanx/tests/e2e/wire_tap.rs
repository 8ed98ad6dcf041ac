//! Everything that crosses between nodes while somebody chats, captured and searched.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::control_plane::Fleet;
use crate::harness::{Http, demo_model};
use crate::network;

/// What is typed, unlike anything that the model or a certificate holds.
const PROMPT: &str = "Quetzalcoatl and Xiuhtecuhtli play tlachtli at Teotihuacan; who wins?";
/// Bytes of a text that do not turn up by chance.
const TEXT: usize = 10;
/// Bytes of weights that do not either.
const WEIGHTS: usize = 16;
/// How a TLS connection begins: a record of handshake, of version 3.
const HANDSHAKE: [u8; 2] = [0x16, 0x03];
/// Lengths of the headers of a capture file, of a packet in it, and of a frame.
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;
const FRAME_HEADER: usize = 14;

/// A capture that runs.
struct Tap {
    child: Child,
    file: tempfile::TempDir,
}

impl Tap {
    /// Captures what crosses the loopback, from now on.
    fn start() -> Self {
        let file = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new("tcpdump");
        // As the user who may read the file; written packet by packet; whole packets.
        command.args(["-i", "lo", "-Z", "root", "-U", "-s", "0", "-B", "65536", "-w"]);
        command.arg(file.path().join("pcap")).args(["tcp"]).stderr(Stdio::piped());
        let mut child = command.spawn().expect("tcpdump");
        let mut said = String::new();
        let stderr = child.stderr.take().expect("its standard error");
        let mut stderr = BufReader::new(stderr);
        while !said.contains("listening on") {
            let read = stderr.read_line(&mut said).expect("what tcpdump says");
            assert!(read > 0, "tcpdump does not start: {said}");
        }
        // What it says when it ends is read by nobody, and fits a pipe.
        child.stderr = Some(stderr.into_inner());
        Self { child, file }
    }

    /// What was captured, by (source port, destination port), up to one more question to the
    /// gateway: on a busy machine the capture lags behind.
    fn end(self, gateway: &Http) -> Flows {
        let id = self.child.id().to_string();
        let last = "the-last-word";
        assert_eq!(gateway.get(&format!("/v1/models/{last}")).0, 404);
        gateway.wait("to be heard by the capture", || {
            let so_far = std::fs::read(self.file.path().join("pcap")).expect("a capture");
            so_far.windows(last.len()).any(|window| window == last.as_bytes())
        });
        let stopped = Command::new("kill").args(["-INT", &id]).status().expect("a signal");
        assert!(stopped.success());
        let said = self.child.wait_with_output().expect("the end of tcpdump");
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.contains("\n0 packets dropped by kernel"), "packets were lost: {said}");
        flows(&std::fs::read(self.file.path().join("pcap")).expect("a capture"))
    }
}

/// Bytes that went one way of a connection, by its ports.
type Flows = BTreeMap<(u16, u16), Vec<u8>>;

fn short(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Puts the segments of a capture together. On a loopback they arrive once, and in order.
fn flows(capture: &[u8]) -> Flows {
    assert_eq!(&capture[..4], &[0xd4, 0xc3, 0xb2, 0xa1], "not a capture of this machine's order");
    let mut flows = Flows::new();
    let mut at = FILE_HEADER;
    while at + PACKET_HEADER <= capture.len() {
        let length = capture[at + 8..at + 12].try_into().expect("four bytes");
        let length = u32::from_le_bytes(length) as usize;
        let frame = &capture[at + PACKET_HEADER..at + PACKET_HEADER + length];
        at += PACKET_HEADER + length;
        if short(frame, 12) != 0x0800 {
            continue;
        }
        let packet = &frame[FRAME_HEADER..];
        let segment = &packet[usize::from(packet[0] & 15) * 4..usize::from(short(packet, 2))];
        let payload = &segment[usize::from(segment[12] >> 4) * 4..];
        let flow = flows.entry((short(segment, 0), short(segment, 2))).or_default();
        flow.extend_from_slice(payload);
    }
    flows
}

/// Every run of `length` bytes of `text`.
fn pieces(text: &[u8], length: usize) -> HashSet<&[u8]> {
    text.windows(length).collect()
}

/// Pieces of one length that are looked for.
struct Needles<'a> {
    pieces: HashSet<&'a [u8]>,
    length: usize,
    /// By the first three bytes, whether a piece begins so: most places need no closer look.
    begins: Vec<bool>,
}

impl<'a> Needles<'a> {
    fn new(pieces: HashSet<&'a [u8]>, length: usize) -> Self {
        let mut begins = vec![false; 1 << 24];
        pieces.iter().for_each(|piece| begins[beginning(piece)] = true);
        Self { pieces, length, begins }
    }

    /// Whether one of them stands in `bytes`.
    fn stand_in(&self, bytes: &[u8]) -> bool {
        let mut windows = bytes.windows(self.length);
        windows.any(|window| self.begins[beginning(window)] && self.pieces.contains(window))
    }
}

fn beginning(piece: &[u8]) -> usize {
    usize::from(piece[0]) << 16 | usize::from(piece[1]) << 8 | usize::from(piece[2])
}

/// Token ids as messages between nodes write them.
fn varints(tokens: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    for token in tokens.as_array().expect("tokens") {
        let mut token = token.as_u64().expect("a token");
        while token >= 128 {
            bytes.push((token & 127) as u8 | 128);
            token >>= 7;
        }
        bytes.push(token as u8);
    }
    bytes
}

/// Pieces of the weights file that say something: neither zeros nor one value again and again.
fn weights(file: &[u8]) -> HashSet<&[u8]> {
    let varied = |piece: &&[u8]| piece.iter().collect::<HashSet<_>>().len() > WEIGHTS / 2;
    file.chunks_exact(WEIGHTS).filter(varied).collect()
}

/// Chats with a gateway; the text of the answer.
fn chat(fleet: &Fleet) -> String {
    let http = fleet.coordinators[1].1.http();
    let body = json!({
        "model": "demo", "max_tokens": 200, "temperature": 0, "ignore_eos": true,
        "messages": [{ "role": "user", "content": PROMPT }],
    });
    let (status, answer) = http.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["message"]["content"].as_str().expect("an answer").to_owned()
}

/// The port of an address.
fn port(address: &str) -> u16 {
    address.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

#[test]
fn nothing_readable_crosses_between_nodes() {
    network::inside("wire_tap::nothing_readable_crosses_between_nodes", &["tcpdump"], || {
        let tap = Tap::start();
        let fleet = Fleet::start(3, 2, 2);
        let gateway = fleet.coordinators[1].1.http();
        let answer = chat(&fleet);
        let prompt = gateway.post("/tokenize", &json!({ "model": "demo", "prompt": PROMPT })).1;
        let spoken = gateway.post("/tokenize", &json!({ "model": "demo", "prompt": answer })).1;
        let https: Vec<u16> =
            fleet.coordinators.iter().map(|(_, one)| port(&one.http().base)).collect();
        let nodes: Vec<u16> = fleet
            .coordinators
            .iter()
            .map(|(_, one)| one)
            .chain(&fleet.workers)
            .map(|one| port(&one.cluster()))
            .collect();
        let flows = tap.end(&gateway);
        let (outside, between): (Flows, Flows) = flows
            .into_iter()
            .partition(|((from, to), _)| https.contains(from) || https.contains(to));
        let bytes = |flows: &Flows| flows.values().map(Vec::len).sum::<usize>();
        let tensors =
            between.iter().filter(|((from, to), _)| !nodes.contains(from) && !nodes.contains(to));
        let tensors: usize = tensors.map(|(_, bytes)| bytes.len()).sum();
        println!(
            "{} bytes between nodes in {} directions, {tensors} of them tensors; {} bytes of HTTP",
            bytes(&between),
            between.len(),
            bytes(&outside)
        );
        assert!(tensors > 100_000, "the tensor plane is not in the capture");
        assert!(nodes.iter().all(|port| between.keys().any(|(_, to)| to == port)), "{nodes:?}");
        let file = std::fs::read(demo_model().join("model.safetensors")).expect("weights");
        let tokens = [varints(&prompt["tokens"]), varints(&spoken["tokens"])];
        let secrets = [
            ("the prompt", Needles::new(pieces(PROMPT.as_bytes(), TEXT), TEXT)),
            ("the answer", Needles::new(pieces(answer.as_bytes(), TEXT), TEXT)),
            ("the prompt's tokens", Needles::new(pieces(&tokens[0], TEXT), TEXT)),
            ("the answer's tokens", Needles::new(pieces(&tokens[1], TEXT), TEXT)),
            ("weights", Needles::new(weights(&file), WEIGHTS)),
        ];
        for ((from, to), bytes) in &between {
            assert!(bytes.is_empty() || bytes.starts_with(&HANDSHAKE), "{from} to {to} is no TLS");
            for (what, needles) in &secrets {
                assert!(!needles.pieces.is_empty(), "nothing to look for: {what}");
                assert!(!needles.stand_in(bytes), "{what} crossed from {from} to {to}");
            }
        }
        // The same search finds in the same capture what does cross in the open, as JSON.
        for (what, text) in [("the prompt", PROMPT), ("the answer", answer.as_str())] {
            let written = Value::from(text).to_string();
            let pieces = pieces(written.trim_matches('"').as_bytes(), TEXT);
            let needles = Needles::new(pieces, TEXT);
            let found = outside.values().any(|bytes| needles.stand_in(bytes));
            assert!(found, "the search does not find {what} where it is: {written}");
        }
    });
}
