//! Commands about nodes: let in, come, late, lost, drained, removed.

use planner::NodeId;

use super::{NODES_MAX, TOKENS_MAX};
use crate::fields::{bad, text};
use crate::{
    ClusterState, Coordinator, Event, GroupId, Node, NodeInfo, Rejected, Role, Standing, Token,
    TokenId,
};

/// Seconds by which the clocks of coordinators may differ: a token is remembered so much longer.
const SKEW: u64 = 3600;

/// A join token as its bearer shows it.
pub(super) struct Ticket {
    pub(super) token: TokenId,
    pub(super) uses_max: u32,
    pub(super) expires: u64,
    pub(super) role: Role,
}

impl ClusterState {
    pub(super) fn found(&mut self, name: String) -> Result<Vec<Event>, Rejected> {
        if self.last_node != 0 {
            return Err(Rejected::Founded);
        }
        text("name", &name).map_err(Rejected::BadName)?;
        Ok(vec![self.add_node(Role::Coordinator, name, None)])
    }

    pub(super) fn enrol(
        &mut self,
        ticket: &Ticket,
        now: u64,
        name: String,
    ) -> Result<Vec<Event>, Rejected> {
        text("name", &name).map_err(Rejected::BadName)?;
        let Ticket { token, uses_max, expires, role } = *ticket;
        if uses_max == 0 {
            return Err(Rejected::BadToken(bad("uses_max", "must be at least one")));
        }
        if expires < now {
            return Err(Rejected::BadToken(bad("expires", "is over")));
        }
        let usable = |token: &Token| token.expires.saturating_add(SKEW) >= now;
        let uses = match self.tokens.get(&token) {
            Some(known) if known.role != role || known.uses_max != uses_max => {
                return Err(Rejected::TokenChanged { token });
            }
            Some(Token { uses, .. }) if *uses >= uses_max => {
                return Err(Rejected::TokenSpent { token, uses: *uses });
            }
            Some(known) => known.uses,
            None if self.tokens.values().filter(|token| usable(token)).count() >= TOKENS_MAX => {
                return Err(Rejected::Full { what: "tokens in use", limit: TOKENS_MAX });
            }
            None => 0,
        };
        let standing = self.nodes.values().filter(|node| node.standing != Standing::Left).count();
        if standing >= NODES_MAX {
            return Err(Rejected::Full { what: "nodes", limit: NODES_MAX });
        }
        self.tokens.retain(|_, token| usable(token));
        // The latest of what the proposers said: a token is never forgotten too early.
        let expires = self.tokens.get(&token).map_or(expires, |known| known.expires.max(expires));
        self.tokens.insert(token, Token { role, uses: uses + 1, uses_max, expires });
        Ok(vec![self.add_node(role, name, Some(token))])
    }

    fn add_node(&mut self, role: Role, name: String, token: Option<TokenId>) -> Event {
        self.last_node += 1;
        let node = NodeId(self.last_node);
        let entry = Node {
            role,
            name,
            token,
            standing: Standing::Enrolled,
            draining: false,
            incarnation: 0,
            info: None,
            coordinator: None,
        };
        self.nodes.insert(node, entry);
        Event::NodeEnrolled { node }
    }

    /// The node, unless it was removed.
    fn member(&self, node: NodeId) -> Result<&Node, Rejected> {
        if self.removed(node) {
            return Err(Rejected::NodeGone { node });
        }
        self.nodes.get(&node).ok_or(Rejected::UnknownNode { node })
    }

    /// The node, if that process of it holds a lease.
    fn present(&self, node: NodeId, incarnation: u64) -> Result<&Node, Rejected> {
        let entry = self.member(node)?;
        if entry.incarnation != incarnation {
            let (expected, got) = (entry.incarnation, incarnation);
            return Err(Rejected::WrongIncarnation { node, expected, got });
        }
        if !entry.standing.present() {
            return Err(Rejected::WrongStanding { node, standing: entry.word() });
        }
        Ok(entry)
    }

    fn stand(&mut self, node: NodeId, standing: Standing) {
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.standing = standing;
        }
    }

    pub(super) fn join(&mut self, node: NodeId, info: NodeInfo) -> Result<Vec<Event>, Rejected> {
        let entry = self.member(node)?;
        info.check().map_err(Rejected::BadNode)?;
        let incarnation = entry.incarnation;
        if entry.standing.present() && entry.info.as_ref() == Some(&info) {
            self.stand(node, Standing::Ready);
            return Ok(vec![Event::NodeResumed { node, incarnation }]);
        }
        // A worker with wrong directories shall hear of it; one that comes first cannot be wrong,
        // and one right directory is enough: others may become known later.
        let known = info.model_digests.iter().any(|digest| self.models.contains_key(digest));
        if !self.models.is_empty() && !known {
            let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
            let (expected, got) = (known.join(", "), info.models_line());
            return Err(Rejected::WrongDigest { expected, got });
        }
        // Two nodes behind one address would each be sent the other's steps and frames.
        let others =
            self.nodes.iter().filter(|(id, other)| **id != node && other.standing.present());
        for (&holder, other) in others {
            if let Some(address) = other.info.as_ref().and_then(|one| info.shared_address(one)) {
                return Err(Rejected::AddressTaken { node: holder, address: address.clone() });
            }
        }
        let mut events = self.fence_all_on(node, "was started again");
        let incarnation = incarnation + 1;
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.standing = Standing::Ready;
            entry.incarnation = incarnation;
            entry.info = Some(info);
        }
        events.push(Event::NodeJoined { node, incarnation });
        Ok(events)
    }

    pub(super) fn suspect(
        &mut self,
        node: NodeId,
        incarnation: u64,
    ) -> Result<Vec<Event>, Rejected> {
        if self.present(node, incarnation)?.standing == Standing::Suspect {
            return Ok(Vec::new());
        }
        self.stand(node, Standing::Suspect);
        Ok(vec![Event::NodeSuspect { node }])
    }

    pub(super) fn recover(
        &mut self,
        node: NodeId,
        incarnation: u64,
    ) -> Result<Vec<Event>, Rejected> {
        if self.present(node, incarnation)?.standing == Standing::Ready {
            return Ok(Vec::new());
        }
        self.stand(node, Standing::Ready);
        Ok(vec![Event::NodeResumed { node, incarnation }])
    }

    /// A lost node takes its groups' incarnations with it in the same change: no state in between
    /// shows a serving group that cannot serve.
    pub(super) fn lose(&mut self, node: NodeId, incarnation: u64) -> Result<Vec<Event>, Rejected> {
        self.present(node, incarnation)?;
        let fenced = self.fence_all_on(node, "was lost");
        self.stand(node, Standing::Lost);
        Ok(std::iter::once(Event::NodeLost { node }).chain(fenced).collect())
    }

    pub(super) fn drain(&mut self, node: NodeId, draining: bool) -> Result<Vec<Event>, Rejected> {
        let entry = self.member(node)?;
        if entry.role != Role::Worker {
            return Err(Rejected::WrongRole { node, role: entry.role });
        }
        if entry.draining == draining {
            return Ok(Vec::new());
        }
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.draining = draining;
        }
        Ok(vec![Event::NodeDraining { node, draining }])
    }

    pub(super) fn leave(&mut self, node: NodeId) -> Result<Vec<Event>, Rejected> {
        let coordinator =
            |node: &Node| node.role == Role::Coordinator && node.standing != Standing::Left;
        let last = self.nodes.values().filter(|node| coordinator(node)).count() == 1;
        if coordinator(self.member(node)?) && last {
            return Err(Rejected::LastCoordinator { node });
        }
        let fenced = self.fence_all_on(node, "was removed");
        self.stand(node, Standing::Left);
        Ok(std::iter::once(Event::NodeLeft { node }).chain(fenced).collect())
    }

    pub(super) fn set_coordinator(
        &mut self,
        node: NodeId,
        at: Coordinator,
    ) -> Result<Vec<Event>, Rejected> {
        let entry = self.member(node)?;
        if entry.role != Role::Coordinator {
            return Err(Rejected::WrongRole { node, role: entry.role });
        }
        at.check().map_err(Rejected::BadNode)?;
        if entry.coordinator.as_ref() == Some(&at) {
            return Ok(Vec::new());
        }
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.coordinator = Some(at);
        }
        Ok(vec![Event::CoordinatorSet { node }])
    }

    /// Ends every incarnation that has a rank on the node; `what` became of it.
    fn fence_all_on(&mut self, node: NodeId, what: &str) -> Vec<Event> {
        let name = self
            .nodes
            .get(&node)
            .map_or("", |entry| entry.info.as_ref().map_or(&entry.name, |info| &info.name));
        let reason = format!("node {} ({name}) {what}", node.0);
        let hit: Vec<GroupId> = self.groups_on(node).map(|(id, _)| id).collect();
        hit.into_iter().map(|group| self.fence(group, reason.clone())).collect()
    }
}
