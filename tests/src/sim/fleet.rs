//! Workers as the control plane sees them: sessions, heartbeats, leases, ranks that load. What they
//! compute is nobody's business here.
//!
//! A session is a line between a worker and a coordinator. It keeps order; what is cut off breaks
//! it, and its two ends learn of that at different times, or not before their patience ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cluster::{Epoch, GroupId, NodeInfo};
use control::leader::SessionId;
use control::replica::Input as ReplicaInput;
use planner::{DeviceSpec, NodeId};
use wire::{FormGroup, Held, Order, Report};

use super::checks::{Checked, ensure};
use super::cluster::{ClusterWorkload, DIGEST};
use super::duties::TIMING;
use super::errands::Errand;
use super::rng::Rng;
use super::world::{Event, World};

/// Workers have these numbers on the network.
const ADDRESSES: u64 = 10_000;
/// How long a coordinator may take to answer an attempt.
const ATTEMPT: u64 = 1_000_000;
/// What a device that keeps some weights needs to find out that it keeps them.
const LOOK: u64 = 1_000;
/// A session is given up when an answer to a heartbeat takes this part of the lease.
const PATIENCE: u64 = TIMING.lease * 1_000 / 4;

/// Everything in the world beside coordinators and clients.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Workers by number.
    pub workers: BTreeMap<u64, Worker>,
    /// Lines by number; numbers are never used again.
    pub lines: BTreeMap<u64, Line>,
    next_line: u64,
    /// What duties want of replicas.
    pub queue: VecDeque<(u64, ReplicaInput)>,
    /// What the operator has yet to do.
    pub errands: VecDeque<Errand>,
    /// Requests that the operator has made.
    pub requests: u64,
    /// Coordinators that were let in and are to be known.
    pub coordinators: BTreeSet<u64>,
}

/// One session, or the attempt at one.
#[derive(Debug)]
pub struct Line {
    worker: u64,
    coordinator: u64,
    /// The life of the coordinator's process that it leads to.
    life: u64,
    /// Its number there, once it is open.
    pub session: Option<SessionId>,
    broken: bool,
    /// It ended as that of a process that died does.
    dead: bool,
    last_up: u64,
    last_down: u64,
}

/// A worker.
#[derive(Debug)]
pub struct Worker {
    /// Its node number, once it was let in.
    pub node: Option<NodeId>,
    boot: u64,
    running: bool,
    busy: u64,
    line: Option<u64>,
    /// Since when the line is tried or open.
    began: u64,
    welcome: bool,
    hint: Option<u64>,
    sent: VecDeque<u64>,
    /// Until when nobody else may hold its ranks.
    lease: u64,
    /// What it holds, by group.
    pub held: BTreeMap<GroupId, Holding>,
    /// Stripes whose weights wait for its next rank: they are not read again.
    kept: BTreeSet<usize>,
}

/// Ranks of one incarnation of a group.
#[derive(Debug)]
pub struct Holding {
    /// The incarnation.
    pub epoch: Epoch,
    /// Each rank: its stripes, and whether it is ready.
    pub ranks: BTreeMap<usize, (Vec<usize>, bool)>,
}

/// What arrives at a coordinator.
#[derive(Debug)]
pub enum Up {
    /// A worker wants a session.
    Open(NodeId, Box<NodeInfo>, Vec<Held>),
    /// It says something.
    Report(Report),
}

/// What arrives at a worker.
#[derive(Debug)]
pub enum Down {
    /// An order.
    Order(Order),
    /// The coordinator does not lead; perhaps that one does, perhaps nobody.
    Elsewhere(Option<u64>),
    /// The session ended.
    Ended,
    /// The join was refused.
    Refused,
}

/// What happens among workers.
#[derive(Debug)]
pub enum Work {
    /// A worker's process starts.
    Start(u64),
    /// A heartbeat is due, or an attempt.
    Beat(u64, u64),
    /// A worker notices that a peer hung up: the incarnation, and the peer's rank.
    Missed(u64, u64, GroupId, Epoch, usize),
    /// A rank's stripes are read.
    Loaded(u64, u64, GroupId, Epoch),
    /// Something arrives at a coordinator.
    Up(u64, Up),
    /// Something arrives at a worker.
    Down(u64, Down),
    /// A coordinator notices that a line is broken.
    Broken(u64),
}

impl Fleet {
    /// Numbers on the network.
    pub fn addresses(&self) -> Vec<u64> {
        self.workers.keys().map(|worker| ADDRESSES + worker).collect()
    }
}

impl Worker {
    fn new(rng: &mut Rng) -> Self {
        Self {
            node: None,
            boot: rng.bits(),
            running: false,
            busy: 0,
            line: None,
            began: 0,
            welcome: false,
            hint: None,
            sent: VecDeque::new(),
            lease: 0,
            held: BTreeMap::new(),
            kept: BTreeSet::new(),
        }
    }

    fn info(&self, number: u64) -> NodeInfo {
        NodeInfo {
            boot: self.boot,
            name: format!("w{number}"),
            worker_address: format!("host-{number}:9000"),
            collective_addresses: vec![format!("host-{number}:9100")],
            devices: vec![DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 }],
            model_digests: BTreeSet::from([DIGEST.to_owned()]),
            kernel_class: "avx2".to_owned(),
            version: "0.0.0".to_owned(),
        }
    }

    fn holds(&self) -> Vec<Held> {
        let groups = self.held.iter();
        let ranks = groups.flat_map(|(&group, holding)| {
            let epoch = holding.epoch;
            let ranks = holding.ranks.iter();
            ranks.map(move |(&rank, (_, ready))| Held { group, epoch, rank, ready: *ready })
        });
        ranks.collect()
    }

    /// Whether it runs and its lease has not run out: one that stands still does not know yet, but
    /// does nothing before it does.
    pub fn lives(&self, now: u64) -> bool {
        self.running && now < self.lease
    }
}

impl World<ClusterWorkload> {
    /// Workers are made and the operator gets its first errands.
    pub(super) fn begin_fleet(&mut self) {
        let workers = self.rng.range(2, 6);
        self.make_workers(workers);
    }

    /// Makes so many workers.
    pub(super) fn make_workers(&mut self, workers: u64) {
        for number in 1..=workers {
            let worker = Worker::new(&mut self.rng);
            self.extra.workers.insert(number, worker);
        }
        self.first_errands(workers);
        self.after(50_000, Event::Operate);
    }

    fn own(&mut self, delay: u64, work: Work) {
        self.after(delay, Event::Own(work));
    }

    /// Lets a worker that was let in start.
    pub(super) fn start_worker(&mut self, number: u64) {
        self.own(1_000, Work::Start(number));
    }

    /// Which coordinator an event has to wait for.
    pub(super) fn coordinator_of(&self, event: &Work) -> Option<u64> {
        match event {
            Work::Up(line, _) | Work::Broken(line) => {
                self.extra.lines.get(line).map(|line| line.coordinator)
            }
            _ => None,
        }
    }

    pub(super) fn work(&mut self, event: Work) -> Checked {
        let asleep = |worker: u64, world: &Self| {
            let busy = world.extra.workers.get(&worker).map_or(0, |worker| worker.busy);
            (busy > world.now).then_some(busy)
        };
        let line = |line: &u64, world: &Self| world.extra.lines.get(line).map(|line| line.worker);
        let sleeper = match &event {
            Work::Beat(worker, _) | Work::Loaded(worker, ..) | Work::Missed(worker, ..) => {
                Some(*worker)
            }
            Work::Down(number, _) => line(number, self),
            _ => None,
        };
        if let Some(until) = sleeper.and_then(|worker| asleep(worker, self)) {
            self.put_off(until, Event::Own(event));
            return Ok(());
        }
        match event {
            Work::Start(worker) => {
                self.boot_worker(worker);
                Ok(())
            }
            Work::Beat(worker, boot) => {
                self.beat(worker, boot);
                Ok(())
            }
            Work::Loaded(worker, boot, group, epoch) => self.loaded(worker, boot, group, epoch),
            Work::Missed(worker, boot, group, epoch, rank) => {
                self.miss(worker, boot, (group, epoch), rank);
                Ok(())
            }
            Work::Up(line, up) => self.arrive(line, up),
            Work::Down(line, down) => {
                self.told(line, down);
                Ok(())
            }
            Work::Broken(number) => {
                let line = self.extra.lines.remove(&number);
                let Some(Line { coordinator, life, session: Some(session), dead, .. }) = line
                else {
                    return Ok(());
                };
                let same = self.nodes.get(&coordinator).is_some_and(|node| node.life == life);
                if same { self.session_closed(coordinator, session, dead) } else { Ok(()) }
            }
        }
    }

    fn boot_worker(&mut self, number: u64) {
        let Some(worker) = self.extra.workers.get_mut(&number) else { return };
        if worker.running || worker.node.is_none() {
            return;
        }
        worker.running = true;
        let boot = worker.boot;
        self.own(1_000, Work::Beat(number, boot));
    }

    /// Ends a worker's process; its next one knows nothing.
    pub(super) fn end_worker(&mut self, number: u64, rest: u64) {
        let rng = &mut self.rng;
        let Some(worker) = self.extra.workers.get_mut(&number).filter(|worker| worker.running)
        else {
            return;
        };
        let (node, line, held) = (worker.node, worker.line, std::mem::take(&mut worker.held));
        *worker = Worker { node, ..Worker::new(rng) };
        self.trace.line(self.now, || format!("worker {number}: ended"));
        for (group, holding) in held {
            self.missed(number, group, &holding);
        }
        if let Some(line) = line {
            self.looks_dead(line, 3);
            self.hang_up(line);
        }
        if !self.told {
            self.own(rest, Work::Start(number));
        }
    }

    /// Of four lines, so many end as those of processes that died do, whatever it was. Chosen by
    /// their numbers, without a die: what else happens in a run stays as it is.
    fn looks_dead(&mut self, number: u64, of_four: u64) {
        if let Some(line) = self.extra.lines.get_mut(&number) {
            line.dead = number % 4 < of_four;
        }
    }

    /// A worker lets go of a line; the coordinator hears of it, sooner or later.
    fn hang_up(&mut self, line: u64) {
        let cut = self.extra.lines.get(&line).is_some_and(|line| line.broken);
        let delay = if cut || self.rng.chance(200) { self.rng.below(3_000_000) } else { 2_000 };
        if let Some(line) = self.extra.lines.get_mut(&line) {
            line.broken = true;
        }
        self.own(delay, Work::Broken(line));
    }

    /// A coordinator's process ended: its lines end.
    pub(super) fn break_lines_of(&mut self, node: u64) {
        let mine = self.extra.lines.iter().filter(|(_, line)| line.coordinator == node);
        for line in mine.map(|(line, _)| *line).collect::<Vec<_>>() {
            // A process that ends closes its streams; a machine that ends does not.
            if self.rng.chance(700) {
                self.down(line, Down::Ended);
            }
            if let Some(line) = self.extra.lines.get_mut(&line) {
                (line.broken, line.session) = (true, None);
            }
        }
    }

    /// When something sent over a line arrives; `None` when the line is, or thereby gets, broken.
    fn carry(&mut self, number: u64, up: bool) -> Option<u64> {
        let line = self.extra.lines.get_mut(&number)?;
        let (worker, coordinator) = (ADDRESSES + line.worker, line.coordinator);
        let (from, to) = if up { (worker, coordinator) } else { (coordinator, worker) };
        if line.broken {
            return None;
        }
        if self.network.is_cut(from, to) || self.rng.chance(self.network.config.lose / 10) {
            line.broken = true;
            let delay = self.rng.range(50_000, 4_000_000);
            self.own(delay, Work::Broken(number));
            return None;
        }
        let last = if up { &mut line.last_up } else { &mut line.last_down };
        let way = self.now + 200 + self.rng.below(self.network.config.jitter + 1);
        *last = way.max(*last + 1);
        Some(*last)
    }

    fn up(&mut self, line: u64, up: Up) {
        if let Some(at) = self.carry(line, true) {
            self.schedule(at, Event::Own(Work::Up(line, up)));
        }
    }

    /// Sends something to the worker at the end of a line.
    pub(super) fn down(&mut self, line: u64, down: Down) {
        if let Some(at) = self.carry(line, false) {
            self.schedule(at, Event::Own(Work::Down(line, down)));
        }
    }

    fn beat(&mut self, number: u64, boot: u64) {
        let now = self.now;
        let Some(worker) = self.extra.workers.get_mut(&number) else { return };
        if !worker.running || worker.boot != boot {
            return;
        }
        if now >= worker.lease && !worker.held.is_empty() {
            self.fence_worker(number);
        }
        let Some(worker) = self.extra.workers.get_mut(&number) else { return };
        let line = worker.line;
        let late = worker.sent.front().is_some_and(|sent| now > sent + PATIENCE);
        let slow = !worker.welcome && now > worker.began + ATTEMPT;
        match line {
            None => self.attempt(number),
            Some(line) if late || slow => {
                worker.line = None;
                self.hang_up(line);
            }
            Some(line) if worker.welcome => {
                worker.sent.push_back(now);
                let held = worker.held.iter().map(|(&group, holding)| (group, holding.epoch));
                let beat = Report::Heartbeat(held.collect());
                self.up(line, Up::Report(beat));
            }
            Some(_) => {}
        }
        self.own(TIMING.heartbeat * 1_000, Work::Beat(number, boot));
    }

    /// A worker whose lease ran out lets go of everything, and says so.
    fn fence_worker(&mut self, number: u64) {
        self.trace.line(self.now, || format!("worker {number}: its lease ran out"));
        let Some(worker) = self.extra.workers.get_mut(&number) else { return };
        let (line, held) = (worker.line, worker.holds());
        let holdings = std::mem::take(&mut worker.held);
        worker.kept.clear();
        for (group, holding) in holdings {
            self.missed(number, group, &holding);
        }
        for Held { group, epoch, rank, .. } in held {
            let reason = "its lease ran out".to_owned();
            if let Some(line) = line {
                self.up(
                    line,
                    Up::Report(Report::Failed { group, epoch, rank, reason, blames: None }),
                );
            }
        }
    }

    /// A worker asks a coordinator for a session.
    fn attempt(&mut self, number: u64) {
        let running = self.nodes.values().filter(|node| node.runs());
        let running: Vec<(u64, u64)> = running.map(|node| (node.id, node.life)).collect();
        let Some(worker) = self.extra.workers.get_mut(&number) else { return };
        let hinted = worker.hint.take().and_then(|hint| running.iter().find(|(id, _)| *id == hint));
        let Some(&(coordinator, life)) = hinted.or_else(|| self.rng.pick(&running)) else { return };
        let Some(node) = worker.node else { return };
        self.extra.next_line += 1;
        let line = self.extra.next_line;
        worker.line = Some(line);
        (worker.began, worker.welcome) = (self.now, false);
        worker.sent.clear();
        let open = Up::Open(node, Box::new(worker.info(number)), worker.holds());
        let (session, broken, dead, last_up, last_down) = (None, false, false, 0, 0);
        let worker = number;
        let made = Line { worker, coordinator, life, session, broken, dead, last_up, last_down };
        self.extra.lines.insert(line, made);
        self.up(line, open);
    }

    fn arrive(&mut self, number: u64, up: Up) -> Checked {
        let Some(line) = self.extra.lines.get(&number) else { return Ok(()) };
        let (coordinator, life, session) = (line.coordinator, line.life, line.session);
        let node = self.nodes.get(&coordinator).filter(|node| node.runs() && node.life == life);
        if node.is_none() {
            self.down(number, Down::Ended);
            return Ok(());
        }
        match (up, session) {
            (Up::Open(node, info, held), _) => {
                self.open_session(coordinator, number, (node, *info, held))
            }
            (Up::Report(report), Some(session)) => {
                self.session_report(coordinator, session, report)
            }
            (Up::Report(_), None) => Ok(()),
        }
    }

    fn told(&mut self, number: u64, down: Down) {
        let Some(line) = self.extra.lines.get(&number).map(|line| line.worker) else { return };
        let (id, now) = (line, self.now);
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        if !worker.running || worker.line != Some(number) {
            return;
        }
        match down {
            Down::Order(order) => return self.obey(id, number, order),
            Down::Elsewhere(leader) => {
                worker.hint = leader;
                if leader.is_none() {
                    // Nobody leads, so nobody can give its ranks away just now.
                    worker.lease = worker.lease.max(now + TIMING.lease * 1_000);
                }
            }
            Down::Ended => {}
            Down::Refused => {
                // Its process ends with that error, and is started again by whoever watches it.
                return self.end_worker(id, 300_000);
            }
        }
        worker.line = None;
        self.hang_up(number);
    }

    fn obey(&mut self, id: u64, line: u64, order: Order) {
        let now = self.now;
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        match order {
            Order::Welcome { lease_ms, .. } => {
                worker.welcome = true;
                worker.lease = worker.began + lease_ms * 1_000;
            }
            Order::Lease => {
                if let Some(sent) = worker.sent.pop_front() {
                    worker.lease = worker.lease.max(sent + TIMING.lease * 1_000);
                }
            }
            // Connections are not part of this.
            Order::Certificate { .. } | Order::Roll { .. } => {}
            Order::Retire { group, epoch, .. } => {
                self.trace.line(now, || format!("worker {id}: retires {group} epoch {epoch}"));
                if worker.held.get(&group).is_some_and(|holding| holding.epoch <= epoch) {
                    self.lose_group(id, group);
                }
            }
            Order::Form(form) => self.form(id, line, &form),
            Order::Prepare(form) => self.prepare(id, line, &form),
        }
    }

    /// A worker loads what it may be told to hold next; it takes no time here, and may fail.
    fn prepare(&mut self, id: u64, line: u64, form: &FormGroup) {
        let (group, epoch) = (form.group, form.epoch);
        let fails = !self.healed && !self.told && self.rng.chance(100);
        self.trace.line(self.now, || format!("worker {id}: prepares {group} epoch {epoch}"));
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        let mine = form.plan.ranks.iter().filter(|rank| Some(rank.node) == worker.node);
        if worker.held.is_empty() && !fails {
            worker.kept = mine.flat_map(|rank| rank.stripes.iter().copied()).collect();
        }
        let error = fails.then(|| "it cannot".to_owned());
        self.up(line, Up::Report(Report::Prepared { group, epoch, error }));
    }

    fn form(&mut self, id: u64, line: u64, form: &FormGroup) {
        let (group, epoch) = (form.group, form.epoch);
        let fails = !self.healed && !self.told && self.rng.chance(30);
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        if worker.held.get(&group).is_some_and(|holding| holding.epoch >= epoch) {
            return;
        }
        self.lose_group(id, group);
        self.trace.line(self.now, || format!("worker {id}: forms {group} epoch {epoch}"));
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        let mine = form.plan.ranks.iter().filter(|rank| Some(rank.node) == worker.node);
        let ranks: BTreeMap<usize, (Vec<usize>, bool)> =
            mine.map(|rank| (rank.rank, (rank.stripes.to_vec(), false))).collect();
        let first = ranks.keys().next().copied().unwrap_or(0);
        let mut wanted = ranks.values().flat_map(|(stripes, _)| stripes);
        // What is kept for the device and is not asked for is freed.
        let whole = wanted.all(|stripe| worker.kept.contains(stripe));
        worker.kept.clear();
        worker.held.insert(group, Holding { epoch, ranks });
        let boot = worker.boot;
        if fails {
            self.lose_group(id, group);
            let reason = "it cannot".to_owned();
            self.up(
                line,
                Up::Report(Report::Failed { group, epoch, rank: first, reason, blames: None }),
            );
            return;
        }
        let (bytes_read, bytes_total) = (0, 1);
        let rank = first;
        let progress = Report::Progress { group, epoch, rank, bytes_read, bytes_total };
        self.up(line, Up::Report(progress));
        let takes = if whole { LOOK } else { self.rng.range(20_000, 800_000) };
        self.own(takes, Work::Loaded(id, boot, group, epoch));
    }

    /// A worker lets go of a group, if it has a part in it, and keeps the weights that it has read.
    fn lose_group(&mut self, id: u64, group: GroupId) {
        let Some(worker) = self.extra.workers.get_mut(&id) else { return };
        let Some(holding) = worker.held.remove(&group) else { return };
        let read = holding.ranks.values().filter(|(_, ready)| *ready);
        worker.kept = read.flat_map(|(stripes, _)| stripes).copied().collect();
        self.missed(id, group, &holding);
    }

    /// A worker's part in an incarnation is over: peers that compute with it notice, peers that
    /// are idle, or cut off from it, do not.
    fn missed(&mut self, id: u64, group: GroupId, holding: &Holding) {
        let Some((&rank, _)) = holding.ranks.iter().find(|(_, (_, ready))| *ready) else { return };
        let epoch = holding.epoch;
        let peers = self.extra.workers.iter().filter(|(peer, worker)| {
            let mut same = worker.held.get(&group).filter(|held| held.epoch == epoch).into_iter();
            **peer != id && same.any(|held| held.ranks.values().any(|(_, ready)| *ready))
        });
        for (peer, boot) in peers.map(|(&peer, worker)| (peer, worker.boot)).collect::<Vec<_>>() {
            let cut = self.network.is_cut(ADDRESSES + id, ADDRESSES + peer);
            if !cut && (self.told || self.rng.chance(700)) {
                let after = 200 + self.rng.below(5_000);
                self.own(after, Work::Missed(peer, boot, group, epoch, rank));
            }
        }
    }

    /// A worker's step has failed, for the want of a peer, and its part is over, too.
    fn miss(&mut self, id: u64, boot: u64, (group, epoch): (GroupId, Epoch), missing: usize) {
        let Some(worker) = self.extra.workers.get(&id) else { return };
        let holding = worker.held.get(&group).filter(|held| held.epoch == epoch);
        let Some(rank) = holding.and_then(|holding| holding.ranks.keys().next().copied()) else {
            return;
        };
        if worker.boot != boot || !worker.running {
            return;
        }
        let line = worker.line;
        self.trace.line(self.now, || format!("worker {id}: misses rank {missing} of {group}"));
        self.lose_group(id, group);
        if let Some(line) = line {
            let (reason, blames) = ("a peer hung up".to_owned(), Some(missing));
            self.up(line, Up::Report(Report::Failed { group, epoch, rank, reason, blames }));
        }
    }

    /// A worker has read the stripes of its ranks of a group.
    fn loaded(&mut self, id: u64, boot: u64, group: GroupId, epoch: Epoch) -> Checked {
        let now = self.now;
        let Some(worker) = self.extra.workers.get_mut(&id) else { return Ok(()) };
        // A lease that ran out is noticed before anything else is done.
        if worker.boot != boot || !worker.lives(now) {
            return Ok(());
        }
        let Some(holding) = worker.held.get_mut(&group).filter(|held| held.epoch == epoch) else {
            return Ok(());
        };
        // Also before it is welcome: what it said when it came is out of date then.
        let line = worker.line;
        let mut ready = Vec::new();
        for (rank, (_, done)) in &mut holding.ranks {
            *done = true;
            ready.push(*rank);
        }
        self.trace.line(now, || format!("worker {id}: ready in {group} epoch {epoch}: {ready:?}"));
        for rank in ready {
            self.checks.ledger.ready.insert((group, epoch, rank));
            if let Some(line) = line {
                self.up(line, Up::Report(Report::Ready { group, epoch, rank }));
            }
        }
        self.held_once(group, epoch)
    }

    /// No stripe of an incarnation is ready on two workers.
    fn held_once(&self, group: GroupId, epoch: Epoch) -> Checked {
        let mut holders: BTreeMap<usize, u64> = BTreeMap::new();
        for (&id, worker) in self.extra.workers.iter().filter(|(_, worker)| worker.running) {
            let Some(holding) = worker.held.get(&group).filter(|held| held.epoch == epoch) else {
                continue;
            };
            for (stripes, _) in holding.ranks.values().filter(|(_, ready)| *ready) {
                for &stripe in stripes {
                    let other = holders.insert(stripe, id);
                    ensure(other.is_none(), || {
                        format!(
                            "stripe {stripe} of group {group} epoch {epoch} is ready on {id} and \
                             {other:?}"
                        )
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Trouble with workers: one ends, one stands still, one drains, or an old report comes late.
    pub(super) fn trouble_workers(&mut self) -> Checked {
        let numbers: Vec<u64> = self.extra.workers.keys().copied().collect();
        let Some(&victim) = self.rng.pick(&numbers) else { return Ok(()) };
        let rest = self.rng.range(50_000, 4_000_000);
        match self.rng.below(8) {
            0 => self.end_worker(victim, rest),
            1 => {
                let until = self.now + rest;
                self.stop_worker(victim, until);
            }
            2 => {
                let Some(line) = self.extra.workers.get(&victim).and_then(|worker| worker.line)
                else {
                    return Ok(());
                };
                if let Some(line) = self.extra.lines.get_mut(&line) {
                    line.broken = true;
                }
                self.looks_dead(line, 1);
                self.own(rest / 4, Work::Broken(line));
            }
            3 => self.drain_or_not(victim),
            4 => self.rename_or_drain(),
            _ => return self.late_report(),
        }
        Ok(())
    }

    /// A worker stands still, unknowing, until then.
    pub(super) fn stop_worker(&mut self, number: u64, until: u64) {
        if let Some(worker) = self.extra.workers.get_mut(&number) {
            worker.busy = worker.busy.max(until);
        }
    }

    /// What a leader of before had under way when it fell, its report of an incarnation that is
    /// over: it gets into the log all the same.
    fn late_report(&mut self) -> Checked {
        let Some(leader) = self.leader() else { return Ok(()) };
        let known: Vec<_> = self.checks.ledger.ready.iter().copied().collect();
        // Of a group that lives on in another incarnation, where there is one.
        let over: Vec<_> = known
            .iter()
            .copied()
            .filter(|(group, epoch, _)| self.is_over(*group, *epoch))
            .collect();
        let from = if over.is_empty() { &known } else { &over };
        let Some(&(group, epoch, rank)) = self.rng.pick(from) else { return Ok(()) };
        let command = match self.rng.chance(500) {
            true => cluster::Command::RankReady { group, epoch, rank },
            false => cluster::Command::Fence { group, epoch, reason: "it fell".to_owned() },
        };
        let request = 0;
        let command = wire::encode_command(&command.into());
        self.feed(leader, ReplicaInput::Propose { request, command })
    }

    /// Every worker runs and hears again.
    pub(super) fn heal_workers(&mut self) {
        let numbers: Vec<u64> = self.extra.workers.keys().copied().collect();
        for number in numbers {
            if let Some(worker) = self.extra.workers.get_mut(&number) {
                worker.busy = 0;
            }
            self.own(1_000, Work::Start(number));
        }
    }
}
