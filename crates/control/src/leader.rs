//! The leader's duties, as a machine: leases of workers, orders to them, what to propose next.
//!
//! ```text
//! sessions, reports, time, what was applied ──Input──> Leader ──> Output: proposals, orders
//! ```
//! Everything here is soft: a new leader starts from the replicated state alone, gives every node
//! [`Timing::takeover`] to come to it, and learns from the nodes what they hold. Decisions go
//! through the log; nothing here is decided by what a node claims.

mod leases;
mod members;
mod moves;
mod orders;
mod repairs;

use std::collections::BTreeMap;

use cluster::{ClusterState, Command, Epoch, Event, GroupId, NodeInfo, Progress, Rejected};
use planner::NodeId;
use wire::{Held, Order, Report};

use self::moves::Moves;
use self::repairs::Repairs;

use crate::replica::{MemberChange, ReplicaStatus};

/// Plans that may be refused in a row before planning rests, and for how long it then does at
/// first, in milliseconds; twice as long each time, eight times.
const REFUSALS: u32 = 3;
const PLAN_REST: u64 = 10;

/// Pause before a group is placed again after a rank failed; doubles up to the longest.
const FIRST_PAUSE: u64 = 250;
const LONGEST_PAUSE: u64 = 30_000;
/// Pause after a proposal that the log did not take: leadership is on its way to another, or the
/// disk is full. Neither is over in the same instant.
const WAVERING: u64 = 50;

/// How patient the leader is, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two heartbeats of a worker.
    pub heartbeat: u64,
    /// A worker that is silent for this long is suspect.
    pub suspicion: u64,
    /// A worker that is silent for this long is lost, and fences itself.
    pub lease: u64,
    /// How long a new leader waits for workers that it has not heard of yet. At least the lease.
    pub takeover: u64,
}

/// One end of a worker's stream; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// This coordinator leads from now on, and its state is current.
    Lead,
    /// It leads no longer.
    Follow,
    /// A worker, known by its certificate, opened a session.
    Open {
        /// The stream.
        session: SessionId,
        /// Whose it is.
        node: NodeId,
        /// What it says of itself.
        info: NodeInfo,
        /// The ranks it holds.
        held: Vec<Held>,
    },
    /// A worker said something.
    Report {
        /// The stream.
        session: SessionId,
        /// What.
        report: Report,
    },
    /// A session is over.
    Closed {
        /// The stream.
        session: SessionId,
        /// The worker said goodbye; otherwise its stream broke.
        left: bool,
    },
    /// A session's connection ended as that of a process that died does: in the middle, and without
    /// the end of TLS. Its worker has most likely let go of everything.
    Died {
        /// The stream.
        session: SessionId,
    },
    /// The fate of a proposal: what applying it did. `None`: nobody knows; leadership wavers.
    Decided {
        /// Its number.
        number: u64,
        /// What came of it.
        outcome: Option<Result<Vec<Event>, Rejected>>,
    },
    /// The state changed, by whosever command.
    Changed {
        /// How.
        events: Vec<Event>,
    },
    /// Time has passed.
    Tick,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Put this into the log; the answer is [`Input::Decided`].
    Propose {
        /// The number of the proposal.
        number: u64,
        /// The change.
        command: Command,
    },
    /// Change the members of Raft; the answer is [`Input::Decided`] without events.
    Change {
        /// The number of the proposal.
        number: u64,
        /// The change.
        change: MemberChange,
    },
    /// Hand leadership to another voter.
    Transfer {
        /// Which.
        to: NodeId,
    },
    /// Send this to a worker.
    Order {
        /// The stream.
        session: SessionId,
        /// What.
        order: Order,
    },
    /// A worker's join was refused.
    Refuse {
        /// The stream.
        session: SessionId,
        /// Why.
        why: Rejected,
    },
    /// End a session.
    End {
        /// The stream.
        session: SessionId,
        /// Why, for the worker's log.
        why: &'static str,
    },
}

/// What is known of a node beside the state.
#[derive(Debug, Default)]
struct Contact {
    session: Option<SessionId>,
    /// When it was last heard, or when this leader began to wait for it.
    heard: u64,
    /// Its process has ended, as far as its connection tells, and no other has come.
    died: bool,
}

/// A session whose join is being decided, or was accepted.
#[derive(Debug)]
struct Session {
    node: NodeId,
    held: Vec<Held>,
    admitted: bool,
}

/// What a proposal under way is about; there is never more than one about the same thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Join(SessionId),
    Node(NodeId),
    Group(GroupId),
    Rank(GroupId, Epoch, usize),
    /// Reconciliation's.
    Plan,
    Members,
}

impl Subject {
    /// Whether it comes from a report, which is not made twice; everything else is found again.
    fn said_once(self) -> bool {
        matches!(self, Self::Rank(..) | Self::Group(_))
    }
}

/// Until when a group is not placed, and how long the next pause would be.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: u64,
    next: u64,
    /// Since when it serves, if it does.
    serving: Option<u64>,
}

/// How the state takes what reconciliation wants. A refusal means that something has overtaken it,
/// or that it will be refused again: then it must not fill the log.
#[derive(Debug, Default)]
struct Plans {
    /// In a row.
    refusals: u32,
    /// Nothing is planned before.
    after: u64,
}

impl Plans {
    fn refused(&mut self, now: u64) {
        self.refusals = self.refusals.saturating_add(1);
        let doublings = self.refusals.saturating_sub(REFUSALS).min(8);
        if doublings > 0 {
            self.after = now + (PLAN_REST << doublings);
        }
    }
}

/// The machine. Idle until [`Input::Lead`].
#[derive(Debug)]
pub struct Leader {
    timing: Timing,
    leading: bool,
    now: u64,
    contacts: BTreeMap<NodeId, Contact>,
    sessions: BTreeMap<SessionId, Session>,
    pending: BTreeMap<u64, (Subject, Option<Command>)>,
    /// What workers said, and the log did not take: said once, so it is proposed again.
    again: Vec<(Subject, Command)>,
    /// Nothing is proposed before, except joins.
    wavers: u64,
    next_number: u64,
    pauses: BTreeMap<GroupId, Pause>,
    repairs: Repairs,
    moves: Moves,
    progress: Progress,
    /// Since when a learner has been near the end of the log.
    caught_up: BTreeMap<NodeId, u64>,
    /// No change of members is tried before; a refused one is not repeated at once.
    members_after: u64,
    /// What workers said of epochs that are over.
    stale_reports: u64,
    plans: Plans,
    out: Vec<Output>,
}

/// What the machine looks at besides its inputs.
#[derive(Debug, Clone, Copy)]
pub struct Sight<'a> {
    /// Milliseconds of a clock that never goes back.
    pub now: u64,
    /// The state as applied here.
    pub cluster: &'a ClusterState,
    /// Where the replica stands.
    pub replica: &'a ReplicaStatus,
}

impl Leader {
    /// A leader that does not lead yet. Its proposals are numbered from `first_number` on.
    pub fn new(timing: Timing, first_number: u64) -> Self {
        Self {
            timing,
            leading: false,
            now: 0,
            contacts: BTreeMap::new(),
            sessions: BTreeMap::new(),
            pending: BTreeMap::new(),
            again: Vec::new(),
            wavers: 0,
            next_number: first_number,
            pauses: BTreeMap::new(),
            repairs: Repairs::default(),
            moves: Moves::default(),
            progress: Progress::new(),
            caught_up: BTreeMap::new(),
            members_after: 0,
            stale_reports: 0,
            plans: Plans::default(),
            out: Vec::new(),
        }
    }

    /// Whether it leads.
    pub fn leads(&self) -> bool {
        self.leading
    }

    /// How far ranks have loaded, as far as they said so here.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// How often workers spoke of epochs that are over, since this process began.
    pub fn stale_reports(&self) -> u64 {
        self.stale_reports
    }

    /// How many workers have a session here.
    pub fn sessions(&self) -> usize {
        self.sessions.values().filter(|session| session.admitted).count()
    }

    /// Takes one input; says what to do.
    pub fn handle(&mut self, sight: Sight<'_>, input: Input) -> Vec<Output> {
        self.now = self.now.max(sight.now);
        match input {
            Input::Lead => self.lead(),
            Input::Follow => self.follow(),
            Input::Open { session, node, info, held } => {
                self.open(sight.cluster, session, (node, info, held));
            }
            Input::Closed { session, left } => self.closed(sight.cluster, session, left),
            Input::Died { session } => self.died(sight.cluster, session),
            Input::Report { session, report } => self.report(sight.cluster, session, report),
            Input::Decided { number, outcome } => self.decided(sight.cluster, number, outcome),
            Input::Changed { events } => self.changed(sight.cluster, &events),
            Input::Tick => {}
        }
        if self.leading && self.now >= self.wavers {
            for (subject, command) in std::mem::take(&mut self.again) {
                self.propose(subject, command);
            }
            self.leases(sight.cluster);
            self.stalls(sight.cluster);
            self.plan(sight.cluster);
            self.members(sight);
        }
        std::mem::take(&mut self.out)
    }

    fn lead(&mut self) {
        self.forget();
        self.leading = true;
    }

    fn follow(&mut self) {
        for &session in self.sessions.keys() {
            self.out.push(Output::End { session, why: "this coordinator leads no longer" });
        }
        self.forget();
    }

    fn forget(&mut self) {
        self.leading = false;
        self.contacts.clear();
        self.sessions.clear();
        self.pending.clear();
        self.again.clear();
        self.wavers = 0;
        self.pauses.clear();
        self.repairs = Repairs::default();
        self.moves = Moves::default();
        self.plans = Plans::default();
        self.progress.clear();
        self.caught_up.clear();
    }

    fn is_pending(&self, subject: Subject) -> bool {
        self.pending.values().any(|(other, _)| *other == subject)
    }

    fn number(&mut self, subject: Subject, command: Option<Command>) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.pending.insert(number, (subject, command));
        number
    }

    /// Proposes a change unless one about the same thing is under way.
    fn propose(&mut self, subject: Subject, command: Command) {
        if !self.leading || self.is_pending(subject) {
            return;
        }
        if self.now < self.wavers && !matches!(subject, Subject::Join(_)) {
            return self.say_again(subject, command);
        }
        let kept = subject.said_once().then(|| command.clone());
        let number = self.number(subject, kept);
        self.out.push(Output::Propose { number, command });
    }

    fn say_again(&mut self, subject: Subject, command: Command) {
        if subject.said_once() && self.again.iter().all(|(other, _)| *other != subject) {
            self.again.push((subject, command));
        }
    }

    /// Proposes what reconciliation wants, one round at a time.
    fn plan(&mut self, cluster: &ClusterState) {
        if self.is_pending(Subject::Plan) || self.now < self.plans.after {
            return;
        }
        let observation = self.observe(cluster);
        let wanted = cluster::reconcile(cluster, &observation);
        for command in self.due(cluster, wanted) {
            let number = self.number(Subject::Plan, None);
            self.out.push(Output::Propose { number, command });
        }
    }

    fn decided(
        &mut self,
        cluster: &ClusterState,
        number: u64,
        outcome: Option<Result<Vec<Event>, Rejected>>,
    ) {
        let Some((subject, command)) = self.pending.remove(&number) else { return };
        if outcome.is_none() {
            self.wavers = self.now + WAVERING;
            if let Some(command) = command {
                self.say_again(subject, command);
            }
        }
        match (subject, outcome) {
            (Subject::Join(session), Some(Ok(_))) => self.admit(cluster, session),
            (Subject::Join(session), Some(Err(why))) => {
                self.drop_session(session);
                self.out.push(Output::Refuse { session, why });
            }
            (Subject::Join(session), None) => {
                self.drop_session(session);
                self.out.push(Output::End { session, why: "the join could not be decided" });
            }
            (Subject::Members, outcome) if !matches!(outcome, Some(Ok(_))) => {
                self.members_after = self.now + 1_000;
            }
            (Subject::Plan, Some(Ok(_))) => self.plans = Plans::default(),
            (subject, Some(Err(why))) => {
                if subject == Subject::Plan {
                    self.plans.refused(self.now);
                }
                // Usual where a change overtook it; what is still wanted is proposed again.
                tracing::debug!(?subject, %why, "the leader's own proposal was refused");
            }
            _ => {}
        }
    }

    fn changed(&mut self, cluster: &ClusterState, events: &[Event]) {
        if !self.leading {
            return;
        }
        self.note_repairs(cluster, events);
        // Another state than the one that refused: a repair does not wait for somebody's bad plan.
        self.plans.after = 0;
        for event in events {
            tracing::debug!(?event, "decided");
            match event {
                Event::GroupPlaced { group, .. } => self.order_formation(cluster, *group),
                Event::GroupServing { group, .. } => {
                    let now = self.now;
                    if let Some(pause) = self.pauses.get_mut(group) {
                        pause.serving = Some(now);
                    }
                }
                Event::GroupFenced { group, epoch, nodes, reason, .. } => {
                    self.order_retirement(*group, *epoch, nodes, reason);
                }
                Event::GroupRetired { group, epoch, nodes, reason } => {
                    self.pauses.remove(group);
                    self.order_retirement(*group, *epoch, nodes, reason);
                }
                // A rank fails when its peer dies. Now that the peer is known to be gone, there is
                // nothing to wait for: others may take its place at once.
                Event::NodeLost { node } | Event::NodeSuspect { node } => {
                    self.hasten(cluster, *node);
                }
                Event::NodeLeft { node } => {
                    self.dismiss(*node);
                    if let Some(order) = orders::roll(cluster) {
                        self.order_all(&order);
                    }
                }
                Event::CertificatesRotated { generation } => {
                    self.order_all(&Order::Certificate { generation: *generation });
                }
                _ => {}
            }
        }
    }

    /// A rank failed: its group waits before it is placed again, longer each time, unless it had
    /// served for long.
    fn pause(&mut self, group: GroupId) {
        let now = self.now;
        let fresh = Pause { until: 0, next: FIRST_PAUSE, serving: None };
        let pause = self.pauses.entry(group).or_insert(fresh);
        if pause.serving.take().is_some_and(|since| now - since > LONGEST_PAUSE) {
            pause.next = FIRST_PAUSE;
        }
        pause.until = now + pause.next;
        pause.next = (pause.next * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests;
