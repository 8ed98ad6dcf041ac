//! One sequence from its token ids to shown text: the token log, the stream of the group leader,
//! detokenising and stop strings.

use std::sync::Arc;

use cluster::Route;
use engine::{Event, FinishReason, Request, Sampled, SeqId, TokenLogprobs};
use tonic::Streaming;
use wire::{Generate, pb};

use crate::detokenizer::Detokenizer;
use crate::error::ApiError;
use crate::leader::{Leaders, refusal};
use crate::load::Busy;
use crate::metrics::Meter;
use crate::stop::{Checked, StopMatcher};
use crate::tokenizer::Tokenizer;

/// What makes text of a sequence's ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TextRules {
    pub(crate) stops: Vec<String>,
    /// Stop strings, and the text of stop tokens, belong to the answer.
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// The prompt's own text opens the answer: as sent, or decoded where ids were sent.
    pub(crate) echo: Option<Option<String>>,
}

/// The truth about a sequence, from which it can be started again anywhere.
#[derive(Debug, Clone)]
pub(crate) struct TokenLog {
    /// Prompt, parameters and seed.
    pub(crate) request: Request,
    /// Ids emitted so far.
    pub(crate) emitted: Vec<u32>,
}

/// A token of the answer, or of an echoed prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shown {
    pub(crate) id: u32,
    /// Characters of the answer's text before this token.
    pub(crate) offset: usize,
    /// Where asked for; a prompt's first token never has any.
    pub(crate) logprobs: Option<TokenLogprobs>,
}

/// What ended an answer beside its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoppedBy {
    /// The length, or the model's own end.
    Nothing,
    /// A stop string.
    Text(String),
    /// A stop token of the request.
    Id(u32),
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finish {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    pub(crate) stopped_by: StoppedBy,
}

/// The next part of an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Piece {
    /// Which choice of the response.
    pub(crate) index: usize,
    pub(crate) text: String,
    /// Tokens of an echoed prompt.
    pub(crate) prompt: Vec<Shown>,
    /// Generated tokens.
    pub(crate) tokens: Vec<Shown>,
    /// Set on the last piece.
    pub(crate) finish: Option<Finish>,
}

/// A sequence to start.
pub(crate) struct Job {
    /// Which choice of the response.
    pub(crate) index: usize,
    pub(crate) request: Request,
    pub(crate) text: TextRules,
    /// Of `request.stop.stop_ids`, those that the request itself named.
    pub(crate) named_stops: Vec<u32>,
}

/// A running sequence.
pub(crate) struct Sequence {
    index: usize,
    log: TokenLog,
    route: Route,
    /// None once the answer has ended; dropping it cancels.
    events: Option<Streaming<pb::GenerateEvent>>,
    text: TextRules,
    named_stops: Vec<u32>,
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// Characters of text made so far.
    offset: usize,
    /// Logprobs of prompt tokens 1, 2, ... as they come in.
    prompt_logprobs: Vec<TokenLogprobs>,
    /// The prompt is still to be shown.
    owes_echo: bool,
    tokenizer: Arc<Tokenizer>,
    meter: Meter,
    /// Counts as the group's work as long as it is there.
    _busy: Busy,
}

impl Sequence {
    /// Starts a sequence on the leader of `route`.
    pub(crate) async fn open(
        leaders: &Leaders,
        route: &Route,
        request_id: &str,
        job: Job,
        context: (Arc<Tokenizer>, Meter, Busy),
    ) -> Result<Self, ApiError> {
        let (tokenizer, mut meter, busy) = context;
        let generate = Generate {
            group: route.group,
            epoch: route.epoch,
            request_id: request_id.to_owned(),
            request: job.request,
        };
        let events = leaders.generate(route, generate.to_wire()).await?;
        meter.taken();
        let matcher = StopMatcher::new(job.text.stops.clone(), job.text.include_stop);
        Ok(Self {
            index: job.index,
            log: TokenLog { request: generate.request, emitted: Vec::new() },
            route: route.clone(),
            events: Some(events),
            detokenizer: Detokenizer::new(Arc::clone(&tokenizer), job.text.skip_special),
            matcher,
            offset: 0,
            prompt_logprobs: Vec::new(),
            owes_echo: job.text.echo.is_some(),
            text: job.text,
            named_stops: job.named_stops,
            tokenizer,
            meter,
            _busy: busy,
        })
    }

    /// The next piece; None after the last one. Waits on the leader, and so does the leader on a
    /// caller that does not ask: nothing is buffered here.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        if self.owes_echo && self.log.request.prompt_logprobs.is_none() {
            return Ok(Some(self.echo()));
        }
        loop {
            let Some(events) = &mut self.events else { return Ok(None) };
            let event = match events.message().await {
                Ok(Some(event)) => event,
                // A stream that ends without its last event was cut.
                Ok(None) => return Err(self.fail(ApiError::interrupted())),
                Err(status) => return Err(self.fail(refusal(&status))),
            };
            let Ok((group, epoch, event)) = wire::event_from_wire(SeqId(0), event) else {
                tracing::warn!("a group leader sent an event that cannot be");
                return Err(self.fail(ApiError::interrupted()));
            };
            if (group, epoch) != (self.route.group, self.route.epoch) {
                return Err(self.fail(ApiError::interrupted()));
            }
            return match event {
                Event::PromptLogprobs { tokens, .. } => {
                    let wanted = self.log.request.prompt.len().saturating_sub(1);
                    let room = wanted.saturating_sub(self.prompt_logprobs.len());
                    self.prompt_logprobs.extend(tokens.into_iter().take(room));
                    continue;
                }
                Event::Token { index, sampled, .. } => self.token(index, sampled).map(Some),
                Event::Finished { reason, .. } => Ok(Some(self.finished(reason))),
            };
        }
    }

    fn fail(&mut self, error: ApiError) -> ApiError {
        self.events = None;
        error
    }

    fn piece(&self) -> Piece {
        Piece { index: self.index, ..Piece::default() }
    }

    /// The prompt as the answer's beginning. Runs before the first generated token.
    fn echo(&mut self) -> Piece {
        self.owes_echo = false;
        let mut piece = self.piece();
        let skip = self.text.skip_special;
        let prompt = &self.log.request.prompt;
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.tokenizer), skip);
        let mut logprobs = std::mem::take(&mut self.prompt_logprobs).into_iter();
        let (mut offset, mut decoded) = (0, String::new());
        for (i, id) in prompt.iter().enumerate() {
            let logprobs = if i == 0 { None } else { logprobs.next() };
            piece.prompt.push(Shown { id: *id, offset, logprobs });
            let text = detokenizer.push(*id);
            offset += text.chars().count();
            decoded.push_str(&text);
        }
        decoded.push_str(&detokenizer.finish());
        let sent = self.text.echo.take().flatten();
        piece.text = sent.unwrap_or(decoded);
        let length = piece.text.chars().count();
        for shown in &mut piece.prompt {
            shown.offset = shown.offset.min(length);
        }
        self.offset = length;
        piece
    }

    fn token(&mut self, index: usize, sampled: Sampled) -> Result<Piece, ApiError> {
        let expected = self.log.emitted.len();
        if index != expected {
            tracing::warn!(expected, index, "a token came out of order");
            return Err(self.fail(ApiError::interrupted()));
        }
        let id = sampled.token;
        self.log.emitted.push(id);
        self.meter.token();
        // A prompt with logprobs is shown once all of those are in, which is now.
        let mut piece = if self.owes_echo { self.echo() } else { self.piece() };
        piece.tokens.push(Shown { id, offset: self.offset, logprobs: sampled.logprobs });
        let hidden = !self.text.include_stop && self.log.request.stop.stop_ids.contains(&id);
        if hidden {
            return Ok(piece);
        }
        let text = self.detokenizer.push(id);
        self.offset += text.chars().count();
        if self.log.emitted.len() <= self.log.request.stop.min_tokens {
            piece.text.push_str(&text);
            return Ok(piece);
        }
        let checked = self.matcher.push(&text);
        self.add(&mut piece, checked);
        Ok(piece)
    }

    /// Adds checked text; a stop string ends the answer and cancels the sequence.
    fn add(&mut self, piece: &mut Piece, checked: Checked) {
        piece.text.push_str(&checked.text);
        if let Some(index) = checked.matched {
            let stop = self.matcher.stop(index).to_owned();
            self.end(piece, Finish { reason: "stop", stopped_by: StoppedBy::Text(stop) });
        }
    }

    fn end(&mut self, piece: &mut Piece, finish: Finish) {
        self.events = None;
        self.meter.finish(finish.reason);
        piece.finish = Some(finish);
    }

    fn finished(&mut self, reason: FinishReason) -> Piece {
        let mut piece = if self.owes_echo { self.echo() } else { self.piece() };
        let rest = self.detokenizer.finish();
        if self.log.emitted.len() > self.log.request.stop.min_tokens {
            let checked = self.matcher.push(&rest);
            self.add(&mut piece, checked);
        } else {
            piece.text.push_str(&rest);
        }
        if piece.finish.is_none() {
            piece.text.push_str(&self.matcher.finish());
            let finish = match reason {
                FinishReason::Stop { id } if self.named_stops.contains(&id) => {
                    Finish { reason: "stop", stopped_by: StoppedBy::Id(id) }
                }
                FinishReason::Stop { .. } => {
                    Finish { reason: "stop", stopped_by: StoppedBy::Nothing }
                }
                FinishReason::Length => Finish { reason: "length", stopped_by: StoppedBy::Nothing },
            };
            self.end(&mut piece, finish);
        }
        piece
    }
}
