//! A group of replicas in one thread: a network that is a list, disks that are values.

mod changes;
mod disk;
mod elections;
mod faults;
mod log;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use planner::NodeId;
use wire::pb;

use super::*;

/// A state machine that keeps every command, so that order and repetition show.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Words(pub(super) Vec<(u64, Vec<u8>)>);

impl Machine for Words {
    type Outcome = usize;

    fn apply(&mut self, index: u64, command: &[u8]) -> usize {
        self.0.push((index, command.to_vec()));
        self.0.len()
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (index, word) in &self.0 {
            out.extend(index.to_be_bytes());
            out.extend((word.len() as u64).to_be_bytes());
            out.extend(word);
        }
        out
    }

    fn restore(&mut self, mut bytes: &[u8]) -> Result<(), RestoreError> {
        let short = || RestoreError("short".to_owned());
        let mut words = Vec::new();
        while !bytes.is_empty() {
            let (index, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
            let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
            let len = u64::from_be_bytes(*len) as usize;
            let word = rest.get(..len).ok_or_else(short)?;
            words.push((u64::from_be_bytes(*index), word.to_vec()));
            bytes = &rest[len..];
        }
        self.0 = words;
        Ok(())
    }

    fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.snapshot()).as_bytes()
    }
}

/// A disk: what is durable, and how it is to fail.
#[derive(Debug, Default, Clone)]
pub(super) struct Disk {
    pub(super) image: LogImage,
    pub(super) full: bool,
    pub(super) low: bool,
    pub(super) broken: bool,
    pub(super) writes: u64,
}

impl LogStore for Disk {
    fn load(&mut self) -> Result<LogImage, StoreError> {
        Ok(self.image.clone())
    }

    fn write(&mut self, batch: &Batch) -> Result<(), StoreError> {
        if self.broken {
            return Err(std::io::Error::other("input/output error").into());
        }
        if self.full {
            return Err(StoreError::Full);
        }
        self.writes += 1;
        self.image.apply(batch)?;
        self.image.verify()
    }

    fn is_low(&self) -> bool {
        self.low
    }
}

pub(super) type Node = Replica<Disk, Words>;
type Event = Output<usize>;

pub(super) const CLUSTER: ClusterId = ClusterId([7; 16]);

pub(super) fn config(id: u64) -> ReplicaConfig {
    let mut config = ReplicaConfig::new(NodeId(id), CLUSTER, 11);
    config.election_ticks = 10;
    config.check_entries = 4;
    config.probe_ticks = 5;
    config
}

/// The whole group.
pub(super) struct Group {
    pub(super) nodes: BTreeMap<u64, Node>,
    pub(super) queue: VecDeque<(u64, u64, pb::RaftMessage)>,
    /// Links that lose everything, from and to.
    pub(super) cut: BTreeSet<(u64, u64)>,
    /// Snapshots are lost on their way, and nobody says so.
    pub(super) no_snapshots: bool,
    /// What every node said, but for messages.
    pub(super) heard: BTreeMap<u64, Vec<Event>>,
    pub(super) config: fn(u64) -> ReplicaConfig,
    requests: u64,
}

impl Group {
    /// One node that leads.
    pub(super) fn of_one(config: fn(u64) -> ReplicaConfig) -> Self {
        let node = Node::bootstrap(config(1), Disk::default(), Words::default()).unwrap();
        let nodes = BTreeMap::from([(1, node)]);
        let mut group = Self {
            nodes,
            queue: VecDeque::new(),
            cut: BTreeSet::new(),
            no_snapshots: false,
            heard: BTreeMap::new(),
            config,
            requests: 0,
        };
        group.put(1, Input::Campaign);
        group.run();
        group
    }

    /// So many voters; node 1 leads.
    pub(super) fn of(count: u64) -> Self {
        let mut group = Self::of_one(config);
        for id in 2..=count {
            group.add(id);
        }
        group
    }

    /// Adds a learner, waits until it has caught up, and promotes it.
    pub(super) fn add(&mut self, id: u64) {
        self.join(id);
        let leader = self.leader().unwrap();
        self.ticks(10);
        let status = self.nodes[&leader].status();
        assert_eq!(status.peers[&NodeId(id)].matched, status.last, "{status:?}");
        self.change(leader, MemberChange::Promote(NodeId(id))).unwrap();
    }

    /// Adds a learner.
    pub(super) fn join(&mut self, id: u64) {
        let node = Node::join((self.config)(id), Disk::default(), Words::default()).unwrap();
        self.nodes.insert(id, node);
        let leader = self.leader().unwrap();
        self.change(leader, MemberChange::AddLearner(NodeId(id))).unwrap();
    }

    /// Gives one input to one node.
    pub(super) fn put(&mut self, id: u64, input: Input) {
        let outputs = match self.nodes.get_mut(&id) {
            Some(node) => node.handle(input).unwrap(),
            None => return,
        };
        self.take(id, outputs);
    }

    pub(super) fn take(&mut self, id: u64, outputs: Vec<Event>) {
        for output in outputs {
            match output {
                Output::Send { to, message } => {
                    assert_eq!(message.from, id);
                    let snapshot = carries_snapshot(&message);
                    self.queue.push_back((id, to.0, message));
                    if snapshot {
                        self.queue.push_back((
                            id,
                            id,
                            pb::RaftMessage { to: to.0, ..pb::RaftMessage::default() },
                        ));
                    }
                }
                other => self.heard.entry(id).or_default().push(other),
            }
        }
    }

    /// Delivers until nothing is on its way.
    pub(super) fn run(&mut self) {
        for _ in 0..100_000 {
            let Some((from, to, message)) = self.queue.pop_front() else { return };
            if self.no_snapshots && (from == to || carries_snapshot(&message)) {
                continue;
            }
            if from == to {
                self.put(from, Input::SnapshotSent { peer: NodeId(message.to), ok: true });
            } else if !self.cut.contains(&(from, to)) {
                self.put(to, Input::Message { from: NodeId(from), message });
            }
        }
        panic!("the group never comes to rest");
    }

    /// So many ticks everywhere, delivering after each.
    pub(super) fn ticks(&mut self, count: usize) {
        for _ in 0..count {
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                self.put(id, Input::Tick);
            }
            self.run();
        }
    }

    pub(super) fn isolate(&mut self, id: u64) {
        for other in self.nodes.keys().filter(|other| **other != id) {
            self.cut.insert((id, *other));
            self.cut.insert((*other, id));
        }
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
    }

    /// Who leads, in the highest term that anybody leads in.
    pub(super) fn leader(&self) -> Option<u64> {
        let leading = self.nodes.iter().filter(|(_, node)| node.role.2);
        leading.max_by_key(|(_, node)| node.role.0).map(|(id, _)| *id)
    }

    /// Ticks until somebody leads of whom a majority hears.
    pub(super) fn elect(&mut self) -> u64 {
        for _ in 0..100 {
            self.ticks(1);
            let Some(leader) = self.leader() else { continue };
            let term = self.nodes[&leader].role.0;
            let follow = self.nodes.values().filter(|node| node.role.0 == term).count();
            if follow * 2 > self.nodes[&leader].members.voters.len() {
                return leader;
            }
        }
        panic!("nobody leads");
    }

    pub(super) fn request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// Proposes and delivers; what came of it, if anything did.
    pub(super) fn propose(&mut self, id: u64, word: &str) -> (u64, Option<Event>) {
        let request = self.request();
        self.put(id, Input::Propose { request, command: word.into() });
        self.run();
        (request, self.answer(id, request))
    }

    pub(super) fn read(&mut self, id: u64) -> (u64, Option<Event>) {
        let request = self.request();
        self.put(id, Input::Read { request });
        self.run();
        (request, self.answer(id, request))
    }

    pub(super) fn change(&mut self, id: u64, change: MemberChange) -> Result<u64, ProposeError> {
        let request = self.request();
        self.put(id, Input::Change { request, change });
        self.run();
        match self.answer(id, request) {
            Some(Output::Changed { index, .. }) => Ok(index),
            Some(Output::Refused { why, .. }) => Err(why),
            other => panic!("{other:?}"),
        }
    }

    /// The only answer to this number; two would be wrong.
    pub(super) fn answer(&self, id: u64, number: u64) -> Option<Event> {
        let heard = self.heard.get(&id).map(Vec::as_slice).unwrap_or_default();
        let mut answers = heard.iter().filter(|event| match event {
            Output::Applied { request, .. } | Output::Changed { request, .. } => {
                *request == Some(number)
            }
            Output::Refused { request, .. } | Output::ReadReady { request, .. } => {
                *request == number
            }
            _ => false,
        });
        let answer = answers.next().cloned();
        assert_eq!(answers.next(), None, "answered twice");
        answer
    }

    /// The process dies; what it said is forgotten, what is on its way stays.
    pub(super) fn kill(&mut self, id: u64) -> Disk {
        self.heard.remove(&id);
        self.nodes.remove(&id).unwrap().into_store()
    }

    pub(super) fn start(&mut self, id: u64, disk: Disk) {
        let node = Node::open((self.config)(id), disk, Words::default()).unwrap();
        self.nodes.insert(id, node);
    }

    pub(super) fn restart(&mut self, id: u64) {
        let disk = self.kill(id);
        self.start(id, disk);
    }

    pub(super) fn words(&self, id: u64) -> Vec<String> {
        let words = &self.nodes[&id].machine().0;
        words.iter().map(|(_, word)| String::from_utf8(word.clone()).unwrap()).collect()
    }

    pub(super) fn voters(&self, id: u64) -> Vec<u64> {
        self.nodes[&id].members.voters.iter().map(|id| id.0).collect()
    }
}

pub(super) fn applied(answer: Option<Event>) -> u64 {
    match answer {
        Some(Output::Applied { index, .. }) => index,
        other => panic!("{other:?}"),
    }
}

pub(super) fn refused(answer: Option<Event>) -> ProposeError {
    match answer {
        Some(Output::Refused { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}
