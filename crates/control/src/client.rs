//! Changes and reads, for whoever runs beside the driver: tried here, and at the leader where
//! another coordinator leads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::{ClusterState, Done, Event as Change, Outcome, Proposal, Refusal};
use identity::{Expect, Tls};
use planner::NodeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;
use tonic::transport::Channel;
use wire::pb::coordinator_client::CoordinatorClient;
use wire::{pb, transport};

use crate::driver::{Event, Leadership, NotWritten, Written};
use crate::replica::ProposeError;

/// Between two attempts while nobody leads.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the leader may take to answer before its connection is thought dead.
const LEADER_PROBE: Duration = Duration::from_millis(500);

/// Reads and changes the replicated state. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Control {
    node: NodeId,
    events: mpsc::Sender<Event>,
    view: watch::Receiver<Arc<ClusterState>>,
    leadership: watch::Receiver<Leadership>,
    tls: Tls,
    /// The connection to the latest leader but us.
    leader: Arc<Mutex<Option<(NodeId, String, Channel)>>>,
}

impl Control {
    pub(crate) fn new(
        node: NodeId,
        events: mpsc::Sender<Event>,
        view: watch::Receiver<Arc<ClusterState>>,
        leadership: watch::Receiver<Leadership>,
        tls: Tls,
    ) -> Self {
        Self { node, events, view, leadership, tls, leader: Arc::default() }
    }

    /// This coordinator.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Who this coordinator is.
    pub(crate) fn tls(&self) -> &Tls {
        &self.tls
    }

    /// The state as applied here, after every change; only the newest is kept.
    pub fn view(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.view.clone()
    }

    /// Who leads, as this coordinator knows it.
    pub fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    /// Has a change decided, here or by the leader, within `patience`.
    ///
    /// # Errors
    /// [`NotWritten`]: it is not known to be in the log. A refusal by the state is no error.
    pub async fn write(
        &self,
        proposal: Proposal,
        patience: Duration,
    ) -> Result<Outcome, NotWritten> {
        let until = Instant::now() + patience;
        loop {
            let refused = match self.write_here(proposal.clone(), until).await {
                Ok(outcome) => return Ok(outcome),
                Err(NotWritten::Refused(refused)) => refused,
                Err(other) => return Err(other),
            };
            match refused {
                ProposeError::NotLeader { leader: Some(leader) } if leader != self.node => {
                    let command = wire::encode_command(&proposal);
                    let asked = self.write_there(leader, command.into());
                    match timeout_at(until, asked).await {
                        Ok(Ok(outcome)) => return Ok(outcome),
                        Ok(Err(status)) => {
                            tracing::debug!(reason = transport::reason(&status), "not forwarded");
                        }
                        Err(_) => return Err(NotWritten::Late),
                    }
                }
                ProposeError::NotLeader { .. } | ProposeError::Dropped => {}
                // Applied twice it would be another change, unless its id tells.
                ProposeError::Unknown if proposal.request.is_some() => {}
                other => return Err(other.into()),
            }
            if Instant::now() + PAUSE >= until {
                return Err(NotWritten::Late);
            }
            sleep(PAUSE).await;
        }
    }

    /// Has a change decided by this coordinator, if it leads.
    pub(crate) async fn write_here(
        &self,
        proposal: Proposal,
        until: Instant,
    ) -> Result<Outcome, NotWritten> {
        let (reply, answer) = oneshot::channel();
        let sent = timeout_at(until, self.events.send(Event::Write { proposal, reply })).await;
        sent.map_err(|_| NotWritten::Late)?.map_err(|_| NotWritten::Ending)?;
        match timeout_at(until, answer).await {
            Ok(Ok(written)) => written.map(outcome),
            Ok(Err(_)) => Err(NotWritten::Ending),
            Err(_) => Err(NotWritten::Late),
        }
    }

    async fn write_there(&self, leader: NodeId, command: bytes::Bytes) -> Result<Outcome, Status> {
        let mut client = self.leader_client(leader)?;
        let request = pb::ChangeRequest { command, forwarded: true };
        let reply = client.change(request).await?.into_inner();
        outcome_from_wire(reply)
    }

    /// A client of the coordinator that leads.
    pub(crate) fn leader_client(
        &self,
        leader: NodeId,
    ) -> Result<CoordinatorClient<Channel>, Status> {
        let address = address_of(&self.view.borrow(), leader)
            .ok_or_else(|| Status::unavailable("the leader's address is not known"))?;
        let mut kept = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match kept.as_ref() {
            Some((node, at, channel)) if (*node, at) == (leader, &address) => channel.clone(),
            _ => {
                let endpoint = transport::endpoint(&address)
                    .map_err(|_| Status::internal("the leader's address is not one"))?
                    .http2_keep_alive_interval(LEADER_PROBE)
                    .keep_alive_timeout(LEADER_PROBE)
                    .connect_timeout(LEADER_PROBE);
                let expect = Expect::Node(leader.0);
                let channel = transport::connect_lazy(&endpoint, expect, &self.tls);
                *kept = Some((leader, address, channel.clone()));
                channel
            }
        };
        Ok(transport::coordinator_client(channel))
    }

    /// The state as of now: everything that was acknowledged anywhere before this call is in it.
    ///
    /// # Errors
    /// [`NotWritten::Late`] where no majority answers within `patience`.
    pub async fn read(&self, patience: Duration) -> Result<Arc<ClusterState>, NotWritten> {
        let until = Instant::now() + patience;
        let (reply, answer) = oneshot::channel();
        let sent = timeout_at(until, self.events.send(Event::Read { reply })).await;
        sent.map_err(|_| NotWritten::Late)?.map_err(|_| NotWritten::Ending)?;
        match timeout_at(until, answer).await {
            Ok(Ok(state)) => Ok(state),
            Ok(Err(_)) => Err(NotWritten::Ending),
            Err(_) => Err(NotWritten::Late),
        }
    }
}

/// Where a coordinator is reached.
pub(crate) fn address_of(state: &ClusterState, node: NodeId) -> Option<String> {
    let mut coordinators = state.coordinators();
    let found = coordinators.find(|(id, _)| *id == node);
    found.map(|(_, coordinator)| coordinator.cluster_address.clone())
}

/// What a client is told of a change that was applied.
fn outcome(written: Written) -> Outcome {
    let events = written.result.map_err(|why| Refusal::from(&why))?;
    let index = written.index;
    Ok(events.iter().fold(Done { index, node: None }, |done, event| match event {
        Change::Repeated(first) => *first,
        Change::NodeEnrolled { node } => Done { node: Some(*node), ..done },
        _ => done,
    }))
}

pub(crate) fn outcome_to_wire(outcome: &Outcome) -> pb::ChangeReply {
    let outcome = match outcome {
        Ok(done) => pb::change_reply::Outcome::Done(pb::ChangeDone {
            index: done.index,
            node: done.node.map_or(0, |node| node.0),
        }),
        Err(refusal) => pb::change_reply::Outcome::Refused(pb::ChangeRefused {
            code: refusal.code.name().to_owned(),
            message: refusal.message.clone(),
        }),
    };
    pb::ChangeReply { outcome: Some(outcome) }
}

/// What a coordinator answered to a change.
///
/// # Errors
/// The answer is empty or has a code that this release does not know.
pub fn outcome_from_wire(reply: pb::ChangeReply) -> Result<Outcome, Status> {
    let unreadable = || Status::internal("the answer cannot be read");
    match reply.outcome.ok_or_else(unreadable)? {
        pb::change_reply::Outcome::Done(done) => {
            let node = Some(NodeId(done.node)).filter(|node| node.0 > 0);
            Ok(Ok(Done { index: done.index, node }))
        }
        pb::change_reply::Outcome::Refused(refused) => {
            let code = cluster::Code::from_name(&refused.code).ok_or_else(unreadable)?;
            Ok(Err(Refusal { code, message: refused.message }))
        }
    }
}
