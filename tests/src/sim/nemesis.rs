//! Who makes trouble: one fault after the other, as the run's plan weighs them.

use control::replica::{Input, MemberSet};
use planner::NodeId;
use wire::pb;

use super::checks::Checked;
use super::disk::Cut as PowerCut;
use super::net::Cut;
use super::node::{Crash, quorum};
use super::plan::{ELECTION, Fault};
use super::workload::Workload;
use super::world::{Event, World};

impl<W: Workload> World<W> {
    /// Does the next fault and plans the one after it.
    pub(super) fn trouble(&mut self) -> Checked {
        if self.healed {
            return Ok(());
        }
        let pause = 1 + self.rng.below(2 * self.plan.between);
        self.after(pause, Event::Trouble);
        let Some(fault) = self.plan.fault(&mut self.rng) else { return Ok(()) };
        self.trace.line(self.now, || format!("fault: {fault:?}"));
        *self.stats.faults.entry(fault).or_insert(0) += 1;
        self.inject(fault)
    }

    /// A running node.
    fn victim(&mut self) -> Option<u64> {
        let running: Vec<u64> =
            self.nodes.values().filter(|node| node.runs()).map(|node| node.id).collect();
        // Leaders are the more interesting half.
        match self.leader().filter(|_| self.rng.chance(400)) {
            Some(leader) => Some(leader),
            None => self.rng.pick(&running).copied(),
        }
    }

    fn inject(&mut self, fault: Fault) -> Checked {
        let Some(victim) = self.victim() else { return Ok(()) };
        let rest = self.rng.range(20_000, 2_000_000);
        match fault {
            Fault::Crash => self.arm(victim),
            Fault::PowerLoss => {
                let nodes: Vec<u64> = self.nodes.keys().copied().collect();
                nodes.into_iter().for_each(|node| self.crash(node));
            }
            Fault::Pause => self.pause(victim, rest),
            Fault::Partition => self.partition(rest),
            Fault::Clog => self.swizzle(),
            Fault::Full => {
                self.fill(victim);
                self.after(rest, Event::Repaired(victim));
            }
            Fault::Slow => {
                let time = self.rng.range(1_000, 200_000);
                if let Some(node) = self.nodes.get_mut(&victim) {
                    node.write_time = time;
                }
                self.after(rest, Event::Repaired(victim));
            }
            Fault::Flip => self.flip(victim),
            Fault::Transfer => return self.hand_over(victim),
            Fault::Duel => self.duel(),
            Fault::Own => return W::trouble(self),
            Fault::Members => {
                let wanted = *self.rng.pick(&[1, 2, 3, 3, 4, 5]).expect("six");
                self.operator.want(wanted, self.rng.chance(400).then_some(victim));
            }
        }
        Ok(())
    }

    /// Ends the leader, lets all others stand for election at one moment, and ends some of those
    /// that vote as they do.
    fn duel(&mut self) {
        if let Some(leader) = self.leader() {
            self.crash(leader);
        }
        let at = self.now + self.rng.range(ELECTION, 3 * ELECTION);
        let running = self.nodes.values().filter(|node| node.runs());
        for (id, life) in running.map(|node| (node.id, node.life)).collect::<Vec<_>>() {
            if self.rng.chance(500)
                && let Some(node) = self.nodes.get_mut(&id)
            {
                node.crash = Some(Crash::Voting);
            }
            self.schedule(at, Event::Report { node: id, life, input: Box::new(Input::Campaign) });
        }
    }

    /// Lets a process end at some point of its loop.
    fn arm(&mut self, victim: u64) {
        let cut = PowerCut { after: self.rng.below(4), durable: self.rng.chance(500) };
        let share = self.rng.below(1001);
        let kind = self.rng.below(3);
        let Some(node) = self.nodes.get_mut(&victim) else { return };
        match kind {
            0 => self.crash(victim),
            1 => node.crash = Some(Crash::Sending(share)),
            _ => {
                node.crash = Some(Crash::Writing);
                node.platter.cut(cut);
            }
        }
    }

    /// Lets a process stand still, unknowing.
    pub fn pause(&mut self, victim: u64, rest: u64) {
        let until = self.now + rest;
        if let Some(node) = self.nodes.get_mut(&victim) {
            node.busy = node.busy.max(until);
            self.trace.line(self.now, || format!("{victim}: stands still until {until}"));
        }
    }

    fn partition(&mut self, rest: u64) {
        let kinds = [Cut::Camps, Cut::Camps, Cut::OneWay, Cut::Bridge, Cut::Alone, Cut::Lots];
        let kind = *self.rng.pick(&kinds).expect("six");
        let mut nodes: Vec<u64> =
            self.nodes.values().filter(|node| node.stays()).map(|node| node.id).collect();
        nodes.extend(W::bystanders(self));
        self.network.partition(kind, &nodes, &mut self.rng);
        self.trace.line(self.now, || format!("{kind:?}: {:?}", self.network));
        self.after(rest, Event::Rejoin);
    }

    /// Clogs some nodes one after the other, and frees them in another order.
    fn swizzle(&mut self) {
        let mut nodes: Vec<u64> = self.nodes.keys().copied().collect();
        self.rng.shuffle(&mut nodes);
        let some = self.rng.range(1, nodes.len() as u64) as usize;
        for node in &nodes[..some] {
            let until = self.now + self.rng.range(10_000, 1_500_000);
            self.network.clog(*node, until);
        }
    }

    /// Damages what a node stored, where the cluster can live without the node, and ends its
    /// process, so that the damage is met at the next start.
    fn flip(&mut self, victim: u64) {
        if self.expendable(victim) {
            self.damage(victim);
        }
    }

    /// Damages something that a node stored, and ends its process.
    pub fn damage(&mut self, victim: u64) {
        let Some(node) = self.nodes.get(&victim) else { return };
        let what = node.platter.flip(&mut self.rng);
        self.trace.line(self.now, || format!("{victim}: damaged: {what:?}"));
        self.crash(victim);
    }

    /// The members as the last to know them knows them, if no change is in any log.
    fn settled_members(&self) -> Option<MemberSet> {
        let running = self.nodes.values().filter_map(|node| Some((node, node.process.as_ref()?)));
        let status = running.map(|(_, process)| process.replica.status());
        let newest = status.max_by_key(|status| status.applied)?;
        let staying = self.nodes.values().filter(|node| node.stays());
        let changing = staying.clone().any(|node| node.platter.changes_after(newest.applied));
        (!changing && !newest.members.is_joint()).then_some(newest.members)
    }

    /// Whether a node may be lost for ever: all others stay, know of every change of members and
    /// will know it after a crash, and can decide without it.
    fn expendable(&self, victim: u64) -> bool {
        let Some(members) = self.settled_members().filter(|_| !W::changing(self)) else {
            return false;
        };
        let knows = |id: u64| {
            let node = self.nodes.get(&id).filter(|node| node.intact());
            node.is_some_and(|node| node.members == members && node.platter.knows_its_changes())
        };
        let others = members.all().into_iter().all(|id| id.0 == victim || knows(id.0));
        // A learner may get its vote before it is known to be lost: one voter cannot bear that.
        let counts = !members.is_voter(NodeId(victim)) && members.voters.len() == 1;
        others && !counts && quorum(&members, |id| id != victim)
    }

    /// Asks a node to hand leadership to somebody, or to campaign.
    fn hand_over(&mut self, victim: u64) -> Checked {
        let nodes: Vec<u64> = self.nodes.keys().copied().collect();
        let to = self.rng.pick(&nodes).copied().unwrap_or(victim);
        let input = match self.rng.chance(250) {
            true => Input::Campaign,
            false => Input::Transfer { to: NodeId(to) },
        };
        self.trace.line(self.now, || format!("{victim}: {input:?}"));
        self.feed(victim, input)
    }

    /// Leaves no room on a disk.
    pub fn fill(&self, id: u64) {
        if let Some(node) = self.nodes.get(&id) {
            node.platter.set_full(true);
        }
    }

    /// A disk works as it should again.
    pub(super) fn repaired(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.platter.set_full(false);
            node.write_time = 0;
        }
    }

    /// Sends a twin of `message` that no honest node sends over this connection.
    pub(super) fn forge(&mut self, from: u64, to: u64, mut message: pb::RaftMessage) {
        let stranger = 1_000 + self.rng.below(9);
        match self.rng.below(6) {
            0 => message.cluster = b"another cluster!".to_vec().into(),
            1 => message.to += stranger,
            2 => message.from = stranger,
            3 => message.kind = 99,
            4 => message.entries.push(pb::RaftEntry { kind: 9, ..pb::RaftEntry::default() }),
            _ => message.kind = pb::RaftKind::Unspecified.into(),
        }
        let bytes = prost::Message::encode_to_vec(&message);
        self.after(1_000, Event::Deliver { from, to, bytes, forged: true });
    }

    /// Ends all trouble: everything that is not lost for ever runs and can talk.
    ///
    /// # Errors
    /// A violation while nodes start.
    pub fn heal(&mut self) -> Checked {
        self.trace.line(self.now, || "healed");
        self.healed = true;
        self.network.calm();
        self.wake_all();
        W::heal(self);
        let ids: Vec<u64> = self.nodes.keys().copied().collect();
        for id in ids {
            self.repaired(id);
            if let Some(node) = self.nodes.get_mut(&id) {
                node.busy = 0;
                node.platter.mend();
                node.crash = None;
            }
            self.restart(id)?;
        }
        Ok(())
    }
}
