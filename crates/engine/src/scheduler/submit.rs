//! The gate: a request that passes here can run to its end whatever else is submitted.

use super::Scheduler;
use super::sequence::{Sequence, positions_max};
use crate::{EngineConfig, Rejected, Request, Sampling, SeqId};

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
        check_lengths(&request, &self.config)?;
        check_ids(&request, self.config.vocab)?;
        check_sampling(&request)?;
        if self.waiting.len() >= self.config.waiting_max {
            return Err(Rejected::QueueFull { waiting: self.waiting.len() });
        }
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, Sequence::new(request));
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

fn check_ids(request: &Request, vocab: usize) -> Result<(), Rejected> {
    let biased = request.sampling.logit_bias.iter().map(|(id, _)| id);
    match request.prompt.iter().chain(biased).find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(Rejected::UnknownToken { id, vocab }),
        None => Ok(()),
    }
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
