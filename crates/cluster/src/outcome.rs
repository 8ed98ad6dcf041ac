//! What became of clients' writes, remembered so that one that is tried again is applied once.

use std::collections::{BTreeMap, VecDeque};

use planner::NodeId;

use crate::{Code, Event, Rejected, RequestId};

/// Outcomes that are remembered.
pub(crate) const OUTCOMES_KEPT: usize = 4096;
/// Most bytes of a remembered refusal; longer ones are cut.
const MESSAGE_MAX: usize = 512;

/// What a client is told of its write.
pub type Outcome = Result<Done, Refusal>;

/// A write that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Its position in the log: a view at this index or after shows it.
    pub index: u64,
    /// The number that a node got by it.
    pub node: Option<NodeId>,
}

/// A write that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Its kind, for programs.
    pub code: Code,
    /// Why, for people.
    pub message: String,
}

impl From<&Rejected> for Refusal {
    fn from(why: &Rejected) -> Self {
        if let Rejected::Repeated(refusal) = why {
            return refusal.clone();
        }
        let mut message = why.to_string();
        message.truncate(message.floor_char_boundary(MESSAGE_MAX));
        Self { code: why.code(), message }
    }
}

/// The latest outcomes by request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Outcomes {
    by_request: BTreeMap<RequestId, Outcome>,
    /// The oldest first.
    order: VecDeque<RequestId>,
}

impl Outcomes {
    pub(crate) fn get(&self, request: &RequestId) -> Option<&Outcome> {
        self.by_request.get(request)
    }

    /// All of them, the oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RequestId, &Outcome)> {
        self.order.iter().filter_map(|id| Some((*id, self.by_request.get(id)?)))
    }

    /// The request must be new.
    pub(crate) fn remember(&mut self, request: RequestId, outcome: Outcome) {
        self.by_request.insert(request, outcome);
        self.order.push_back(request);
        while self.order.len() > OUTCOMES_KEPT {
            if let Some(oldest) = self.order.pop_front() {
                self.by_request.remove(&oldest);
            }
        }
    }

    /// Whether both halves are as long as each other and not too long: cheap enough to be asked
    /// after every command.
    pub(crate) fn sound(&self) -> bool {
        self.order.len() == self.by_request.len() && self.order.len() <= OUTCOMES_KEPT
    }

    /// Whether no text is longer than one that [`ClusterState::apply`] makes: for outcomes that
    /// come from elsewhere.
    ///
    /// [`ClusterState::apply`]: crate::ClusterState::apply
    pub(crate) fn bounded(&self) -> bool {
        let bounded = |outcome: &Outcome| {
            outcome.as_ref().err().is_none_or(|refusal| refusal.message.len() <= MESSAGE_MAX)
        };
        self.by_request.values().all(bounded)
    }
}

/// What a client is told of a command that was applied at `index`.
pub(crate) fn outcome(index: u64, result: &Result<Vec<Event>, Rejected>) -> Outcome {
    match result {
        Ok(events) => {
            let node = events.iter().find_map(|event| match event {
                Event::NodeEnrolled { node } => Some(*node),
                _ => None,
            });
            Ok(Done { index, node })
        }
        Err(why) => Err(Refusal::from(why)),
    }
}
