//! The Coordinator service: checks what comes in and hands it to the owner as events.

use std::time::Duration;

use cluster::Rejected;
use planner::NodeId;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use wire::pb::coordinator_server::Coordinator;
use wire::{Report, pb};

use crate::owner::{Event, Orders};

/// The gRPC face of the owner.
pub(crate) struct Service {
    events: mpsc::Sender<Event>,
    lease: Duration,
    shutdown: CancellationToken,
}

impl Service {
    pub(crate) fn new(
        events: mpsc::Sender<Event>,
        lease: Duration,
        shutdown: CancellationToken,
    ) -> Self {
        Self { events, lease, shutdown }
    }

    async fn send(&self, event: Event) -> Result<(), Status> {
        self.events.send(event).await.map_err(|_| ending())
    }

    /// The first report, which must be a join.
    async fn first(
        &self,
        reports: &mut Streaming<pb::WorkerReport>,
    ) -> Result<cluster::NodeInfo, Status> {
        let first = tokio::select! {
            first = tokio::time::timeout(self.lease, reports.message()) => first,
            () = self.shutdown.cancelled() => return Err(ending()),
        };
        let silent = |_| Status::deadline_exceeded("no report came within the lease");
        let first = first.map_err(silent)??;
        let first = first.ok_or_else(|| Status::invalid_argument("the session has no report"))?;
        match Report::from_wire(first)? {
            Report::Join(info) => Ok(info),
            _ => Err(Status::invalid_argument("the first report must be a join")),
        }
    }
}

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = ReceiverStream<Result<pb::Order, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::WorkerReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut reports = request.into_inner();
        let info = self.first(&mut reports).await?;
        let (reply, joined) = oneshot::channel();
        self.send(Event::Join { info, reply }).await?;
        let joined = joined.await.map_err(|_| ending())?.map_err(|why| refused(&why))?;
        let session = Session {
            node: joined.node,
            reports,
            ended: joined.ended,
            lease: self.lease,
            events: self.events.clone(),
        };
        tokio::spawn(session.run());
        let orders: Orders = joined.orders;
        Ok(Response::new(ReceiverStream::new(orders)))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusReply>, Status> {
        let (reply, status) = oneshot::channel();
        self.send(Event::Status { reply }).await?;
        status.await.map(Response::new).map_err(|_| ending())
    }
}

/// One worker's reports, from its welcome to its end.
struct Session {
    node: NodeId,
    reports: Streaming<pb::WorkerReport>,
    /// The owner has ended the session.
    ended: CancellationToken,
    lease: Duration,
    events: mpsc::Sender<Event>,
}

impl Session {
    async fn run(mut self) {
        let ended = self.ended.clone();
        let why = tokio::select! {
            why = self.pump() => why,
            () = ended.cancelled() => return,
        };
        // Without an owner there is nobody who would need to know.
        let _ = self.events.send(Event::Ended { node: self.node, why }).await;
    }

    /// Hands reports to the owner until there are no more; says why it stopped.
    async fn pump(&mut self) -> Status {
        loop {
            let report = match tokio::time::timeout(self.lease, self.reports.message()).await {
                Ok(Ok(Some(report))) => report,
                Ok(Ok(None)) => return Status::ok("the worker left"),
                Ok(Err(status)) => return status,
                Err(_) => return Status::deadline_exceeded("no report came within the lease"),
            };
            let report = match Report::from_wire(report) {
                Ok(Report::Join(_)) => {
                    return Status::invalid_argument("a session has one join, its first report");
                }
                Ok(report) => report,
                Err(error) => return error.into(),
            };
            // The owner need not hear of a heartbeat: only its absence means something.
            if report == Report::Heartbeat {
                continue;
            }
            let event = Event::Report { node: self.node, report };
            if self.events.send(event).await.is_err() {
                return ending();
            }
        }
    }
}

/// What a worker is told whose join was refused. A worker that comes back before its old session
/// is known to be dead, or while there is no room, shall try again; everything else it cannot mend
/// by waiting.
fn refused(why: &Rejected) -> Status {
    let text = why.to_string();
    match why {
        Rejected::BadNode(_) => Status::invalid_argument(text),
        Rejected::AddressTaken { .. } => Status::already_exists(text),
        Rejected::TooManyNodes { .. } => Status::resource_exhausted(text),
        _ => Status::failed_precondition(text),
    }
}

pub(crate) fn ending() -> Status {
    Status::unavailable("the coordinator is shutting down")
}
