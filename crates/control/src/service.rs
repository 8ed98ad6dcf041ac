//! The Coordinator service: who calls is known from the handshake; what comes in is checked and
//! handed to the driver.

use std::pin::Pin;
use std::time::Duration;

use cluster::Command;
use identity::{Peer, Role};
use planner::NodeId;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Response, Status, Streaming};
use wire::pb::coordinator_server::Coordinator;
use wire::{Report, pb, transport};

use crate::authority::Authority;
use crate::client::{Control, address_of, outcome_to_wire};
use crate::driver::{Closing, Event, NotWritten};
use crate::leader::SessionId;
use crate::load;
use crate::replica::ProposeError;

/// How long a change or a read may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a status as of now may take before the one that is known here is given.
const GLANCE: Duration = Duration::from_secs(2);
/// How long a session's first report may take.
const FIRST: Duration = Duration::from_secs(5);
/// States that may wait for a watcher; what it does not read it does not see.
const WATCHED: usize = 4;

/// In the metadata of a refusal: `NODE@HOST:PORT` of the leader, or `none` where nobody leads as
/// far as this coordinator knows, so that nothing can be decided against whoever asks.
pub const LEADER_KEY: &str = "phalanx-leader";
/// Nobody leads.
pub const NO_LEADER: &str = "none";

/// The gRPC face of a coordinator.
pub(crate) struct Service {
    pub(crate) control: Control,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) authority: Authority,
    pub(crate) shutdown: CancellationToken,
}

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    async fn send(&self, event: Event) -> Result<(), Status> {
        self.events.send(event).await.map_err(|_| ending())
    }

    /// Refuses what only a leader can do, and says who that is.
    fn require_leader(&self) -> Result<(), Status> {
        let leadership = self.control.leadership();
        if leadership.leading {
            return Ok(());
        }
        let leader = leadership.leader.filter(|leader| *leader != self.control.node());
        let hint = leader.map_or_else(
            || NO_LEADER.to_owned(),
            |leader| {
                let address = address_of(&self.control.view().borrow(), leader);
                format!("{}@{}", leader.0, address.unwrap_or_default())
            },
        );
        let mut status = Status::unavailable("this coordinator does not lead");
        if let Ok(value) = MetadataValue::try_from(hint) {
            status.metadata_mut().insert(LEADER_KEY, value);
        }
        Err(status)
    }

    /// The first report, which must be a join.
    async fn first(
        &self,
        reports: &mut Streaming<pb::WorkerReport>,
    ) -> Result<(cluster::NodeInfo, Vec<wire::Held>), Status> {
        let first = tokio::select! {
            first = tokio::time::timeout(FIRST, reports.message()) => first,
            () = self.shutdown.cancelled() => return Err(ending()),
        };
        let first = first.map_err(|_| Status::deadline_exceeded("no report came in time"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("the session has no report"))?;
        match Report::from_wire(first)? {
            Report::Join(info, held) => Ok((info, held)),
            _ => Err(Status::invalid_argument("the first report must be a join")),
        }
    }

    async fn status_now(&self, local: bool) -> Result<pb::StatusReply, Status> {
        // Without a majority an operator needs to see what there is all the more.
        let current = !local && self.control.read(GLANCE).await.is_ok();
        let (reply, status) = oneshot::channel();
        self.send(Event::Status { reply }).await?;
        let mut status = status.await.map_err(|_| ending())?;
        status.current = current;
        Ok(status)
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = ReceiverStream<Result<pb::Order, Status>>;
    type WatchStream = Boxed<pb::StatusReply>;

    async fn session(
        &self,
        request: Request<Streaming<pb::WorkerReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let node = worker(&transport::peer(&request)?)?;
        self.require_leader()?;
        let mut reports = request.into_inner();
        let (info, held) = self.first(&mut reports).await?;
        let (reply, opened) = oneshot::channel();
        self.send(Event::Open { node, info, held, reply }).await?;
        let opened = opened.await.map_err(|_| ending())?;
        let session = Session {
            id: opened.session,
            reports,
            ended: opened.ended,
            events: self.events.clone(),
        };
        tokio::spawn(session.run());
        Ok(Response::new(ReceiverStream::new(opened.orders)))
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusReply>, Status> {
        looker(&transport::peer(&request)?)?;
        let pb::StatusRequest { local, load } = request.into_inner();
        let mut status = self.status_now(local).await?;
        if load {
            load::ask(&self.control, &mut status).await;
        }
        Ok(Response::new(status))
    }

    async fn room(
        &self,
        request: Request<pb::RoomRequest>,
    ) -> Result<Response<pb::RoomReply>, Status> {
        looker(&transport::peer(&request)?)?;
        let wish = request.into_inner().deployment;
        let wish = wish.ok_or_else(|| Status::invalid_argument("deployment is missing"))?;
        let wish = wire::wish_from_wire(wish)?;
        let state = self.control.read(PATIENCE).await.map_err(|why| not_written(&why))?;
        let missing = cluster::lacking(&state, &wish).unwrap_or_default();
        Ok(Response::new(pb::RoomReply { missing }))
    }

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        looker(&transport::peer(&request)?)?;
        let after = request.get_ref().after;
        let (sender, watched) = mpsc::channel(WATCHED);
        let (mut view, events) = (self.control.view(), self.events.clone());
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let mut seen = after;
            loop {
                let changed = view.wait_for(|state| state.revision() > seen);
                tokio::select! {
                    changed = changed => match changed {
                        Ok(state) => seen = state.revision(),
                        Err(_) => return,
                    },
                    () = shutdown.cancelled() => return,
                    () = sender.closed() => return,
                }
                let (reply, status) = oneshot::channel();
                if events.send(Event::Status { reply }).await.is_err() {
                    return;
                }
                let Ok(status) = status.await else { return };
                seen = seen.max(status.revision);
                if sender.send(Ok(status)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(watched))))
    }

    async fn change(
        &self,
        request: Request<pb::ChangeRequest>,
    ) -> Result<Response<pb::ChangeReply>, Status> {
        let peer = transport::peer(&request)?;
        let pb::ChangeRequest { command, forwarded } = request.into_inner();
        let proposal = wire::decode_command(&command)?;
        may_change(&peer, &proposal.command)?;
        let outcome = if forwarded {
            let until = tokio::time::Instant::now() + PATIENCE;
            self.control.write_here(proposal, until).await
        } else {
            self.control.write(proposal, PATIENCE).await
        };
        let outcome = outcome.map_err(|why| not_written(&why))?;
        tracing::info!(by = %peer, accepted = outcome.is_ok(), "a change was asked for");
        Ok(Response::new(outcome_to_wire(&outcome)))
    }

    async fn transfer(
        &self,
        request: Request<pb::TransferRequest>,
    ) -> Result<Response<pb::TransferReply>, Status> {
        looker(&transport::peer(&request)?)?;
        let pb::TransferRequest { node, forwarded } = request.into_inner();
        let leadership = self.control.leadership();
        if !leadership.leading {
            let leader = leadership.leader.filter(|_| !forwarded);
            let leader = leader.ok_or_else(|| Status::unavailable("nobody leads"))?;
            let mut client = self.control.leader_client(leader)?;
            return client.transfer(pb::TransferRequest { node, forwarded: true }).await;
        }
        let to = Some(NodeId(node)).filter(|node| node.0 > 0);
        let (reply, begun) = oneshot::channel();
        self.send(Event::Transfer { to, reply }).await?;
        if !begun.await.map_err(|_| ending())? {
            return Err(Status::failed_precondition("only another voter that is there could lead"));
        }
        Ok(Response::new(pb::TransferReply {}))
    }

    async fn enrol(
        &self,
        request: Request<pb::EnrolRequest>,
    ) -> Result<Response<pb::EnrolReply>, Status> {
        let peer = transport::peer(&request)?;
        let request = request.into_inner();
        self.authority.enrol(&self.control, &peer, request).await.map(Response::new)
    }

    async fn renew(
        &self,
        request: Request<pb::RenewRequest>,
    ) -> Result<Response<pb::RenewReply>, Status> {
        let peer = transport::peer(&request)?;
        let reply = self.authority.renew(&self.control, &peer, request.get_ref())?;
        Ok(Response::new(reply))
    }

    async fn messages(
        &self,
        request: Request<Streaming<pb::RaftEnvelope>>,
    ) -> Result<Response<pb::RaftDone>, Status> {
        let from = coordinator(&transport::peer(&request)?)?;
        let mut envelopes = request.into_inner();
        loop {
            let envelope = tokio::select! {
                envelope = envelopes.message() => envelope?,
                () = self.shutdown.cancelled() => return Err(ending()),
            };
            let Some(pb::RaftEnvelope { address, message }) = envelope else {
                return Ok(Response::new(pb::RaftDone {}));
            };
            if !address.is_empty() {
                cluster::check_address("address", &address).map_err(wire::WireError::from)?;
                self.send(Event::Address { peer: from, address }).await?;
            }
            if let Some(message) = message {
                self.send(Event::Raft { from, message }).await?;
            }
        }
    }
}

/// One worker's reports, from its welcome to its end.
struct Session {
    id: SessionId,
    reports: Streaming<pb::WorkerReport>,
    /// The driver has ended the session.
    ended: CancellationToken,
    events: mpsc::Sender<Event>,
}

impl Session {
    async fn run(mut self) {
        let ended = self.ended.clone();
        let how = tokio::select! {
            how = self.pump() => how,
            () = ended.cancelled() => return,
        };
        // Without a driver there is nobody who would need to know.
        let _ = self.events.send(Event::Closed { session: self.id, how }).await;
    }

    /// Hands reports to the driver until there are no more; how the session ended.
    async fn pump(&mut self) -> Closing {
        loop {
            let report = match self.reports.message().await {
                Ok(Some(report)) => report,
                Ok(None) => return Closing::Left,
                // A peer that gives a stream up says so in a frame of HTTP/2, which has a code.
                Err(status) if status.code() == Code::Unknown => return Closing::Died,
                Err(_) => return Closing::Broke,
            };
            let report = match Report::from_wire(report) {
                Ok(Report::Join(..)) | Err(_) => {
                    tracing::warn!("a worker sent a report that makes no sense");
                    return Closing::Broke;
                }
                Ok(report) => report,
            };
            if self.events.send(Event::Report { session: self.id, report }).await.is_err() {
                return Closing::Broke;
            }
        }
    }
}

fn worker(peer: &Peer) -> Result<NodeId, Status> {
    let node = peer.node(Role::Worker).map(NodeId);
    node.ok_or_else(|| Status::permission_denied("only workers open sessions"))
}

fn coordinator(peer: &Peer) -> Result<NodeId, Status> {
    let node = peer.node(Role::Coordinator).map(NodeId);
    node.ok_or_else(|| Status::permission_denied("only coordinators take part in consensus"))
}

/// Who may see the whole state and hand over leadership.
fn looker(peer: &Peer) -> Result<(), Status> {
    match peer {
        Peer::Operator { .. } | Peer::Node { role: Role::Coordinator, .. } => Ok(()),
        _ => Err(Status::permission_denied("only operators and coordinators may do this")),
    }
}

/// Operators change what operators decide. Coordinators pass on the changes of operators and of
/// nodes that enrol, and say where they are and which model they have.
fn may_change(peer: &Peer, command: &Command) -> Result<(), Status> {
    let operators = matches!(
        command,
        Command::Drain { .. }
            | Command::Undrain { .. }
            | Command::Leave { .. }
            | Command::RegisterModel(_)
            | Command::ForgetModel { .. }
            | Command::Deploy(_)
            | Command::Undeploy { .. }
            | Command::DrainDeployment { .. }
            | Command::Point { .. }
            | Command::Unpoint { .. }
            | Command::RotateCertificates
    );
    let coordinators =
        operators || matches!(command, Command::Enrol { .. } | Command::SetCoordinator { .. });
    let allowed = match peer {
        Peer::Operator { .. } => operators,
        Peer::Node { role: Role::Coordinator, .. } => coordinators,
        _ => false,
    };
    if allowed { Ok(()) } else { Err(Status::permission_denied("not yours to change")) }
}

pub(crate) fn not_written(why: &NotWritten) -> Status {
    let text = why.to_string();
    match why {
        NotWritten::Refused(ProposeError::TooLarge { .. }) => Status::invalid_argument(text),
        NotWritten::Refused(ProposeError::Full) => Status::resource_exhausted(text),
        NotWritten::Refused(ProposeError::ChangePending | ProposeError::BadChange(_)) => {
            Status::failed_precondition(text)
        }
        _ => Status::unavailable(text),
    }
}

pub(crate) fn ending() -> Status {
    Status::unavailable("the coordinator is shutting down")
}
