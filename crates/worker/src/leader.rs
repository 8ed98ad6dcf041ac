//! The group leader: one thread that schedules steps, runs rank 0 and hands tokens out.

use std::collections::BTreeMap;
use std::sync::mpsc;

use decoder::{ForwardError, Logits, sample};
use engine::{
    Counts, Event, Rejected, Request, Resume, Sampled, Scheduler, SeqId, SequenceOutput, Step,
    StepOutput, TokenLogprobs, Want,
};
use tokio::sync::{mpsc as channel, oneshot};

use crate::rank::{Failure, Rank};

/// What the leader is asked to do.
pub(crate) enum Command {
    /// Generate a sequence; its events go to `events`.
    Submit {
        request: Box<Request>,
        /// What was delivered of it by another incarnation.
        so_far: Resume,
        events: channel::Sender<Result<Event, GroupGone>>,
        reply: oneshot::Sender<Result<SeqId, Rejected>>,
    },
    /// The caller is gone.
    Cancel(SeqId),
    /// Scheduler counts and whether block accounting is whole.
    Counts(oneshot::Sender<(Counts, Result<(), String>)>),
    /// A rank elsewhere failed: the group cannot go on.
    Failed {
        reason: String,
        /// Which rank.
        blames: Option<usize>,
    },
    /// The group is retired.
    Stop,
}

/// The group ended while sequences were running.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the group ended: {reason}")]
pub(crate) struct GroupGone {
    pub(crate) reason: String,
    /// The rank that is at fault, where it is another than the leader.
    pub(crate) blames: Option<usize>,
}

impl GroupGone {
    /// Nobody in particular is at fault.
    pub(crate) fn because(reason: impl ToString) -> Self {
        Self { reason: reason.to_string(), blames: None }
    }
}

impl From<GroupGone> for Failure {
    fn from(GroupGone { reason, blames }: GroupGone) -> Self {
        Self { reason, blames }
    }
}

/// Where the leader sends each step besides its own rank.
pub(crate) trait Followers: Send {
    /// Hands the step to every other rank without waiting for it to run.
    fn launch(&mut self, step: &Step) -> Result<(), GroupGone>;
}

/// The leader's state: a scheduler, rank 0, and where events go.
pub(crate) struct Leader {
    scheduler: Scheduler,
    rank: Rank,
    followers: Box<dyn Followers>,
    clients: BTreeMap<SeqId, channel::Sender<Result<Event, GroupGone>>>,
}

impl Leader {
    /// A leader with nothing to do yet.
    pub(crate) fn new(scheduler: Scheduler, rank: Rank, followers: Box<dyn Followers>) -> Self {
        Self { scheduler, rank, followers, clients: BTreeMap::new() }
    }

    /// Schedules and runs steps until stopped or failed. Every open sequence is told the reason.
    pub(crate) fn run(mut self, commands: &mpsc::Receiver<Command>) -> (GroupGone, Rank) {
        let gone = loop {
            if let Err(gone) = self.obey(commands) {
                break gone;
            }
            let Some(step) = self.scheduler.schedule() else { continue };
            if let Err(gone) = self.step(&step) {
                break gone;
            }
        };
        for events in self.clients.values() {
            // A client that left already needs no answer.
            let _ = events.try_send(Err(gone.clone()));
        }
        (gone, self.rank)
    }

    /// Takes all waiting commands; waits for one where there is nothing to run.
    fn obey(&mut self, commands: &mpsc::Receiver<Command>) -> Result<(), GroupGone> {
        let stopped = || GroupGone::because("the group was retired");
        let counts = self.scheduler.counts();
        if counts.waiting + counts.running == 0 {
            let command = commands.recv().map_err(|_| stopped())?;
            self.command(command)?;
        }
        loop {
            match commands.try_recv() {
                Ok(command) => self.command(command)?,
                Err(mpsc::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::TryRecvError::Disconnected) => return Err(stopped()),
            }
        }
    }

    fn command(&mut self, command: Command) -> Result<(), GroupGone> {
        match command {
            Command::Submit { request, so_far, events, reply } => {
                let submitted = self.scheduler.resume(*request, so_far);
                if let Ok(seq) = &submitted {
                    self.clients.insert(*seq, events);
                }
                if let Err(Ok(seq)) = reply.send(submitted) {
                    // The caller left before it learned the number.
                    self.cancel(seq);
                }
            }
            Command::Cancel(seq) => self.cancel(seq),
            Command::Counts(reply) => {
                let integrity = self.scheduler.check_integrity().map_err(|e| e.to_string());
                let _ = reply.send((self.scheduler.counts(), integrity));
            }
            Command::Failed { reason, blames } => return Err(GroupGone { reason, blames }),
            Command::Stop => return Err(GroupGone::because("the group was retired")),
        }
        Ok(())
    }

    fn cancel(&mut self, seq: SeqId) {
        self.clients.remove(&seq);
        self.scheduler.cancel(seq);
    }

    /// Runs one step on all ranks and hands out what came of it.
    fn step(&mut self, step: &Step) -> Result<(), GroupGone> {
        self.followers.launch(step)?;
        let output = self.forward(step).map_err(|error| {
            // Where the watchdog has ended it, that one knows why.
            let failure = self.rank.pulse.verdict().unwrap_or_else(|| error.into());
            GroupGone { reason: failure.reason, blames: failure.blames }
        })?;
        let events = self
            .scheduler
            .commit(output)
            .map_err(|e| GroupGone::because(format!("the step's result is inconsistent: {e}")))?;
        for event in events {
            self.deliver(event);
        }
        Ok(())
    }

    fn deliver(&mut self, event: Event) {
        let (Event::Token { seq, .. }
        | Event::PromptLogprobs { seq, .. }
        | Event::Finished { seq, .. }) = &event;
        let seq = *seq;
        let finished = matches!(event, Event::Finished { .. });
        let Some(events) = self.clients.get(&seq) else { return };
        // The channel holds a whole answer, so it can only be closed: the client left.
        if events.try_send(Ok(event)).is_err() && !finished {
            self.cancel(seq);
        }
        if finished {
            self.clients.remove(&seq);
        }
    }

    fn forward(&mut self, step: &Step) -> Result<StepOutput, ForwardError> {
        let mut outputs: Vec<SequenceOutput> = step
            .entries
            .iter()
            .map(|e| SequenceOutput { seq: e.seq, sampled: None, prompt_logprobs: Vec::new() })
            .collect();
        let scheduler = &self.scheduler;
        self.rank.pulse.begin();
        let result =
            self.rank.decoder.forward(step, self.rank.collective.as_mut(), &mut |logits| {
                read_out(scheduler, step, logits, &mut outputs[logits.entry]);
            });
        self.rank.pulse.end();
        result?;
        Ok(StepOutput { number: step.number, outputs })
    }
}

/// Takes from one row of logits what its sequence asked for: prompt logprobs, the next token.
fn read_out(scheduler: &Scheduler, step: &Step, logits: Logits<'_>, output: &mut SequenceOutput) {
    let entry = &step.entries[logits.entry];
    let Some((request, generated)) = scheduler.context(entry.seq) else { return };
    let next = request.prompt.get(entry.start + logits.token + 1);
    if let (Want::All, Some(top), Some(next)) = (entry.want, request.prompt_logprobs, next) {
        output.prompt_logprobs.push(sample::logprobs(logits.values, *next, top));
    }
    let last = logits.token + 1 == entry.tokens.len();
    if last && scheduler.samples(entry) {
        let history = sample::History {
            prompt: &request.prompt,
            generated,
            forbidden: scheduler.forbidden(entry.seq),
        };
        let token = sample::choose(logits.values, &request.sampling, history);
        let logprobs: Option<TokenLogprobs> =
            request.logprobs.map(|top| sample::logprobs(logits.values, token, top));
        output.sampled = Some(Sampled { token, logprobs });
    }
}

#[cfg(test)]
#[path = "leader_tests.rs"]
mod tests;
