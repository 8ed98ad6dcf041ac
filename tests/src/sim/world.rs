//! The world: nodes, a network and a clock in one thread, driven by a heap of events.

use std::collections::{BTreeMap, BTreeSet};

use control::replica::{Fatal, Input, Output, ProposeError, StoreError};
use planner::NodeId;
use wire::pb;

use super::checks::{Checked, Checks, Violation, ensure};
use super::client::{Answer, Client, Wish};
use super::disk::{Lie, Platter};
use super::linear::Operation;
use super::net::Network;
use super::node::{CLIENTS, Crash, FIRST, Gone, Node, Waiting, picture};
use super::operator::Operator;
use super::plan::{ELECTION, Plan, TICK};
use super::rng::Rng;
use super::run::Mutation;
use super::stats::Stats;
use super::trace::Trace;
use super::workload::{Decided, Outcome, Workload};

/// Something that is to happen.
#[derive(Debug)]
pub enum Event<W: Workload> {
    /// A tick of a process.
    Tick {
        /// Whose.
        node: u64,
        /// Which of its lives.
        life: u64,
    },
    /// Bytes arrive.
    Deliver {
        /// Over whose connection.
        from: u64,
        /// Where.
        to: u64,
        /// A message, encoded.
        bytes: Vec<u8>,
        /// Whether the gate must refuse it.
        forged: bool,
    },
    /// What the transport says about something sent.
    Report {
        /// To whom it says so.
        node: u64,
        /// In which life.
        life: u64,
        /// What.
        input: Box<Input>,
    },
    /// A client's question arrives.
    Ask {
        /// Whose.
        client: u64,
        /// Its number.
        serial: u64,
        /// Where.
        node: u64,
        /// The question.
        wish: Wish,
    },
    /// An answer arrives at a client.
    Answer {
        /// Whose.
        client: u64,
        /// To which question.
        serial: u64,
        /// By whom.
        node: u64,
        /// The answer.
        answer: Answer,
    },
    /// A client begins an operation.
    Wake(u64),
    /// A client has waited long enough for one node.
    Patience {
        /// Who.
        client: u64,
        /// For which operation.
        serial: u64,
        /// For which attempt.
        attempt: u64,
    },
    /// A process starts.
    Restart(u64),
    /// A removed node is switched off.
    Retire(u64),
    /// The next fault.
    Trouble,
    /// The operator looks.
    Operate,
    /// Cuts of the network end.
    Rejoin,
    /// A disk has room and speed again.
    Repaired(u64),
    /// Something of the workload's.
    Own(W::Event),
}

/// Whether an output is a vote for somebody.
fn votes<O>(output: &Output<O>) -> bool {
    let Output::Send { message, .. } = output else { return false };
    message.kind() == pb::RaftKind::VoteResponse && !message.reject
}

/// A world.
pub struct World<W: Workload> {
    /// What the run is to be.
    pub plan: Plan,
    /// Microseconds since the start.
    pub now: u64,
    /// Chance, of everything but clients.
    pub rng: Rng,
    heap: BTreeMap<(u64, u64), Event<W>>,
    pushed: u64,
    /// Of the event that is happening.
    number: u64,
    /// Events that wait for somebody who stands still.
    waiting: BTreeSet<u64>,
    /// Every node there ever was.
    pub nodes: BTreeMap<u64, Node<W>>,
    /// Between them.
    pub network: Network,
    /// Who reads and writes.
    pub clients: Vec<Client>,
    /// What clients saw.
    pub history: Vec<Operation>,
    /// Who changes members.
    pub operator: Operator,
    /// What must hold.
    pub checks: Checks<W>,
    /// What happened, counted.
    pub stats: Stats,
    /// What happened, told.
    pub trace: Trace,
    /// What is wrong on purpose.
    pub mutation: Option<Mutation>,
    /// Whether faults and new operations are over.
    pub healed: bool,
    /// Whether somebody tells what is to happen, restarts included.
    pub told: bool,
    /// What else there is.
    pub extra: W::Extra,
}

impl<W: Workload> World<W> {
    /// A world with its first node started.
    ///
    /// # Errors
    /// A violation, were one to show so early.
    pub fn new(plan: Plan, mutation: Option<Mutation>, trace: Trace) -> Result<Self, Violation> {
        let rng = Rng::new(plan.seed, 1);
        let network = Network::new(plan.net.clone());
        let clients = (0..=plan.clients).map(|id| Client::new(plan.seed, id)).collect();
        let mut world = Self {
            operator: Operator::new(plan.coordinators),
            plan,
            now: 0,
            rng,
            heap: BTreeMap::new(),
            pushed: 0,
            number: 0,
            waiting: BTreeSet::new(),
            nodes: BTreeMap::new(),
            network,
            clients,
            history: Vec::new(),
            checks: Checks::new(mutation),
            stats: Stats { runs: 1, ..Stats::default() },
            trace,
            mutation,
            healed: false,
            told: false,
            extra: W::Extra::default(),
        };
        world.add_node(FIRST)?;
        Ok(world)
    }

    /// Makes and starts a node.
    ///
    /// # Errors
    /// A violation: a new node must start.
    pub fn add_node(&mut self, id: u64) -> Checked {
        let drift = self.plan.drift;
        let tick = TICK * (1000 - drift + self.rng.below(2 * drift + 1)) / 1000;
        self.nodes.insert(
            id,
            Node::new(
                id,
                tick,
                Platter::new(self.mutation.and_then(Mutation::lie), self.plan.real_store),
            ),
        );
        self.stats.nodes += 1;
        self.restart(id)
    }

    /// Lets `event` happen at `at`.
    pub fn schedule(&mut self, at: u64, event: Event<W>) {
        self.pushed += 1;
        self.heap.insert((at.max(self.now), self.pushed), event);
    }

    /// Lets the event that is just happening happen later, in its old place among those that wait
    /// for the same moment.
    pub(super) fn put_off(&mut self, until: u64, event: Event<W>) {
        self.heap.insert((until.max(self.now), self.number), event);
        self.waiting.insert(self.number);
    }

    /// Nobody stands still any more: what waited for it happens now, in its old order.
    pub(super) fn wake_all(&mut self) {
        let waiting = std::mem::take(&mut self.waiting);
        let now = self.now;
        let heap = std::mem::take(&mut self.heap).into_iter();
        let moved = heap.map(|((at, number), event)| {
            let at = if waiting.contains(&number) { now } else { at };
            ((at, number), event)
        });
        self.heap = moved.collect();
    }

    /// Lets `event` happen after `delay`.
    pub fn after(&mut self, delay: u64, event: Event<W>) {
        self.schedule(self.now + delay, event);
    }

    /// Runs until `until`.
    ///
    /// # Errors
    /// The first violation.
    pub fn run_until(&mut self, until: u64) -> Checked {
        while let Some(entry) = self.heap.first_entry().filter(|entry| entry.key().0 <= until) {
            let ((at, number), event) = entry.remove_entry();
            (self.now, self.number) = (self.now.max(at), number);
            self.waiting.remove(&number);
            self.happen(event)?;
            W::settle(self)?;
        }
        self.now = self.now.max(until);
        Ok(())
    }

    /// The node an event has to wait for, should it stand still.
    fn waits_for(&self, event: &Event<W>) -> Option<u64> {
        let node = match event {
            Event::Tick { node, .. } | Event::Report { node, .. } | Event::Ask { node, .. } => {
                *node
            }
            Event::Deliver { to, .. } => *to,
            Event::Own(event) => W::needs(self, event)?,
            _ => return None,
        };
        let busy = self.nodes.get(&node).map(|node| node.busy)?;
        (busy > self.now).then_some(busy)
    }

    fn happen(&mut self, event: Event<W>) -> Checked {
        if let Some(busy) = self.waits_for(&event) {
            self.put_off(busy, event);
            return Ok(());
        }
        match event {
            Event::Tick { node, life } => self.tick(node, life),
            Event::Deliver { from, to, bytes, forged } => self.deliver(from, to, &bytes, forged),
            Event::Report { node, life, input } => {
                let lives = self.nodes.get(&node).is_some_and(|node| node.life == life);
                if lives { self.feed(node, *input) } else { Ok(()) }
            }
            Event::Ask { client, serial, node, wish } => self.asked(client, serial, node, wish),
            Event::Answer { client, serial, node, answer } => {
                self.answered(client, serial, node, answer)
            }
            Event::Wake(client) => self.wake(client),
            Event::Patience { client, serial, attempt } => self.impatient(client, serial, attempt),
            Event::Restart(node) => self.restart(node),
            Event::Retire(node) => {
                self.retire(node);
                Ok(())
            }
            Event::Trouble => self.trouble(),
            Event::Operate => self.operate(),
            Event::Own(event) => W::happen(self, event),
            Event::Rejoin => {
                self.trace.line(self.now, || "the network is whole");
                self.network.heal();
                Ok(())
            }
            Event::Repaired(node) => {
                self.repaired(node);
                Ok(())
            }
        }
    }

    fn tick(&mut self, id: u64, life: u64) -> Checked {
        let Some(node) = self.nodes.get(&id).filter(|node| node.life == life && node.runs()) else {
            return Ok(());
        };
        self.after(node.tick, Event::Tick { node: id, life });
        self.feed(id, Input::Tick)?;
        let Some(process) = self.nodes.get(&id).and_then(|node| node.process.as_ref()) else {
            return Ok(());
        };
        let status = process.replica.status();
        // One that waits for its disk may know of more than its disk holds.
        if !status.storage_full {
            self.committed(id, status.commit)?;
        }
        W::ticked(self, id)
    }

    /// Notes that `id` says so much is committed.
    fn committed(&mut self, id: u64, index: u64) -> Checked {
        let term = self.nodes.get(&id).and_then(|node| node.platter.term(index));
        match term {
            Some(term) if index > 0 => self.checks.committed(id, index, term),
            _ => Ok(()),
        }
    }

    fn deliver(&mut self, from: u64, to: u64, bytes: &[u8], forged: bool) -> Checked {
        let refused = |world: &Self| {
            let process = world.nodes.get(&to).and_then(|node| node.process.as_ref());
            let status = process.map(|process| process.replica.status());
            // One that was removed, or waits for its disk, looks at nothing.
            let looks = status.filter(|status| !status.removed && !status.storage_full);
            looks.map(|s| s.refused.values().sum::<u64>())
        };
        let Some(before) = (if forged { refused(self) } else { Some(0) }) else {
            return Ok(());
        };
        let Ok(message) = <pb::RaftMessage as prost::Message>::decode(bytes) else {
            return ensure(forged, || "an honest message does not decode".to_owned());
        };
        self.stats.messages += 1;
        let shown = forged.then(|| message.clone());
        self.stats.forged += u64::from(forged);
        self.feed(to, Input::Message { from: NodeId(from), message })?;
        let passed = forged && refused(self).is_some_and(|after| after == before);
        ensure(!passed, || format!("{to} did not refuse, from {from}: {shown:?}"))
    }

    /// Gives a node an input and does what it wants done.
    ///
    /// # Errors
    /// A violation.
    pub fn feed(&mut self, id: u64, input: Input) -> Checked {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(process) = &mut node.process else { return Ok(()) };
        let result = process.replica.handle(input);
        let applied = process.replica.machine().take();
        let (writes, entries) = node.platter.take();
        if writes > 0 && node.write_time > 0 {
            node.busy = node.busy.max(self.now + writes * node.write_time);
        }
        self.stats.applied += applied.len() as u64;
        for (position, digest) in entries {
            self.checks.entry(id, position.index, position.term, digest)?;
        }
        for (record, hash) in applied {
            self.checks.applied(id, &record)?;
            if let Some(hash) = hash {
                self.checks.hash(id, record.index, hash)?;
            }
        }
        let mut outputs = match result {
            Ok(outputs) => outputs,
            Err(fatal) => return self.died(id, &fatal),
        };
        let crash = self.nodes.get(&id).and_then(|node| node.crash);
        let ends = match crash {
            Some(Crash::Sending(_)) => !outputs.is_empty(),
            Some(Crash::Voting) => outputs.iter().any(votes),
            Some(Crash::Writing) | None => false,
        };
        if let (true, Some(Crash::Sending(share))) = (ends, crash) {
            outputs.truncate(outputs.len() * share as usize / 1000);
        }
        for output in outputs {
            self.perform(id, output)?;
        }
        if ends {
            self.crash(id);
        }
        Ok(())
    }

    fn perform(&mut self, id: u64, output: Output<Outcome<W>>) -> Checked {
        match output {
            Output::Send { to, message } => self.send(id, to.0, message),
            Output::Applied { index, request, outcome } => {
                W::applied(self, id, &outcome)?;
                match self.waiting(id, request) {
                    Some(Waiting::Write { client, serial, wish }) => {
                        self.answer(id, client, serial, W::answer(wish, &outcome));
                    }
                    Some(_) => {}
                    None => self.decided(id, request, Decided::Outcome(outcome))?,
                }
                self.committed(id, index)
            }
            Output::Changed { index, request } => {
                if self.waiting(id, request).is_none() {
                    self.decided(id, request, Decided::Changed)?;
                }
                self.stats.changes += u64::from(self.checks.change(index));
                self.committed(id, index)
            }
            Output::Refused { request, why } => self.refused(id, request, why),
            Output::ReadReady { request, .. } => {
                self.read_ready(id, request);
                Ok(())
            }
            Output::Role { term, leader, leading } => self.role(id, term, leader, leading),
            Output::Members(members) => {
                self.trace.line(self.now, || format!("{id}: members {}", picture(&members)));
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.members = members;
                }
                Ok(())
            }
            Output::Restored { index } => {
                self.trace.line(self.now, || format!("{id}: restored at {index}"));
                self.stats.restored += 1;
                self.committed(id, index)
            }
            Output::Room { room } => {
                self.trace.line(self.now, || format!("{id}: room {room}"));
                Ok(())
            }
            Output::Removed => {
                self.trace.line(self.now, || format!("{id}: removed"));
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.removed = true;
                }
                if !self.told {
                    let rest = self.rng.below(2_000_000);
                    self.after(rest, Event::Retire(id));
                }
                Ok(())
            }
        }
    }

    fn role(&mut self, id: u64, term: u64, leader: Option<NodeId>, leading: bool) -> Checked {
        self.trace.line(self.now, || {
            let leader = leader.map(|leader| leader.0);
            format!("{id}: term {term} leader {leader:?}{}", if leading { " leads" } else { "" })
        });
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        if leading && self.checks.leads(id, term, |index| node.platter.term(index))? {
            self.stats.elections += 1;
        }
        let Some(process) = &mut node.process else { return Ok(()) };
        let before = std::mem::replace(&mut process.leads, leading.then_some(term));
        if before.is_some() == leading { Ok(()) } else { W::role(self, id, leading) }
    }

    /// A promise is given once and rests on what is durable.
    fn may_say(&mut self, from: u64, to: u64, message: &pb::RaftMessage) -> Checked {
        let Some(node) = self.nodes.get(&from).filter(|_| !message.reject) else { return Ok(()) };
        let (term, index) = (message.term, message.index);
        // This disk forgets votes as it takes them; only what comes of it may show.
        let forgets = self.mutation == Some(Mutation::Disk(Lie::VoteForgotten));
        let durable = match message.kind() {
            pb::RaftKind::AppendResponse => node.platter.reaches(index),
            pb::RaftKind::Vote if !forgets => node.platter.has_vote(term, from),
            pb::RaftKind::VoteResponse if !forgets => node.platter.has_vote(term, to),
            _ => true,
        };
        ensure(durable, || format!("{from} promises what is not durable: {message:?}"))?;
        match message.kind() {
            pb::RaftKind::VoteResponse => self.checks.votes(from, term, to),
            _ => Ok(()),
        }
    }

    fn send(&mut self, from: u64, to: u64, message: pb::RaftMessage) -> Checked {
        self.may_say(from, to, &message)?;
        let Some((life, busy)) = self.nodes.get(&from).map(|node| (node.life, node.busy)) else {
            return Ok(());
        };
        let departs = busy.max(self.now);
        let bytes = prost::Message::encode_to_vec(&message);
        self.trace.fold(bytes.iter().fold(from, |sum, byte| Rng::fold(sum, *byte)));
        self.trace.line(self.now, || {
            let (kind, term, index) = (message.kind().as_str_name(), message.term, message.index);
            let reject = if message.reject { " reject" } else { "" };
            let entries = message.entries.len();
            format!("{from} -> {to}: {kind} term {term} index {index} +{entries}{reject}")
        });
        let arrivals = self.network.arrivals(departs, from, to, &mut self.rng);
        let first = arrivals.first().copied();
        for at in arrivals {
            let bytes = bytes.clone();
            self.schedule(at, Event::Deliver { from, to, bytes, forged: false });
        }
        let peer = NodeId(to);
        if message.snapshot.is_some() && !self.rng.chance(50) {
            let at = first.unwrap_or(departs + self.rng.below(200_000));
            let input = Box::new(Input::SnapshotSent { peer, ok: first.is_some() });
            self.schedule(at, Event::Report { node: from, life, input });
        } else if first.is_none() && self.rng.chance(300) {
            let at = departs + self.rng.below(50_000);
            let input = Box::new(Input::Unreachable { peer });
            self.schedule(at, Event::Report { node: from, life, input });
        }
        if self.rng.chance(self.network.config.forge) {
            self.forge(from, to, message);
        }
        Ok(())
    }

    /// A process ended by itself: only power and damage are reasons.
    fn died(&mut self, id: u64, fatal: &Fatal) -> Checked {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        if let Some(wrong) = node.platter.wrong() {
            return Err(Violation(format!("{id}: {wrong}")));
        }
        let power = node.platter.is_dead() && matches!(fatal, Fatal::Store(StoreError::Io(_)));
        let damage = node.platter.damage();
        let found = matches!(fatal, Fatal::Store(StoreError::Corrupt { .. })) && damage.is_some();
        if let (true, Some(what)) = (found, damage) {
            self.trace.line(self.now, || format!("{id}: damage found: {what}"));
            node.process = None;
            node.gone = Some(Gone::Damaged(what));
            W::stopped(self, id);
            return Ok(());
        }
        ensure(power, || format!("{id} died: {fatal}"))?;
        self.crash(id);
        Ok(())
    }

    /// Ends a process without asking it, and lets it come back.
    pub fn crash(&mut self, id: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.process.is_none() {
            return;
        }
        node.platter.kill();
        (node.process, node.crash) = (None, None);
        node.platter.crash(&mut self.rng);
        self.stats.crashes += 1;
        self.trace.line(self.now, || format!("{id}: crashed"));
        W::stopped(self, id);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if !node.returning && !self.told {
            node.returning = true;
            let rest = match self.healed {
                true => 10_000,
                // A supervisor is quick; machines are not.
                false if self.rng.chance(500) => self.rng.range(5_000, 60_000),
                false => self.rng.range(60_000, 1_500_000),
            };
            self.after(rest, Event::Restart(id));
        }
    }

    /// Starts a node's process, unless it runs or never will.
    ///
    /// # Errors
    /// A violation: a node with an undamaged disk must start.
    pub fn restart(&mut self, id: u64) -> Checked {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        if node.runs() || !node.stays() {
            return Ok(());
        }
        node.returning = false;
        node.busy = 0;
        match node.start(&self.plan, self.mutation) {
            Ok(()) => {}
            Err(Fatal::Store(StoreError::Full)) if node.platter.is_full() => {
                node.returning = true;
                self.after(100_000, Event::Restart(id));
                return Ok(());
            }
            Err(fatal) => return self.died(id, &fatal),
        }
        let (life, tick) = (node.life, node.tick);
        self.trace.line(self.now, || format!("{id}: started, life {life}"));
        let first = self.rng.below(tick);
        self.after(first, Event::Tick { node: id, life });
        Ok(())
    }

    /// Switches a removed node off, once every other knows that it was removed: until then one may
    /// need its vote.
    fn retire(&mut self, id: u64) {
        let unknowing =
            |node: &Node<W>| node.intact() && !node.removed && node.members.contains(NodeId(id));
        if self.nodes.values().any(unknowing) {
            return self.after(ELECTION, Event::Retire(id));
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            self.trace.line(self.now, || format!("{id}: switched off"));
            node.process = None;
            node.gone = Some(Gone::Retired);
            W::stopped(self, id);
        }
    }

    /// Who waits under a node's request number.
    fn waiting(&mut self, id: u64, request: Option<u64>) -> Option<Waiting> {
        let process = self.nodes.get_mut(&id)?.process.as_mut()?;
        process.pending.remove(&request?)
    }

    /// A request that is not a client's was decided.
    fn decided(&mut self, id: u64, request: Option<u64>, how: Decided<Outcome<W>>) -> Checked {
        // Nobody waits any more for what a client gave up.
        let own = request.filter(|request| *request <= CLIENTS);
        own.map_or(Ok(()), |request| W::decided(self, id, request, how))
    }

    fn refused(&mut self, id: u64, request: u64, why: ProposeError) -> Checked {
        self.trace.line(self.now, || format!("{id}: request {request} refused: {why}"));
        let hint = match why {
            ProposeError::NotLeader { leader } => leader.map(|leader| leader.0),
            _ => None,
        };
        match self.waiting(id, Some(request)) {
            Some(Waiting::Write { client, serial, .. } | Waiting::Read { client, serial, .. }) => {
                self.answer(id, client, serial, Answer::Retry(hint));
                Ok(())
            }
            Some(Waiting::Change) => Ok(()),
            None => self.decided(id, Some(request), Decided::Unknown),
        }
    }

    fn read_ready(&mut self, id: u64, request: u64) {
        let Some(Waiting::Read { client, serial, key }) = self.waiting(id, Some(request)) else {
            return;
        };
        let process = self.nodes.get(&id).and_then(|node| node.process.as_ref());
        let value = process.map(|process| W::read(&process.replica.machine().inner, key));
        if let Some(value) = value {
            self.answer(id, client, serial, Answer::Saw(value));
        }
    }

    /// The running node that leads the highest term.
    pub fn leader(&self) -> Option<u64> {
        let leads = |node: &Node<W>| Some((node.process.as_ref()?.leads?, node.id));
        self.nodes.values().filter_map(leads).max().map(|(_, id)| id)
    }
}
