//! Taking a step's output back: checked whole first, then applied.

use super::{InFlight, Planned, Scheduler};
use crate::{Sampled, SeqId, SequenceOutput, StepOutput, TokenLogprobs, Want};

/// What happened to a sequence, in the order in which its caller has to hear it.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was sampled. The token that ends an answer comes as an event too.
    Token {
        /// The sequence.
        seq: SeqId,
        /// Its index in the answer, from 0.
        index: usize,
        /// The token, with logprobs where asked for.
        sampled: Sampled,
    },
    /// Logprobs of prompt tokens 1, 2, ... in order; several events continue one another.
    PromptLogprobs {
        /// The sequence.
        seq: SeqId,
        /// The next prompt tokens' logprobs; never empty.
        tokens: Vec<TokenLogprobs>,
    },
    /// The sequence ended and its blocks are free. Always a sequence's last event.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why.
        reason: FinishReason,
        /// Tokens generated, the one that ended the answer included.
        generated: usize,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the request's stop ids was sampled.
    Stop {
        /// Which.
        id: u32,
    },
    /// `max_tokens` is reached.
    Length,
}

/// Why an output does not belong to the step in flight. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// No step is in flight.
    #[error("output of step {got} came and no step is in flight")]
    NothingInFlight {
        /// The output's step number.
        got: u64,
    },
    /// The output is another step's.
    #[error("output of step {got} came and step {expected} is in flight")]
    WrongStep {
        /// The step in flight.
        expected: u64,
        /// The output's step number.
        got: u64,
    },
    /// Another number of outputs than entries.
    #[error("{got} outputs came for {expected} entries")]
    WrongCount {
        /// Entries of the step.
        expected: usize,
        /// Outputs that came.
        got: usize,
    },
    /// An output stands at another sequence's place.
    #[error("output {index} is for sequence {} and the entry for {}", .got.0, .expected.0)]
    WrongSequence {
        /// The place.
        index: usize,
        /// The entry's sequence.
        expected: SeqId,
        /// The output's.
        got: SeqId,
    },
    /// A token was due and none came.
    #[error("sequence {} was to sample a token and none came", .0.0)]
    NoToken(SeqId),
    /// A token came where none is sampled.
    #[error("sequence {} was not to sample a token and one came", .0.0)]
    SurplusToken(SeqId),
    /// The sampled token lies outside the vocabulary.
    #[error("sequence {} sampled id {id}, outside the vocabulary of {vocab}", .seq.0)]
    UnknownToken {
        /// The sequence.
        seq: SeqId,
        /// The token.
        id: u32,
        /// The vocabulary's size.
        vocab: usize,
    },
    /// Logprobs of the sampled token are missing, unasked for, or another token's.
    #[error("logprobs of the token that sequence {} sampled are not as asked for", .0.0)]
    WrongLogprobs(SeqId),
    /// Not one logprob per prompt token due, or another token's.
    #[error("{got} prompt logprobs came for sequence {} where {expected} are due", .seq.0)]
    WrongPromptLogprobs {
        /// The sequence.
        seq: SeqId,
        /// Prompt tokens due.
        expected: usize,
        /// Logprobs that came.
        got: usize,
    },
}

impl Scheduler {
    /// Takes the output of the step in flight and returns what happened, in the step's order.
    ///
    /// The output must match the step exactly; else nothing changes and the step stays in flight
    /// (commit the right output, or [`Scheduler::abandon`] it). Outputs of sequences cancelled
    /// meanwhile are dropped unseen and without an event.
    pub fn commit(&mut self, output: StepOutput) -> Result<Vec<Event>, CommitError> {
        let got = output.number;
        let step = self.in_flight.take().ok_or(CommitError::NothingInFlight { got })?;
        if let Err(error) = self.check_output(&step, &output) {
            self.in_flight = Some(step);
            return Err(error);
        }
        self.steps += 1;
        let mut events = Vec::with_capacity(output.outputs.len());
        for (planned, output) in step.entries.iter().zip(output.outputs) {
            self.apply(planned, output, &mut events);
        }
        Ok(events)
    }

    fn check_output(&self, step: &InFlight, output: &StepOutput) -> Result<(), CommitError> {
        if output.number != step.number {
            return Err(CommitError::WrongStep { expected: step.number, got: output.number });
        }
        let (expected, got) = (step.entries.len(), output.outputs.len());
        if expected != got {
            return Err(CommitError::WrongCount { expected, got });
        }
        for (index, (planned, output)) in step.entries.iter().zip(&output.outputs).enumerate() {
            if planned.seq != output.seq {
                let (expected, got) = (planned.seq, output.seq);
                return Err(CommitError::WrongSequence { index, expected, got });
            }
            self.check_entry(planned, output)?;
        }
        Ok(())
    }

    fn check_entry(&self, planned: &Planned, output: &SequenceOutput) -> Result<(), CommitError> {
        let seq = planned.seq;
        // A caller may have seen the cancellation before or after it sampled: both are right.
        let Some(sequence) = self.live(seq) else { return Ok(()) };
        match (&output.sampled, sequence.samples_at(planned.end())) {
            (None, true) => return Err(CommitError::NoToken(seq)),
            (Some(_), false) => return Err(CommitError::SurplusToken(seq)),
            (Some(sampled), true) => {
                let (id, vocab) = (sampled.token, self.config.vocab);
                if id as usize >= vocab {
                    return Err(CommitError::UnknownToken { seq, id, vocab });
                }
                let named = sampled.logprobs.as_ref().map(|logprobs| logprobs.token);
                if named != sequence.request.logprobs.map(|_| id) {
                    return Err(CommitError::WrongLogprobs(seq));
                }
            }
            (None, false) => {}
        }
        let due: &[u32] = match planned.want {
            Want::All => {
                let range = sequence.scored_by(planned.start, planned.end());
                &sequence.request.prompt[range]
            }
            Want::Last | Want::Nothing => &[],
        };
        if !output.prompt_logprobs.iter().map(|scored| scored.token).eq(due.iter().copied()) {
            let (expected, got) = (due.len(), output.prompt_logprobs.len());
            return Err(CommitError::WrongPromptLogprobs { seq, expected, got });
        }
        Ok(())
    }

    fn apply(&mut self, planned: &Planned, output: SequenceOutput, events: &mut Vec<Event>) {
        let seq = planned.seq;
        let sequence = self.sequences.get_mut(&seq).expect("a sequence in flight stays live");
        if sequence.cancelled {
            self.remove(seq);
            return;
        }
        sequence.computed = planned.end();
        if planned.want == Want::All {
            // After a preemption the head of these may have been delivered before.
            let delivered = sequence.scored.saturating_sub(planned.start);
            let tokens: Vec<TokenLogprobs> =
                output.prompt_logprobs.into_iter().skip(delivered).collect();
            sequence.scored = planned.start.max(sequence.scored) + tokens.len();
            events.push(Event::PromptLogprobs { seq, tokens });
        }
        let rules = &sequence.request.stop;
        let mut reason = None;
        if let Some(sampled) = output.sampled {
            let index = sequence.generated.len();
            sequence.generated.push(sampled.token);
            reason = rules.reached(&sequence.generated);
            events.push(Event::Token { seq, index, sampled });
        }
        let generated = sequence.generated.len();
        // With `max_tokens` 0 the answer is full from the start: the prompt's end finishes it.
        if rules.max_tokens == 0 && sequence.computed >= sequence.request.prompt.len() {
            reason = Some(FinishReason::Length);
        }
        if let Some(reason) = reason {
            self.remove(seq);
            events.push(Event::Finished { seq, reason, generated });
        }
    }
}
