//! What shall be served: models by digest, and the wishes that one be served.

use std::collections::BTreeSet;
use std::sync::Arc;

use model::{ComputeType, ModelSpec};
use planner::{ExpertCut, NodeId, stripes};

use crate::BadField;
use crate::fields::{bad, hexadecimal, text};

/// Most groups of one deployment.
pub(crate) const REPLICAS_MAX: usize = 64;
/// Most nodes that a deployment may name.
const ALLOWED_MAX: usize = 1024;
/// Most of anything that is counted in a deployment.
const SIZE_MAX: usize = u32::MAX as usize;

/// A model that deployments may name.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// A name for people; need not be unique.
    pub name: String,
    /// blake3 of the model directory, in lower-case hexadecimal digits: what it is known by.
    pub digest: String,
    /// What the model is.
    pub spec: Arc<ModelSpec>,
}

impl Model {
    /// Refuses what no planner could use.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), BadField> {
        text("name", &self.name)?;
        hexadecimal("digest", &self.digest)?;
        self.spec.check().map_err(|_| bad("spec", "describes no model that can be served"))?;
        if self.spec.to_json().len() > ModelSpec::JSON_MAX {
            return Err(bad("spec", "is too long"));
        }
        Ok(())
    }
}

/// What a name means that clients use beside those of deployments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    /// The deployment that it means.
    pub deployment: String,
    /// The one that it meant before, as long as that is deployed: a swap that was interrupted
    /// knows by it what is left to be drained.
    pub before: Option<String>,
}

/// The wish that a model be served, with its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployment {
    /// The name under which requests ask for it: what it is known by.
    pub name: String,
    /// Digest of the model, which must be registered.
    pub digest: String,
    /// What the weights are kept in; with the stripes, the numerics of the deployment.
    pub compute: ComputeType,
    /// How the experts of a layer are divided among stripes; part of the numerics too.
    pub experts: ExpertCut,
    /// Stripes the model is cut into; `None` is the model's default.
    pub stripes: Option<usize>,
    /// Ranks of a group; at least one, at most the number of stripes.
    pub ranks: usize,
    /// Groups that shall serve.
    pub replicas: usize,
    /// Nodes that may hold a rank; every node where it is empty.
    pub nodes: BTreeSet<NodeId>,
    /// KV blocks that every rank keeps.
    pub kv_blocks: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// Most sequences that run at once.
    pub max_sequences: usize,
    /// Most tokens of one step.
    pub step_tokens: usize,
    /// Longest prompt plus answer, in tokens.
    pub context: usize,
}

impl Deployment {
    /// The number of stripes that a plan for this deployment has.
    pub fn stripe_count(&self, spec: &ModelSpec) -> usize {
        self.stripes.unwrap_or_else(|| stripes::default_count(spec))
    }

    /// Whether a rank may stand on this node, as far as the wish goes.
    pub fn allows(&self, node: NodeId) -> bool {
        self.nodes.is_empty() || self.nodes.contains(&node)
    }

    /// Refuses what no group could ever serve. `spec` is the model's.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), BadField> {
        // Requests ask by this name.
        text("model", &self.name)?;
        hexadecimal("digest", &self.digest)?;
        if self.stripes.is_some_and(|count| stripes::validate(spec, count).is_err()) {
            return Err(bad("stripes", "is not a number of stripes this model can be cut into"));
        }
        if self.ranks == 0 || self.ranks > self.stripe_count(spec) {
            return Err(bad("ranks", "must be at least one and at most the number of stripes"));
        }
        if self.replicas == 0 || self.replicas > REPLICAS_MAX {
            return Err(bad("replicas", "must be 1 to 64"));
        }
        if self.nodes.len() > ALLOWED_MAX {
            return Err(bad("nodes", "must name at most 1024 nodes"));
        }
        let sizes = [
            ("kv_blocks", self.kv_blocks),
            ("block_tokens", self.block_tokens),
            ("max_sequences", self.max_sequences),
            ("step_tokens", self.step_tokens),
            ("context", self.context),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return Err(bad(field, "must be at least one"));
            }
            if size > SIZE_MAX {
                return Err(bad(field, "is out of range"));
            }
        }
        if self.step_tokens < self.max_sequences {
            // Every running sequence takes part in every step.
            return Err(bad("step_tokens", "is less than max_sequences"));
        }
        Ok(())
    }

    /// Whether the other wish differs in nothing that a running group depends on.
    pub(crate) fn same_but_for_scale(&self, other: &Self) -> bool {
        let scaled = Self { replicas: self.replicas, nodes: self.nodes.clone(), ..other.clone() };
        *self == scaled
    }
}
