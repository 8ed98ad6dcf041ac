//! Sessions and leases: who is there, who is late, who is gone.

use cluster::{ClusterState, Command, NodeInfo, Standing};
use planner::NodeId;
use wire::{Held, Order, Report};

use super::orders::roll;
use super::{Contact, Leader, Output, Session, SessionId, Subject};

/// A session that broke without a farewell may come back within this; a process that ended
/// does not.
const BROKEN: u64 = 300;

impl Session {
    /// What it says before its join is decided changes what it holds.
    fn note(&mut self, report: &Report) {
        match *report {
            Report::Ready { group, epoch, rank } => {
                let same =
                    |one: &&mut Held| (one.group, one.epoch, one.rank) == (group, epoch, rank);
                self.held.iter_mut().filter(same).for_each(|one| one.ready = true);
            }
            Report::Failed { group, epoch, rank, .. } => {
                self.held.retain(|one| (one.group, one.epoch, one.rank) != (group, epoch, rank));
            }
            Report::Join(..)
            | Report::Heartbeat(_)
            | Report::Prepared { .. }
            | Report::Progress { .. } => {}
        }
    }
}

impl Leader {
    pub(super) fn open(
        &mut self,
        cluster: &ClusterState,
        session: SessionId,
        (node, info, held): (NodeId, NodeInfo, Vec<Held>),
    ) {
        if !self.leading {
            self.out.push(Output::End { session, why: "this coordinator does not lead" });
            return;
        }
        let now = self.now;
        let known = cluster.nodes().get(&node).filter(|node| node.standing.present());
        let known = known.and_then(|node| node.info.as_ref());
        if known.is_some_and(|known| known.boot != info.boot) && self.is_heard(node) {
            let why = "another process with this node's certificate is there";
            tracing::warn!(node = node.0, address = info.worker_address, why, "no session");
            self.out.push(Output::End { session, why });
            return;
        }
        let contact = self.contacts.entry(node).or_default();
        contact.heard = now;
        contact.died = false;
        // Two streams of one worker: the newer one is the living one.
        if let Some(old) = contact.session.replace(session) {
            self.sessions.remove(&old);
            self.out.push(Output::End { session: old, why: "a newer session took its place" });
        }
        self.sessions.insert(session, Session { node, held, admitted: false });
        // The state has it already where only the session is new: nothing is to be decided then,
        // and a log that takes nothing costs no worker its groups.
        if known == Some(&info) && !self.is_pending(Subject::Node(node)) {
            self.admit(cluster, session);
        } else {
            self.propose(Subject::Join(session), Command::Join { node, info });
        }
    }

    /// Whether a session of this node is alive: its heartbeats come in time.
    fn is_heard(&self, node: NodeId) -> bool {
        let contact = self.contacts.get(&node);
        contact.is_some_and(|contact| {
            contact.session.is_some() && self.now - contact.heard < self.timing.suspicion
        })
    }

    /// The join was accepted: tells the worker its lease and brings it up to the state.
    pub(super) fn admit(&mut self, cluster: &ClusterState, session: SessionId) {
        let timing = self.timing;
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        entry.admitted = true;
        let (node, held) = (entry.node, std::mem::take(&mut entry.held));
        let order = Order::Welcome {
            node,
            heartbeat_ms: timing.heartbeat,
            lease_ms: timing.lease,
            generation: cluster.generation(),
        };
        self.out.push(Output::Order { session, order });
        if let Some(order) = roll(cluster) {
            self.out.push(Output::Order { session, order });
        }
        self.bring_up(cluster, session, node, &held);
    }

    pub(super) fn closed(&mut self, cluster: &ClusterState, session: SessionId, left: bool) {
        let Some(Session { node, .. }) = self.sessions.remove(&session) else { return };
        let (now, timing) = (self.now, self.timing);
        tracing::debug!(node = node.0, left, "a session is over");
        if left {
            // Who says goodbye is not waited for.
            self.contacts.remove(&node);
            if let Some(entry) = cluster.nodes().get(&node) {
                let incarnation = entry.incarnation;
                self.propose(Subject::Node(node), Command::Lost { node, incarnation });
            }
            return;
        }
        if let Some(contact) = self.contacts.get_mut(&node) {
            contact.session = None;
            // Suspect at once; lost soon, unless it comes back.
            let late = now.saturating_sub(timing.lease.saturating_sub(BROKEN));
            contact.heard = contact.heard.min(late);
        }
    }

    /// A session broke as it does with its process: nobody waits whether it comes back.
    pub(super) fn died(&mut self, cluster: &ClusterState, session: SessionId) {
        let Some(node) = self.sessions.get(&session).map(|session| session.node) else { return };
        self.closed(cluster, session, false);
        if let Some(contact) = self.contacts.get_mut(&node) {
            contact.died = true;
        }
    }

    /// Takes a session out whose join was not accepted.
    pub(super) fn drop_session(&mut self, session: SessionId) {
        let Some(Session { node, .. }) = self.sessions.remove(&session) else { return };
        if self.contacts.get(&node).is_some_and(|contact| contact.session == Some(session)) {
            self.contacts.remove(&node);
        }
    }

    /// A node left for ever: it is told so by the end of its session.
    pub(super) fn dismiss(&mut self, node: NodeId) {
        if let Some(Contact { session: Some(session), .. }) = self.contacts.remove(&node) {
            self.sessions.remove(&session);
            self.out.push(Output::End { session, why: "this node was removed from the cluster" });
        }
    }

    pub(super) fn report(&mut self, cluster: &ClusterState, session: SessionId, report: Report) {
        let Some(entry) = self.sessions.get_mut(&session) else { return };
        if !entry.admitted {
            return entry.note(&report);
        }
        let node = entry.node;
        let now = self.now;
        if let Some(contact) = self.contacts.get_mut(&node) {
            contact.heard = now;
        }
        match report {
            // A second join of a session is refused before it gets here.
            Report::Join(..) => {}
            Report::Heartbeat(groups) => {
                self.out.push(Output::Order { session, order: Order::Lease });
                self.outlived(cluster, session, &groups);
            }
            Report::Prepared { group, epoch, error } => {
                self.prepared(node, (group, epoch), error.as_deref());
            }
            report => self.rank_report(cluster, node, report),
        }
    }

    /// Proposes what silence, or its end, means for each node.
    pub(super) fn leases(&mut self, cluster: &ClusterState) {
        let (now, timing) = (self.now, self.timing);
        // Until a node has spoken to this leader, it has the time of the takeover.
        let unheard = now.saturating_sub(timing.lease) + timing.takeover;
        for (&node, entry) in cluster.nodes() {
            if !entry.standing.present() {
                continue;
            }
            let contact = self.contacts.entry(node).or_insert_with(|| Contact {
                session: None,
                heard: unheard,
                died: false,
            });
            let silent = now.saturating_sub(contact.heard);
            let here = contact
                .session
                .is_some_and(|id| self.sessions.get(&id).is_some_and(|session| session.admitted));
            let incarnation = entry.incarnation;
            if silent >= timing.lease {
                if let Some(session) = contact.session.take() {
                    self.sessions.remove(&session);
                    self.out.push(Output::End { session, why: "the lease ran out" });
                }
                self.propose(Subject::Node(node), Command::Lost { node, incarnation });
            } else if silent >= timing.suspicion && entry.standing == Standing::Ready {
                self.propose(Subject::Node(node), Command::Suspect { node, incarnation });
            } else if silent < timing.suspicion && here && entry.standing == Standing::Suspect {
                self.propose(Subject::Node(node), Command::Recover { node, incarnation });
            }
        }
        let known = cluster.nodes();
        self.contacts.retain(|node, contact| {
            contact.session.is_some() || known.get(node).is_some_and(|n| n.standing.present())
        });
    }
}
