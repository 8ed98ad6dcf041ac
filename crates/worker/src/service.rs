//! The gRPC service of a worker: generation on the leader, steps on every rank, counts.

use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};

use cluster::{Epoch, GroupId};
use collective::tcp::Endpoint;
use engine::{Event, Rejected, SeqId};
use identity::Role;
use planner::NodeId;
use tokio::sync::{mpsc as channel, oneshot};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use wire::{Generate, StepOrder, StepReport, pb, transport};

use crate::group::{Groups, NoGroup};
use crate::leader::{Command, GroupGone};
use crate::rank::StepDone;

/// Room in an answer's channel beyond its tokens: the end, and an error.
const SPARE: usize = 8;

/// Serves the groups of this worker.
pub(crate) struct Service {
    pub(crate) groups: Arc<Groups>,
    /// Where the ranks of this worker meet their peers.
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
}

impl From<NoGroup> for Status {
    fn from(error: NoGroup) -> Self {
        match error {
            NoGroup::OtherEpoch { .. } => Status::failed_precondition(error.to_string()),
            NoGroup::OtherLeader { .. } => Status::permission_denied(error.to_string()),
            NoGroup::Unknown(_) | NoGroup::OtherRank { .. } => {
                Status::unavailable(error.to_string())
            }
        }
    }
}

fn gone() -> Status {
    Status::unavailable("the group ended")
}

fn refused(rejected: &Rejected) -> Status {
    match rejected {
        Rejected::QueueFull { .. } => Status::resource_exhausted(rejected.to_string()),
        _ => Status::invalid_argument(rejected.to_string()),
    }
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::worker_server::Worker for Service {
    type GenerateStream = Answer;
    type StepsStream = Boxed<pb::StepReport>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        coordinator(&request)?;
        let Generate { group, epoch, request_id, request, so_far } =
            Generate::from_wire(request.into_inner())?;
        let leader = self.groups.leader(group, epoch)?;
        let echoed = request.prompt_logprobs.map_or(0, |_| request.prompt.len());
        let capacity = room(request.stop.max_tokens, echoed)?;
        let (events, incoming) = channel::channel(capacity);
        let (reply, submitted) = oneshot::channel();
        let command = Command::Submit { request: Box::new(request), so_far, events, reply };
        leader.send(command).map_err(|_| gone())?;
        let seq = submitted.await.map_err(|_| gone())?.map_err(|r| refused(&r))?;
        tracing::debug!(request_id, seq = seq.0, "sequence submitted");
        Ok(Response::new(Answer { group, epoch, incoming, cancel: Some((seq, leader)) }))
    }

    async fn steps(
        &self,
        request: Request<Streaming<pb::StepPlan>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let caller = worker(&request)?;
        let mut plans = request.into_inner();
        let groups = Arc::clone(&self.groups);
        let (done, finished) = channel::unbounded_channel();
        let (reports, outgoing) = channel::channel(16);
        tokio::spawn(async move {
            let mut finished = UnboundedReceiverStream::new(finished);
            let mut origin = None;
            loop {
                let report = tokio::select! {
                    plan = plans.next() => match plan {
                        Some(Ok(plan)) => match hand_over(&groups, plan, caller, &done) {
                            Ok(order) => {
                                origin = Some(order);
                                continue;
                            }
                            Err(status) => Err(status),
                        },
                        // A leader that ends by itself says so to the coordinator.
                        None => return,
                        Some(Err(_)) => {
                            if let Some((group, epoch, rank)) = origin {
                                groups.left_alone(group, epoch, rank);
                            }
                            return;
                        }
                    },
                    Some(step) = finished.next() => {
                        let StepDone { number, failure } = step;
                        let Some((group, epoch, rank)) = origin else { continue };
                        let blames = failure.as_ref().and_then(|failure| failure.blames);
                        let error = failure.map(|failure| failure.reason);
                        let report = StepReport { group, epoch, rank, number, error, blames };
                        Ok(report.to_wire())
                    }
                };
                let last = report.is_err();
                if reports.send(report).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn counts(
        &self,
        request: Request<pb::CountsRequest>,
    ) -> Result<Response<pb::CountsReply>, Status> {
        coordinator(&request)?;
        let pb::CountsRequest { group, epoch } = request.into_inner();
        let leader = self.groups.leader(GroupId(group), Epoch(epoch))?;
        let (reply, counted) = oneshot::channel();
        leader.send(Command::Counts(reply)).map_err(|_| gone())?;
        let (counts, integrity) = counted.await.map_err(|_| gone())?;
        let integrity = integrity.err().unwrap_or_default();
        let frames = self.endpoints.iter().map(|endpoint| endpoint.stale()).sum();
        let stale = [self.groups.stale(), frames];
        Ok(Response::new(wire::counts_to_wire(&counts, integrity, stale)))
    }

    async fn pulse(
        &self,
        request: Request<pb::PulseRequest>,
    ) -> Result<Response<pb::PulseReply>, Status> {
        let peer = transport::peer(&request)?;
        if peer.node(Role::Coordinator).or(peer.node(Role::Worker)).is_none() {
            return Err(Status::permission_denied(format!("{peer} may not look at ranks")));
        }
        let pb::PulseRequest { group, epoch, rank } = request.into_inner();
        let rank = usize::try_from(rank).unwrap_or(usize::MAX);
        let pulse = self.groups.pulse(GroupId(group), Epoch(epoch), rank)?;
        Ok(Response::new(pulse.look().to_wire()))
    }
}

/// Requests come from the gateways of coordinators and from nobody else.
fn coordinator<T>(request: &Request<T>) -> Result<(), Status> {
    let peer = transport::peer(request)?;
    let denied = || Status::permission_denied(format!("{peer} may not ask for answers"));
    peer.node(Role::Coordinator).map(|_| ()).ok_or_else(denied)
}

/// Steps come from the worker that leads; whether it does is known when one has come.
fn worker<T>(request: &Request<T>) -> Result<NodeId, Status> {
    let peer = transport::peer(request)?;
    let denied = || Status::permission_denied(format!("{peer} may not send steps"));
    peer.node(Role::Worker).map(NodeId).ok_or_else(denied)
}

/// Room for a whole answer, so that a slow reader never holds up the leader.
fn room(max_tokens: usize, echoed: usize) -> Result<usize, Status> {
    let room = max_tokens.checked_add(echoed).and_then(|n| n.checked_add(SPARE));
    room.filter(|n| *n <= tokio::sync::Semaphore::MAX_PERMITS)
        .ok_or_else(|| Status::invalid_argument("max_tokens is out of range"))
}

/// Passes one step to its rank; returns which rank of which incarnation that is.
fn hand_over(
    groups: &Groups,
    plan: pb::StepPlan,
    caller: NodeId,
    done: &channel::UnboundedSender<StepDone>,
) -> Result<(GroupId, Epoch, usize), Status> {
    let StepOrder { group, epoch, rank, step } = StepOrder::from_wire(plan)?;
    let steps = groups.steps(group, epoch, rank, caller)?;
    steps.send((step, done.clone())).map_err(|_| gone())?;
    Ok((group, epoch, rank))
}

/// A sequence's events as they come. Dropped before the end, it cancels the sequence.
pub(crate) struct Answer {
    group: GroupId,
    epoch: Epoch,
    incoming: channel::Receiver<Result<Event, GroupGone>>,
    cancel: Option<(SeqId, mpsc::Sender<Command>)>,
}

impl Stream for Answer {
    type Item = Result<pb::GenerateEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let answer = self.get_mut();
        if answer.cancel.is_none() {
            return Poll::Ready(None);
        }
        let item = match std::task::ready!(answer.incoming.poll_recv(cx)) {
            Some(Ok(event)) => {
                if matches!(event, Event::Finished { .. }) {
                    answer.cancel = None;
                }
                Ok(wire::event_to_wire(answer.group, answer.epoch, &event))
            }
            Some(Err(end)) => {
                answer.cancel = None;
                Err(Status::unavailable(end.to_string()))
            }
            None => {
                answer.cancel = None;
                Err(gone())
            }
        };
        Poll::Ready(Some(item))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some((seq, leader)) = self.cancel.take() {
            // A leader that ended has no sequences.
            let _ = leader.send(Command::Cancel(seq));
        }
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
