//! Continuous batching over paged KV: a deterministic machine that stands alone.
//!
//! ```text
//! submit(request) ┐
//! cancel(seq)     ├─> schedule() -> Step ──(an Executor runs it)──> commit(StepOutput) -> Events
//! ```
//! The scheduler knows no model, no cluster, no clock: KV blocks, token budgets and sequences only.

mod block_pool;
mod request;
mod scheduler;
mod step;

pub use block_pool::{BlockId, BlockPool};
pub use request::{Rejected, Request, Sampling, SeqId, StopRules};
pub use scheduler::{Counts, EngineConfig, Event, FinishReason, IntegrityError, Scheduler};
pub use step::{Sampled, SequenceOutput, Step, StepEntry, StepOutput, TokenLogprobs, Want};
