//! Messages of Raft to the other coordinators: one long stream to each, kept up as long as there is
//! something to say. Loss is fine, for Raft repeats; waiting is not, so nothing here blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use identity::{Expect, Tls};
use planner::NodeId;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use wire::{pb, transport};

use crate::driver::Event;
use crate::replica::carries_snapshot;

/// Messages to one peer that may wait; further ones are lost.
const QUEUE: usize = 128;
/// Messages handed to the connection ahead of its window.
const AHEAD: usize = 4;
/// Between two attempts to reach a peer.
const RETRY: Duration = Duration::from_millis(50);
/// How often the connection is probed, and how long a probe may take: what a partition has left
/// of a connection must not outlive the partition for long.
const PROBE: Duration = Duration::from_millis(500);

/// The connections of one coordinator to the others.
pub(crate) struct Peers {
    runtime: Handle,
    tls: Tls,
    /// `host:port` where this coordinator is reached, which it tells whoever it speaks to.
    own: String,
    events: mpsc::Sender<Event>,
    addresses: BTreeMap<NodeId, String>,
    open: BTreeMap<NodeId, Peer>,
}

struct Peer {
    address: String,
    queue: mpsc::Sender<pb::RaftMessage>,
    task: AbortHandle,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peers {
    pub(crate) fn new(runtime: Handle, tls: Tls, own: String, events: mpsc::Sender<Event>) -> Self {
        Self { runtime, tls, own, events, addresses: BTreeMap::new(), open: BTreeMap::new() }
    }

    /// A peer is reached there from now on.
    pub(crate) fn learn(&mut self, peer: NodeId, address: String) {
        self.addresses.insert(peer, address);
    }

    /// Closes the connections to everybody else.
    pub(crate) fn keep(&mut self, members: &BTreeSet<NodeId>) {
        self.open.retain(|peer, _| members.contains(peer));
    }

    /// Hands a message over; false where it is lost at once.
    pub(crate) fn send(&mut self, to: NodeId, message: pb::RaftMessage) -> bool {
        let Some(address) = self.addresses.get(&to) else { return false };
        if self.open.get(&to).is_none_or(|peer| peer.address != *address) {
            let peer = self.connect(to, address.clone());
            self.open.insert(to, peer);
        }
        self.open.get(&to).is_some_and(|peer| peer.queue.try_send(message).is_ok())
    }

    fn connect(&self, to: NodeId, address: String) -> Peer {
        let (queue, messages) = mpsc::channel(QUEUE);
        let line = Line {
            to,
            address: address.clone(),
            own: self.own.clone(),
            tls: self.tls.clone(),
            events: self.events.clone(),
        };
        let task = self.runtime.spawn(line.run(messages)).abort_handle();
        Peer { address, queue, task }
    }
}

/// One peer's connection, as its task sees it.
struct Line {
    to: NodeId,
    address: String,
    own: String,
    tls: Tls,
    events: mpsc::Sender<Event>,
}

impl Line {
    async fn run(self, mut queue: mpsc::Receiver<pb::RaftMessage>) {
        let mut told = false;
        while let Some(first) = queue.recv().await {
            let status = self.carry(first, &mut queue).await;
            if transport::removed(&status) {
                // It has not heard so from the log, for it was off when it happened.
                self.tell(Event::Removed).await;
            }
            let reason = transport::reason(&status);
            if !told {
                tracing::info!(peer = self.to.0, reason, "no connection to a coordinator");
                told = true;
            }
            self.tell(Event::Unreachable { peer: self.to }).await;
            // What has waited is stale by now; Raft repeats what matters.
            while let Ok(lost) = queue.try_recv() {
                self.lost(&lost).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Carries messages until the connection ends; the status says why it did.
    async fn carry(
        &self,
        first: pb::RaftMessage,
        queue: &mut mpsc::Receiver<pb::RaftMessage>,
    ) -> Status {
        let Ok(endpoint) = transport::endpoint(&self.address) else {
            return Status::unavailable("its address is not one");
        };
        let endpoint = endpoint
            .http2_keep_alive_interval(PROBE)
            .keep_alive_timeout(PROBE)
            .connect_timeout(PROBE);
        let channel = transport::connect_lazy(&endpoint, Expect::Node(self.to.0), &self.tls);
        let mut client = transport::coordinator_client(channel);
        let (outgoing, stream) = mpsc::channel(AHEAD);
        let call = client.messages(ReceiverStream::new(stream));
        let forward = async {
            let hello = pb::RaftEnvelope { address: self.own.clone(), message: None };
            let mut next = Some(first);
            if outgoing.send(hello).await.is_err() {
                return;
            }
            while let Some(message) = next {
                let snapshot = carries_snapshot(&message);
                let envelope = pb::RaftEnvelope { address: String::new(), message: Some(message) };
                let sent = outgoing.send(envelope).await.is_ok();
                if snapshot {
                    self.tell(Event::SnapshotSent { peer: self.to, ok: sent }).await;
                }
                if !sent {
                    return;
                }
                next = queue.recv().await;
            }
        };
        tokio::select! {
            answer = call => match answer {
                Ok(_) => Status::unavailable("the peer closed the stream"),
                Err(status) => status,
            },
            () = forward => Status::unavailable("the connection closed"),
        }
    }

    async fn lost(&self, message: &pb::RaftMessage) {
        if carries_snapshot(message) {
            self.tell(Event::SnapshotSent { peer: self.to, ok: false }).await;
        }
    }

    async fn tell(&self, event: Event) {
        // Without a driver there is nobody who would need to know.
        let _ = self.events.send(event).await;
    }
}
