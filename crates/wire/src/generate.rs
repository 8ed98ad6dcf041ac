//! The request plane: a sequence to generate, and what comes of it.

use cluster::{Epoch, GroupId};
use engine::{
    Event, FinishReason, Request, Resume, Sampled, Sampling, SeqId, StopRules, TokenLogprobs,
};

use crate::error::{bounded, finite, required, size};
use crate::pb::{self, finished::Reason, generate_event};
use crate::{BIASES_MAX, REQUEST_ID_MAX, STOP_IDS_MAX, TOKENS_MAX, TOP_MAX, WireError};

/// A request for one sequence, addressed to one incarnation of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    /// The group.
    pub group: GroupId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// For logs on both sides; never interpreted. At most [`REQUEST_ID_MAX`] bytes.
    pub request_id: String,
    /// What to generate.
    pub request: Request,
    /// What was delivered of it before.
    pub so_far: Resume,
}

impl Generate {
    /// The message for this request.
    pub fn to_wire(&self) -> pb::GenerateRequest {
        let Request { prompt, sampling, stop, logprobs, prompt_logprobs } = &self.request;
        pb::GenerateRequest {
            group: self.group.0,
            epoch: self.epoch.0,
            request_id: self.request_id.clone(),
            prompt: prompt.clone(),
            sampling: Some(sampling_to_wire(sampling)),
            stop: Some(pb::StopRules {
                max_tokens: stop.max_tokens as u64,
                min_tokens: stop.min_tokens as u64,
                stop_ids: stop.stop_ids.clone(),
            }),
            logprobs: logprobs.map(u32::from),
            prompt_logprobs: prompt_logprobs.map(u32::from),
            generated: self.so_far.generated.clone(),
            scored: self.so_far.scored as u64,
        }
    }

    /// The request of this message. Whether the engine takes it is the engine's to say.
    ///
    /// # Errors
    /// [`WireError`] names the field that cannot be.
    pub fn from_wire(wire: pb::GenerateRequest) -> Result<Self, WireError> {
        bounded("request_id", wire.request_id.len(), REQUEST_ID_MAX)?;
        bounded("prompt", wire.prompt.len(), TOKENS_MAX)?;
        bounded("generated", wire.generated.len(), TOKENS_MAX)?;
        let stop = required("stop", wire.stop)?;
        bounded("stop_ids", stop.stop_ids.len(), STOP_IDS_MAX)?;
        let request = Request {
            prompt: wire.prompt,
            sampling: sampling_from_wire(required("sampling", wire.sampling)?)?,
            stop: StopRules {
                max_tokens: size("max_tokens", stop.max_tokens)?,
                min_tokens: size("min_tokens", stop.min_tokens)?,
                stop_ids: stop.stop_ids,
            },
            logprobs: top("logprobs", wire.logprobs)?,
            prompt_logprobs: top("prompt_logprobs", wire.prompt_logprobs)?,
        };
        let so_far = Resume { generated: wire.generated, scored: size("scored", wire.scored)? };
        let (group, epoch) = (GroupId(wire.group), Epoch(wire.epoch));
        Ok(Self { group, epoch, request_id: wire.request_id, request, so_far })
    }
}

/// How many alternatives are asked for.
fn top(field: &'static str, value: Option<u32>) -> Result<Option<u8>, WireError> {
    let Some(value) = value else { return Ok(None) };
    match u8::try_from(value) {
        Ok(value) if usize::from(value) <= TOP_MAX => Ok(Some(value)),
        _ => Err(WireError::OutOfRange { field }),
    }
}

fn sampling_to_wire(sampling: &Sampling) -> pb::Sampling {
    let biases = sampling.logit_bias.iter();
    pb::Sampling {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: biases.map(|&(token, bias)| pb::LogitBias { token, bias }).collect(),
        seed: sampling.seed,
        choice: sampling.choice,
    }
}

fn sampling_from_wire(wire: pb::Sampling) -> Result<Sampling, WireError> {
    bounded("logit_bias", wire.logit_bias.len(), BIASES_MAX)?;
    let biases = wire.logit_bias.into_iter();
    let biases = biases.map(|one| Ok((one.token, finite("logit_bias", one.bias)?)));
    Ok(Sampling {
        temperature: finite("temperature", wire.temperature)?,
        top_k: wire.top_k,
        top_p: finite("top_p", wire.top_p)?,
        min_p: finite("min_p", wire.min_p)?,
        repetition_penalty: finite("repetition_penalty", wire.repetition_penalty)?,
        frequency_penalty: finite("frequency_penalty", wire.frequency_penalty)?,
        presence_penalty: finite("presence_penalty", wire.presence_penalty)?,
        logit_bias: biases.collect::<Result<_, WireError>>()?,
        seed: wire.seed,
        choice: wire.choice,
    })
}

/// The message for an engine's event. The sequence's number stays behind: a stream carries one
/// sequence.
pub fn event_to_wire(group: GroupId, epoch: Epoch, event: &Event) -> pb::GenerateEvent {
    let event = match event {
        Event::Token { seq: _, index, sampled } => generate_event::Event::Token(pb::Token {
            token: sampled.token,
            index: *index as u64,
            logprobs: sampled.logprobs.as_ref().map(logprobs_to_wire),
        }),
        Event::PromptLogprobs { seq: _, tokens } => {
            let tokens = tokens.iter().map(logprobs_to_wire).collect();
            generate_event::Event::PromptLogprobs(pb::PromptLogprobs { tokens })
        }
        Event::Finished { seq: _, reason, generated } => {
            let (reason, stop_id) = match reason {
                FinishReason::Stop { id } => (Reason::Stop, Some(*id)),
                FinishReason::Length => (Reason::Length, None),
            };
            let generated = *generated as u64;
            let reason = reason.into();
            generate_event::Event::Finished(pb::Finished { reason, stop_id, generated })
        }
    };
    pb::GenerateEvent { group: group.0, epoch: epoch.0, event: Some(event) }
}

/// The event of this message, and whose it is. `seq` is what the receiver calls the sequence.
///
/// # Errors
/// [`WireError`] names the field that cannot be.
pub fn event_from_wire(
    seq: SeqId,
    wire: pb::GenerateEvent,
) -> Result<(GroupId, Epoch, Event), WireError> {
    let event = match required("event", wire.event)? {
        generate_event::Event::Token(token) => Event::Token {
            seq,
            index: size("index", token.index)?,
            sampled: Sampled {
                token: token.token,
                logprobs: token.logprobs.map(logprobs_from_wire).transpose()?,
            },
        },
        generate_event::Event::PromptLogprobs(piece) => {
            bounded("tokens", piece.tokens.len(), TOKENS_MAX)?;
            let tokens = piece.tokens.into_iter().map(logprobs_from_wire);
            Event::PromptLogprobs { seq, tokens: tokens.collect::<Result<_, _>>()? }
        }
        generate_event::Event::Finished(finished) => Event::Finished {
            seq,
            reason: reason_from_wire(&finished)?,
            generated: size("generated", finished.generated)?,
        },
    };
    Ok((GroupId(wire.group), Epoch(wire.epoch), event))
}

fn reason_from_wire(finished: &pb::Finished) -> Result<FinishReason, WireError> {
    let (field, value) = ("reason", finished.reason);
    match (Reason::try_from(value), finished.stop_id) {
        (Ok(Reason::Stop), Some(id)) => Ok(FinishReason::Stop { id }),
        (Ok(Reason::Stop), None) => Err(WireError::Missing { field: "stop_id" }),
        (Ok(Reason::Length), None) => Ok(FinishReason::Length),
        (Ok(Reason::Length), Some(_)) => {
            Err(WireError::Mismatch { field: "stop_id", other: "reason" })
        }
        (Ok(Reason::Unspecified) | Err(_), _) => Err(WireError::UnknownEnum { field, value }),
    }
}

fn logprobs_to_wire(logprobs: &TokenLogprobs) -> pb::TokenLogprobs {
    let (top_tokens, top_logprobs) = logprobs.top.iter().copied().unzip();
    let (token, logprob) = (logprobs.token, logprobs.logprob);
    pb::TokenLogprobs { token, logprob, top_tokens, top_logprobs }
}

/// A logarithm of a probability: minus infinity for what cannot be, never NaN or plus infinity.
fn logprob_from_wire(field: &'static str, value: f32) -> Result<f32, WireError> {
    if value.is_nan() || value == f32::INFINITY {
        return Err(WireError::NotFinite { field });
    }
    Ok(value)
}

fn logprobs_from_wire(wire: pb::TokenLogprobs) -> Result<TokenLogprobs, WireError> {
    bounded("top_tokens", wire.top_tokens.len(), TOP_MAX)?;
    if wire.top_tokens.len() != wire.top_logprobs.len() {
        return Err(WireError::Mismatch { field: "top_logprobs", other: "top_tokens" });
    }
    let pairs = wire.top_tokens.into_iter().zip(wire.top_logprobs);
    let top =
        pairs.map(|(token, logprob)| Ok((token, logprob_from_wire("top_logprobs", logprob)?)));
    Ok(TokenLogprobs {
        token: wire.token,
        logprob: logprob_from_wire("logprob", wire.logprob)?,
        top: top.collect::<Result<_, WireError>>()?,
    })
}
