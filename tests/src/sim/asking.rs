//! Between clients and nodes: questions, answers, patience.

use control::replica::Input;

use super::checks::Checked;
use super::client::{Answer, DEADLINE, PATIENCE, Wish, request_id};
use super::node::Waiting;
use super::workload::Workload;
use super::world::{Event, World};

/// How long a client that was sent away waits before it asks somebody else.
const SOON: u64 = 5_000;

impl<W: Workload> World<W> {
    /// How long something takes between a client and a node; `None` when it gets lost.
    fn way(&mut self) -> Option<u64> {
        let lost = self.rng.chance(self.network.config.lose);
        let way = 100 + self.rng.below(1_000);
        (!lost).then_some(way)
    }

    /// A client begins its next operation.
    pub(super) fn wake(&mut self, client: u64) -> Checked {
        if self.healed && client != 0 {
            return Ok(());
        }
        let (keys, reads, now) = (self.plan.keys, self.plan.reads, self.now);
        if let Some(known) = self.clients.get_mut(client as usize) {
            let unique = known.unique();
            // The first client writes, to see whether anybody can.
            let reads = if client == 0 { 0 } else { reads };
            let wish = W::wish(&mut known.rng, keys, reads, unique);
            known.begin(now, wish);
        }
        self.ask(client)
    }

    /// A client sends its question to somebody.
    fn ask(&mut self, id: u64) -> Checked {
        let healed = self.healed;
        let nodes: Vec<u64> =
            self.nodes.values().filter(|node| node.runs()).map(|node| node.id).collect();
        let Some(client) = self.clients.get_mut(id as usize) else { return Ok(()) };
        let Some(asked) = &mut client.asked else { return Ok(()) };
        asked.attempt += 1;
        let (serial, wish, attempt) = (client.serial, asked.wish, asked.attempt);
        let target = client.target(&nodes, healed);
        if let (Some(node), Some(way)) = (target, self.way()) {
            self.after(way, Event::Ask { client: id, serial, node, wish });
        }
        self.after(PATIENCE, Event::Patience { client: id, serial, attempt });
        Ok(())
    }

    /// A question arrives at a node.
    pub(super) fn asked(&mut self, client: u64, serial: u64, id: u64, wish: Wish) -> Checked {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        let Some(process) = process else { return Ok(()) };
        let input = match wish {
            Wish::Write { .. } => {
                let request = process.request(Waiting::Write { client, serial, wish });
                Input::Propose { request, command: W::command(request_id(client, serial), wish) }
            }
            Wish::Read { key } => {
                let request = process.request(Waiting::Read { client, serial, key });
                Input::Read { request }
            }
        };
        self.feed(id, input)
    }

    /// A node answers.
    pub(super) fn answer(&mut self, node: u64, client: u64, serial: u64, answer: Answer) {
        let busy = self.nodes.get(&node).map_or(0, |node| node.busy);
        if let Some(way) = self.way() {
            let at = busy.max(self.now) + way;
            self.schedule(at, Event::Answer { client, serial, node, answer });
        }
    }

    /// An answer arrives at a client.
    pub(super) fn answered(&mut self, id: u64, serial: u64, node: u64, answer: Answer) -> Checked {
        let now = self.now;
        let Some(client) = self.clients.get_mut(id as usize) else { return Ok(()) };
        if let Some(done) = client.answered(now, serial, answer) {
            client.guess = Some(node);
            match answer {
                Answer::Saw(_) => self.stats.reads += 1,
                _ => self.stats.writes += 1,
            }
            self.trace.line(now, || format!("client {id}: {done:?} by {node}"));
            self.history.extend(done);
            return self.rest(id);
        }
        if serial == client.serial
            && client.asked.is_some()
            && let Answer::Retry(hint) = answer
        {
            client.guess = hint.filter(|hint| *hint != node);
            let attempt = client.asked.map_or(0, |asked| asked.attempt);
            self.after(SOON, Event::Patience { client: id, serial, attempt });
        }
        Ok(())
    }

    /// A client pauses before its next operation.
    fn rest(&mut self, id: u64) -> Checked {
        let think = self.plan.think;
        if let Some(client) = self.clients.get_mut(id as usize).filter(|client| client.id != 0) {
            let pause = client.rng.below(think + 1);
            self.after(pause, Event::Wake(id));
        }
        Ok(())
    }

    /// A client has waited for one node long enough: it asks another, or gives up.
    pub(super) fn impatient(&mut self, id: u64, serial: u64, attempt: u64) -> Checked {
        let (now, healed) = (self.now, self.healed);
        let Some(client) = self.clients.get_mut(id as usize) else { return Ok(()) };
        let Some(asked) = client.asked.filter(|_| client.serial == serial) else { return Ok(()) };
        if asked.attempt != attempt {
            return Ok(());
        }
        if id == 0 || healed || now < asked.from + DEADLINE {
            return self.ask(id);
        }
        self.stats.unknown += 1;
        let lost = client.give_up();
        self.trace.line(now, || format!("client {id} gives up: {lost:?}"));
        self.history.extend(lost);
        self.forget(id, serial)?;
        self.rest(id)
    }

    /// Nodes stop waiting for what nobody waits for.
    fn forget(&mut self, client: u64, serial: u64) -> Checked {
        let mine = |waiting: &Waiting| match waiting {
            Waiting::Write { client: c, serial: s, .. }
            | Waiting::Read { client: c, serial: s, .. } => (*c, *s) == (client, serial),
            Waiting::Change => false,
        };
        let mut found = Vec::new();
        for node in self.nodes.values_mut() {
            let Some(process) = &mut node.process else { continue };
            let requests = process.pending.iter().filter(|(_, waiting)| mine(waiting));
            let requests: Vec<u64> = requests.map(|(request, _)| *request).collect();
            for request in requests {
                process.pending.remove(&request);
                found.push((node.id, request));
            }
        }
        for (node, request) in found {
            self.feed(node, Input::Forget { request })?;
        }
        Ok(())
    }
}
