//! Identities: a join token becomes a node's certificate, a certificate becomes a fresh one.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cluster::{Command, Proposal, RequestId, TokenId};
use identity::{ClusterCa, NODE_LIFE, Peer, Role};
use planner::NodeId;
use tonic::Status;
use wire::pb;

use crate::client::Control;
use crate::service::not_written;

/// How long an enrolment may take to be decided.
const PATIENCE: Duration = Duration::from_secs(5);
/// No token lives longer than this: what is remembered of it may be forgotten then.
const TOKEN_LIFE_MAX: Duration = Duration::from_secs(400 * 24 * 60 * 60);

/// Signs certificates with the cluster's key.
#[derive(Debug, Clone)]
pub(crate) struct Authority {
    ca: Arc<ClusterCa>,
}

impl Authority {
    pub(crate) fn new(ca: Arc<ClusterCa>) -> Self {
        Self { ca }
    }

    /// Gives the holder of a token its number, and the certificate that says so.
    pub(crate) async fn enrol(
        &self,
        control: &Control,
        peer: &Peer,
        request: pb::EnrolRequest,
    ) -> Result<pb::EnrolReply, Status> {
        let Peer::Token { id, role, uses } = peer else {
            return Err(Status::permission_denied("only the holder of a join token can enrol"));
        };
        let bytes: [u8; 16] = request
            .request_id
            .as_ref()
            .try_into()
            .map_err(|_| Status::invalid_argument("request_id must have 16 bytes"))?;
        // It would be refused, and the refusal remembered.
        if control.view().borrow().nodes().is_empty() {
            return Err(Status::unavailable("the cluster has no node yet; try again"));
        }
        let now = seconds(SystemTime::now());
        let command = Command::Enrol {
            token: TokenId(id.0),
            uses_max: *uses,
            expires: now + TOKEN_LIFE_MAX.as_secs(),
            now,
            role: match role {
                Role::Worker => cluster::Role::Worker,
                Role::Coordinator => cluster::Role::Coordinator,
            },
            name: request.name,
        };
        let proposal = Proposal { request: Some(RequestId(bytes)), command };
        let outcome = control.write(proposal, PATIENCE).await.map_err(|why| not_written(&why))?;
        let done = outcome.map_err(|refusal| Status::failed_precondition(refusal.message))?;
        let node = done.node.ok_or_else(|| Status::already_exists("that request was another's"))?;
        tracing::info!(node = node.0, %role, token = %id, "a node has enrolled");
        let certificate = self.sign(&request.certificate_request, node, *role)?;
        let view = control.view();
        let coordinators = view.borrow();
        let coordinators = coordinators.coordinators();
        Ok(pb::EnrolReply {
            node: node.0,
            certificate,
            roots: self.roots(),
            authority_key: match role {
                Role::Coordinator => bytes::Bytes::copy_from_slice(self.ca.key_der()),
                Role::Worker => bytes::Bytes::new(),
            },
            coordinators: coordinators.map(|(_, at)| at.cluster_address.clone()).collect(),
        })
    }

    /// A fresh certificate for a node that has one and was not removed.
    pub(crate) fn renew(
        &self,
        control: &Control,
        peer: &Peer,
        request: &pb::RenewRequest,
    ) -> Result<pb::RenewReply, Status> {
        let Peer::Node { id, role } = *peer else {
            return Err(Status::permission_denied("only nodes renew their certificates"));
        };
        let view = control.view();
        let state = view.borrow();
        if state.removed(NodeId(id)) {
            return Err(Status::permission_denied("this node was removed from the cluster"));
        }
        let certificate = self.sign(&request.certificate_request, NodeId(id), role)?;
        tracing::info!(node = id, generation = state.generation(), "a certificate is renewed");
        Ok(pb::RenewReply { certificate, roots: self.roots(), generation: state.generation() })
    }

    fn sign(&self, request: &[u8], node: NodeId, role: Role) -> Result<bytes::Bytes, Status> {
        let issued = self.ca.issue_node(request, node.0, role, NODE_LIFE, SystemTime::now());
        let certificate = issued.map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(bytes::Bytes::copy_from_slice(&certificate))
    }

    fn roots(&self) -> Vec<bytes::Bytes> {
        vec![bytes::Bytes::copy_from_slice(self.ca.certificate())]
    }
}

/// Whole seconds since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
