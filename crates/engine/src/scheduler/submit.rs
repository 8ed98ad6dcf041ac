//! The gate: a request that passes here can run to its end whatever else is submitted.

use super::Scheduler;
use super::sequence::{Sequence, positions_max};
use crate::{EngineConfig, Rejected, Request, Resume, Sampling, SeqId};

/// Most alternatives that logprobs may be asked for.
const LOGPROBS_MAX: u8 = 20;
/// Frequency and presence penalties lie within plus and minus this, as in the API they come from.
const PENALTY_MAX: f32 = 2.0;

impl Scheduler {
    /// Takes a request into the queue, or says why not; a refused request changes nothing.
    ///
    /// Prompt and `max_tokens` together must fit the context, so an answer ends at `max_tokens`
    /// and never at the context's end unannounced. Stop ids outside the vocabulary are harmless
    /// and allowed.
    pub fn submit(&mut self, request: Request) -> Result<SeqId, Rejected> {
        self.resume(request, Resume::default())
    }

    /// The same for a sequence that had begun elsewhere: its answer continues after `so_far`, with
    /// the tokens that it would have had. What was delivered is not delivered again, so the next
    /// token's index is the number of those. An answer that was whole is refused.
    pub fn resume(&mut self, request: Request, so_far: Resume) -> Result<SeqId, Rejected> {
        check_lengths(&request, &self.config)?;
        check_ids(&request, &so_far, self.config.vocab)?;
        check_sampling(&request)?;
        check_resume(&request, &so_far)?;
        if self.waiting.len() >= self.config.waiting_max {
            return Err(Rejected::QueueFull { waiting: self.waiting.len() });
        }
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, Sequence::new(request, so_far));
        self.waiting.insert(seq);
        Ok(seq)
    }
}

fn check_lengths(request: &Request, config: &EngineConfig) -> Result<(), Rejected> {
    let prompt = request.prompt.len();
    let max_tokens = request.stop.max_tokens;
    if prompt == 0 {
        return Err(Rejected::EmptyPrompt);
    }
    if prompt.checked_add(max_tokens).is_none_or(|all| all > config.context) {
        return Err(Rejected::TooLong { prompt, max_tokens, context: config.context });
    }
    let needed = config.blocks_for(positions_max(request));
    if needed > config.blocks {
        return Err(Rejected::TooFewBlocks { needed, total: config.blocks });
    }
    Ok(())
}

fn check_ids(request: &Request, so_far: &Resume, vocab: usize) -> Result<(), Rejected> {
    let biased = request.sampling.logit_bias.iter().map(|(id, _)| id);
    let known = request.prompt.iter().chain(&so_far.generated);
    match known.chain(biased).find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(Rejected::UnknownToken { id, vocab }),
        None => Ok(()),
    }
}

fn check_resume(request: &Request, so_far: &Resume) -> Result<(), Rejected> {
    let whole = request.stop.reached(&so_far.generated).is_some();
    if whole || so_far.generated.len() > request.stop.max_tokens {
        return Err(Rejected::BadResume { field: "generated" });
    }
    let scored = so_far.scored;
    if scored >= request.prompt.len() || (scored > 0 && request.prompt_logprobs.is_none()) {
        return Err(Rejected::BadResume { field: "scored" });
    }
    Ok(())
}

fn check_sampling(request: &Request) -> Result<(), Rejected> {
    let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = request.sampling;
    let sampling = &request.sampling;
    let penalty = |value: f32| (-PENALTY_MAX..=PENALTY_MAX).contains(&value);
    let bias = &sampling.logit_bias;
    let ascending = bias.windows(2).all(|pair| pair[0].0 < pair[1].0);
    let few = |top: Option<u8>| top.is_none_or(|top| top <= LOGPROBS_MAX);
    // Comparisons with NaN are false, so each of these refuses it.
    let rules = [
        ("temperature", temperature >= 0.0 && temperature.is_finite()),
        ("top_p", top_p > 0.0 && top_p <= 1.0),
        ("min_p", (0.0..=1.0).contains(&min_p)),
        ("repetition_penalty", repetition_penalty > 0.0 && repetition_penalty.is_finite()),
        ("frequency_penalty", penalty(sampling.frequency_penalty)),
        ("presence_penalty", penalty(sampling.presence_penalty)),
        ("logit_bias", ascending && bias.iter().all(|(_, value)| value.is_finite())),
        ("logprobs", few(request.logprobs)),
        ("prompt_logprobs", few(request.prompt_logprobs)),
        ("min_tokens", request.stop.min_tokens <= request.stop.max_tokens),
    ];
    match rules.iter().find(|(_, kept)| !kept) {
        Some(&(field, _)) => Err(Rejected::BadSampling { field }),
        None => Ok(()),
    }
}
