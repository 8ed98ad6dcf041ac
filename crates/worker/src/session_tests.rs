//! A session with a coordinator that does nothing but what a test says, over a real connection.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use cluster::{Epoch, GroupId};
use identity::{Admit, ClusterCa, NODE_LIFE, Role};
use planner::{DeviceSpec, NodeId};
use tokio::net::TcpListener;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Streaming};
use wire::pb::coordinator_server::Coordinator;

use super::*;

/// Welcomes a worker, gives it one order and answers its heartbeats.
#[derive(Clone)]
struct Gives {
    order: Order,
    beats: Arc<AtomicUsize>,
}

type Orders = UnboundedReceiverStream<Result<pb::Order, Status>>;

#[tonic::async_trait]
impl Coordinator for Gives {
    type SessionStream = Orders;
    type WatchStream = UnboundedReceiverStream<Result<pb::StatusReply, Status>>;

    async fn session(
        &self,
        reports: Request<Streaming<pb::WorkerReport>>,
    ) -> Result<Response<Orders>, Status> {
        let (to, orders) = channel::unbounded_channel();
        let (this, mut reports) = (self.clone(), reports.into_inner());
        tokio::spawn(async move {
            let (heartbeat_ms, lease_ms) = (10, 60_000);
            let welcome = Order::Welcome { node: NodeId(2), heartbeat_ms, lease_ms, generation: 0 };
            for order in [&welcome, &this.order] {
                to.send(Ok(order.to_wire())).expect("a session");
            }
            while let Ok(Some(report)) = reports.message().await {
                if matches!(Report::from_wire(report), Ok(Report::Heartbeat(_))) {
                    this.beats.fetch_add(1, Ordering::SeqCst);
                    let _ = to.send(Ok(Order::Lease.to_wire()));
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(orders)))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn watch(
        &self,
        _: Request<pb::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn room(&self, _: Request<pb::RoomRequest>) -> Result<Response<pb::RoomReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn change(
        &self,
        _: Request<pb::ChangeRequest>,
    ) -> Result<Response<pb::ChangeReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn transfer(
        &self,
        _: Request<pb::TransferRequest>,
    ) -> Result<Response<pb::TransferReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn enrol(
        &self,
        _: Request<pb::EnrolRequest>,
    ) -> Result<Response<pb::EnrolReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn renew(
        &self,
        _: Request<pb::RenewRequest>,
    ) -> Result<Response<pb::RenewReply>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn messages(
        &self,
        _: Request<Streaming<pb::RaftEnvelope>>,
    ) -> Result<Response<pb::RaftDone>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

/// A worker that belongs to the coordinator at `address`.
async fn worker(ca: &ClusterCa, address: String, groups: &Arc<Groups>) -> Session {
    let now = SystemTime::now();
    let tls = Tls::new(ca.node(2, Role::Worker, NODE_LIFE, now).expect("a credential"));
    let tls = tls.expect("a good one");
    let hardware = Hardware {
        devices: Vec::new(),
        endpoints: Vec::new(),
        models: BTreeMap::new(),
        tls: tls.clone(),
        runtime: tokio::runtime::Handle::current(),
    };
    let info = NodeInfo {
        boot: 1,
        name: "w".to_owned(),
        worker_address: "host:9000".to_owned(),
        collective_addresses: vec!["host:9100".to_owned()],
        devices: vec![DeviceSpec { memory_bytes: 1, weight: 1.0 }],
        model_digests: BTreeSet::from(["abc123".to_owned()]),
        kernel_class: "portable".to_owned(),
        version: "0.0.0".to_owned(),
    };
    Session {
        coordinators: vec![address],
        info,
        groups: Arc::clone(groups),
        hardware: Arc::new(hardware),
        tls,
        identity: PathBuf::new(),
        health: transport::health("worker").await.0,
    }
}

/// A thread that loads looks up only now and then: whoever waits for it is alive all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_do_not_wait_for_orders() {
    let ca = ClusterCa::create(SystemTime::now()).expect("an authority");
    let credential = ca.node(1, Role::Coordinator, NODE_LIFE, SystemTime::now());
    let tls = Tls::new(credential.expect("a credential")).expect("a good one");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (group, epoch) = (GroupId(7), Epoch(3));
    let order = Order::Retire { group, epoch, reason: "it moves".to_owned() };
    let coordinator = Gives { order, beats: Arc::default() };
    let beats = Arc::clone(&coordinator.beats);
    let server = transport::server().add_service(transport::coordinator_server(coordinator));
    let incoming = transport::incoming(listener, &tls, Admit::nodes()).expect("TLS");
    tokio::spawn(server.serve_with_incoming(incoming));

    let groups = Arc::new(Groups::default());
    let (release, held) = std::sync::mpsc::channel::<()>();
    groups.take_in(group, epoch, move || {
        let _ = held.recv();
    });
    let session = worker(&ca, address, &groups).await;
    let shutdown = CancellationToken::new();
    let end = shutdown.clone();
    let running = tokio::spawn(async move { session.run(&end).await });
    let waited = async {
        // The order is being obeyed once the group is out, and its thread goes on.
        while groups.hosts(group, epoch) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let before = beats.load(Ordering::SeqCst);
        while beats.load(Ordering::SeqCst) < before + 20 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let beating = tokio::time::timeout(Duration::from_secs(20), waited).await;
    drop(release);
    assert!(beating.is_ok(), "no heartbeat came while a thread was waited for");
    shutdown.cancel();
    running.await.expect("no panic").expect("a worker that ends in order");
}

#[test]
fn a_refusal_says_where_to_go() {
    let hinted = |hint: &'static str| {
        let mut status = Status::unavailable("this coordinator does not lead");
        status.metadata_mut().insert(LEADER_KEY, hint.parse().expect("ASCII"));
        end_of(&status)
    };
    assert!(matches!(hinted("3@host:1"), End::Elsewhere(to) if to == "host:1"));
    assert!(matches!(hinted("none"), End::NoLeader));
    assert!(matches!(hinted("3@"), End::Broken(_)));
    assert!(matches!(end_of(&Status::failed_precondition("x")), End::Refused(_)));
    assert!(matches!(end_of(&Status::unavailable("x")), End::Broken(_)));
}
