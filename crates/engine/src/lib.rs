//! Continuous batching over paged KV: a deterministic machine that stands alone.
//!
//! ```text
//! submit(request) ┐
//! cancel(seq)     ├─> schedule() -> Step ──(an executor runs it)──> commit(StepOutput) -> Events
//! ```
//! The scheduler knows no model, no cluster, no clock: KV blocks, token budgets and sequences only.
//! The same calls give the same steps, on any machine.
//!
//! # The loop
//!
//! ```
//! use engine::*;
//!
//! // An executor would run the model; this one "samples" one more than the last token.
//! fn execute(scheduler: &Scheduler, step: &Step) -> StepOutput {
//!     let outputs = step.entries.iter().map(|entry| SequenceOutput {
//!         seq: entry.seq,
//!         sampled: scheduler.samples(entry).then(|| Sampled {
//!             token: entry.tokens[entry.tokens.len() - 1] + 1,
//!             logprobs: None,
//!         }),
//!         prompt_logprobs: Vec::new(),
//!     });
//!     StepOutput { number: step.number, outputs: outputs.collect() }
//! }
//!
//! let mut scheduler = Scheduler::new(EngineConfig {
//!     block_tokens: 16, blocks: 64, context: 512, vocab: 1000,
//!     max_sequences: 8, step_tokens: 64, chunk_tokens: 32, waiting_max: 100,
//! })?;
//! let seq = scheduler.submit(Request {
//!     prompt: vec![7, 8, 9],
//!     sampling: Sampling::greedy(),
//!     stop: StopRules { max_tokens: 100, min_tokens: 0, stop_ids: vec![12] },
//!     logprobs: None,
//!     prompt_logprobs: None,
//! })?;
//!
//! let mut answer = Vec::new();
//! while let Some(step) = scheduler.schedule() {
//!     let output = execute(&scheduler, &step);
//!     for event in scheduler.commit(output)? {
//!         match event {
//!             Event::Token { sampled, .. } => answer.push(sampled.token),
//!             Event::PromptLogprobs { .. } => {}
//!             Event::Finished { seq: finished, reason, generated } => {
//!                 assert_eq!((finished, generated), (seq, 3));
//!                 assert_eq!(reason, FinishReason::Stop { id: 12 });
//!             }
//!         }
//!     }
//! }
//! assert_eq!(answer, [10, 11, 12]);
//! assert!(scheduler.is_idle());
//! scheduler.check_integrity()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A step that fails is given up with [`Scheduler::abandon`]; its sequences are computed again.

#![forbid(unsafe_code)]

mod block_pool;
mod config;
mod request;
mod scheduler;
mod step;

pub use block_pool::{BlockId, BlockPool, PoolError};
pub use config::{ConfigError, EngineConfig};
pub use request::{Rejected, Request, Resume, Sampling, SeqId, StopRules};
pub use scheduler::{CommitError, Counts, Event, FinishReason, IntegrityError, Scheduler};
pub use step::{Sampled, SequenceOutput, Step, StepEntry, StepOutput, TokenLogprobs, Want};
