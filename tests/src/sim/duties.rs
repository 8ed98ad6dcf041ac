//! The leader's duties on each coordinator: the production machine between the replica and the
//! sessions of workers, as the production driver stands between them.

use std::collections::BTreeMap;

use cluster::NodeInfo;
use control::leader::{Input, Leader, Output, SessionId, Sight, Timing};
use control::replica::Input as ReplicaInput;
use planner::NodeId;
use wire::{Held, Report};

use super::checks::{Checked, Violation};
use super::cluster::ClusterWorkload;
use super::fleet::Down;
use super::world::World;

/// How patient leaders are: what is the default, but for a lease that a run outlasts.
pub const TIMING: Timing = Timing { heartbeat: 100, suspicion: 500, lease: 2_000, takeover: 2_000 };

/// No instant of time is worth so many inputs.
const AT_ONCE: usize = 10_000;

/// What a coordinator's process does beside its replica.
#[derive(Debug)]
pub struct Duty {
    leader: Leader,
    next_session: u64,
    /// By session: the line to its worker.
    lines: BTreeMap<SessionId, u64>,
}

impl Default for Duty {
    fn default() -> Self {
        Self { leader: Leader::new(TIMING, 1), next_session: 1, lines: BTreeMap::new() }
    }
}

impl World<ClusterWorkload> {
    /// Gives the leader's machine of a node an input and does what it wants done.
    ///
    /// # Errors
    /// A violation.
    pub(super) fn lead(&mut self, id: u64, input: Input) -> Checked {
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(process) = &mut node.process else { return Ok(()) };
        if !process.duty.leader.leads() && matches!(input, Input::Tick | Input::Changed { .. }) {
            return Ok(());
        }
        let status = process.replica.status();
        let cluster = process.replica.machine().inner.state();
        let sight = Sight { now: self.now / 1_000, cluster, replica: &status };
        let outputs = process.duty.leader.handle(sight, input);
        for output in outputs {
            self.perform_duty(id, output);
        }
        Ok(())
    }

    fn perform_duty(&mut self, id: u64, output: Output) {
        self.trace.line(self.now, || {
            let shown = format!("{output:?}");
            format!("{id}: {}", shown.chars().take(200).collect::<String>())
        });
        let input = match output {
            Output::Propose { number, command } => {
                let command = wire::encode_command(&command.into());
                ReplicaInput::Propose { request: number, command }
            }
            Output::Change { number, change } => ReplicaInput::Change { request: number, change },
            Output::Transfer { to } => ReplicaInput::Transfer { to },
            Output::Order { session, order } => {
                if let Some(line) = self.line_of(id, session) {
                    self.down(line, Down::Order(order));
                }
                return;
            }
            Output::Refuse { session, .. } => return self.end_session(id, session, Down::Refused),
            Output::End { session, .. } => return self.end_session(id, session, Down::Ended),
        };
        self.extra.queue.push_back((id, input));
    }

    fn line_of(&self, id: u64, session: SessionId) -> Option<u64> {
        self.nodes.get(&id)?.process.as_ref()?.duty.lines.get(&session).copied()
    }

    fn end_session(&mut self, id: u64, session: SessionId, how: Down) {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        if let Some(line) = process.and_then(|process| process.duty.lines.remove(&session)) {
            self.down(line, how);
            if let Some(line) = self.extra.lines.get_mut(&line) {
                line.session = None;
            }
        }
    }

    /// Feeds replicas what the duties of this and other nodes led to.
    ///
    /// # Errors
    /// A violation.
    pub(super) fn feed_duties(&mut self) -> Checked {
        for _ in 0..AT_ONCE {
            let Some((id, input)) = self.extra.queue.pop_front() else { return Ok(()) };
            self.feed(id, input)?;
        }
        Err(Violation(format!("a leader spins: {:?}", self.extra.queue.pop_front())))
    }

    /// A worker opens a session at a coordinator.
    pub(super) fn open_session(
        &mut self,
        id: u64,
        line: u64,
        (node, info, held): (NodeId, NodeInfo, Vec<Held>),
    ) -> Checked {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        let Some(process) = process else { return Ok(()) };
        if !process.duty.leader.leads() {
            let leader = process.replica.status().leader.map(|leader| leader.0);
            self.down(line, Down::Elsewhere(leader.filter(|leader| *leader != id)));
            return Ok(());
        }
        let session = SessionId(process.duty.next_session);
        process.duty.next_session += 1;
        process.duty.lines.insert(session, line);
        if let Some(line) = self.extra.lines.get_mut(&line) {
            line.session = Some(session);
        }
        self.lead(id, Input::Open { session, node, info, held })
    }

    /// A worker says something in its session.
    pub(super) fn session_report(
        &mut self,
        id: u64,
        session: SessionId,
        report: Report,
    ) -> Checked {
        self.lead(id, Input::Report { session, report })
    }

    /// A session's stream broke, perhaps as that of a process that died does.
    pub(super) fn session_closed(&mut self, id: u64, session: SessionId, died: bool) -> Checked {
        let process = self.nodes.get_mut(&id).and_then(|node| node.process.as_mut());
        let known = process.is_some_and(|process| process.duty.lines.remove(&session).is_some());
        match (known, died) {
            (false, _) => Ok(()),
            (true, true) => self.lead(id, Input::Died { session }),
            (true, false) => self.lead(id, Input::Closed { session, left: false }),
        }
    }
}
