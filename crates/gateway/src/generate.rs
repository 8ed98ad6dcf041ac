//! One sequence from its token ids to shown text: the token log, the way to a group and to the
//! next one when that is lost, detokenising and stop strings.

use std::sync::Arc;

use cluster::{Epoch, GroupId, Route};
use engine::{Event, FinishReason, Request, Resume, Sampled, TokenLogprobs};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use wire::Generate;

use crate::detokenizer::Detokenizer;
use crate::error::ApiError;
use crate::metrics::Meter;
use crate::stop::{Checked, StopMatcher};
use crate::tokenizer::Tokenizer;
use crate::way::{Lost, Search, Trial, Way, Ways};

/// After so many groups that were lost one after the other, without a token in between, a sequence
/// is under suspicion: it is tried among few, and alone if it ends the group of those.
const SUSPECT: usize = 2;
/// A suspect that has ended so many groups, tried alone, is given up. Once may be chance: workers
/// also die of themselves.
const GUILTY: usize = 2;

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

/// The truth about a sequence, from which it is started again anywhere.
#[derive(Debug, Clone)]
pub(crate) struct TokenLog {
    /// Prompt, parameters and seed.
    pub(crate) request: Request,
    /// What has been taken from groups so far.
    pub(crate) so_far: Resume,
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

/// What a sequence works with.
pub(crate) struct Context {
    pub(crate) request_id: String,
    pub(crate) deployment: String,
    pub(crate) ways: Arc<Ways>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) meter: Meter,
}

/// A running sequence.
pub(crate) struct Sequence {
    index: usize,
    log: TokenLog,
    context: Context,
    /// None once the answer has ended; dropping it cancels.
    way: Option<Way>,
    /// Groups that were lost since the last token, this sequence among their work.
    lost: Vec<Route>,
    /// Since when it looks for a group, if no token came since.
    since: Option<Instant>,
    /// Held while it is under suspicion, until it gets on.
    trial: Option<(Trial, OwnedSemaphorePermit)>,
    /// Groups that it has lost while it was tried alone.
    ended: usize,
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
}

impl Sequence {
    /// Starts a sequence on a group that serves its deployment.
    pub(crate) async fn open(job: Job, context: Context) -> Result<Self, ApiError> {
        let matcher = StopMatcher::new(job.text.stops.clone(), job.text.include_stop);
        let tokenizer = Arc::clone(&context.tokenizer);
        let mut this = Self {
            index: job.index,
            log: TokenLog { request: job.request, so_far: Resume::default() },
            context,
            way: None,
            lost: Vec::new(),
            since: None,
            trial: None,
            ended: 0,
            detokenizer: Detokenizer::new(tokenizer, job.text.skip_special),
            matcher,
            offset: 0,
            prompt_logprobs: Vec::new(),
            owes_echo: job.text.echo.is_some(),
            text: job.text,
            named_stops: job.named_stops,
        };
        this.find(false).await?;
        this.context.meter.taken();
        Ok(this)
    }

    /// Finds a group that goes on from the token log.
    async fn find(&mut self, resumed: bool) -> Result<(), ApiError> {
        let TokenLog { request, so_far } = self.log.clone();
        // Whoever takes it is filled in.
        let (group, epoch) = (GroupId(0), Epoch(0));
        let request_id = self.context.request_id.clone();
        let generate = Generate { group, epoch, request_id, request, so_far };
        let deployment = &self.context.deployment;
        let ways = Arc::clone(&self.context.ways);
        let until = ways.until(self.since.unwrap_or_else(Instant::now));
        let search = Search { deployment, resumed, until, generate };
        self.way = Some(ways.find(search).await?);
        Ok(())
    }

    /// The next piece; None after the last one. Where a group is lost the next piece is the next
    /// group's, as if nothing had been.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        if self.owes_echo && self.log.request.prompt_logprobs.is_none() {
            return Ok(Some(self.echo()));
        }
        loop {
            let Some(way) = &mut self.way else { return Ok(None) };
            match self.context.ways.next(way).await {
                Ok(Event::PromptLogprobs { tokens, .. }) => self.scored(tokens),
                Ok(Event::Token { index, sampled, .. }) => {
                    let expected = self.log.so_far.generated.len();
                    if index == expected {
                        return Ok(Some(self.token(sampled)));
                    }
                    tracing::warn!(expected, index, "a token came out of order");
                    self.resume().await?;
                }
                Ok(Event::Finished { reason, .. }) => return Ok(Some(self.finished(reason))),
                Err(Lost) => {
                    if let Some(reason) = self.log.request.stop.reached(&self.log.so_far.generated)
                    {
                        // Only the end of the answer was lost, and the answer says it too.
                        return Ok(Some(self.finished(reason)));
                    }
                    self.resume().await?;
                }
            }
        }
    }

    /// Goes on in another group, or in another incarnation of the same one.
    async fn resume(&mut self) -> Result<(), ApiError> {
        let Some(way) = self.way.take() else { return Ok(()) };
        let lost = way.route.clone();
        let request = self.context.request_id.as_str();
        tracing::debug!(request, group = %lost.group, epoch = %lost.epoch, "a way is lost");
        drop(way);
        self.context.meter.lost();
        self.since.get_or_insert_with(Instant::now);
        // A connection that broke is no fault of the sequence; a group that is gone may be.
        let gone = self.context.ways.settle(&lost).await;
        let moved = self.context.ways.moved(&lost);
        if !moved && !self.lost.contains(&lost) {
            self.lost.push(lost);
        }
        if self.context.ways.gone(&self.lost) >= SUSPECT {
            self.suspected(gone && !moved).await?;
        }
        self.find(true).await?;
        let epoch = self.way.as_ref().map(|way| way.route.epoch.0);
        tracing::debug!(request = self.context.request_id, epoch, "a sequence goes on");
        Ok(())
    }

    /// Waits for its turn to be tried, as narrowly as it has to be. `fell`: with it fell another
    /// group.
    async fn suspected(&mut self, fell: bool) -> Result<(), ApiError> {
        let request = self.context.request_id.as_str();
        let trial = match self.trial.as_ref().map(|(trial, _)| *trial) {
            Some(Trial::Alone) => {
                self.ended += usize::from(fell);
                if self.ended >= GUILTY {
                    tracing::error!(
                        request,
                        "this request ends every group that computes it: it is given up"
                    );
                    return Err(ApiError::quarantined());
                }
                return Ok(());
            }
            Some(Trial::AmongFew) if !fell => return Ok(()),
            Some(Trial::AmongFew) => Trial::Alone,
            None => Trial::AmongFew,
        };
        tracing::warn!(request, ?trial, "a request is under suspicion");
        // Its place among few is free for others.
        self.trial = None;
        self.trial = Some((trial, self.context.ways.tried(trial).await?));
        // Its own search begins now.
        self.since = Some(Instant::now());
        Ok(())
    }

    fn scored(&mut self, tokens: Vec<TokenLogprobs>) {
        let wanted = self.log.request.prompt.len().saturating_sub(1);
        let room = wanted.saturating_sub(self.log.so_far.scored);
        let count = tokens.len().min(room);
        self.log.so_far.scored += count;
        self.prompt_logprobs.extend(tokens.into_iter().take(count));
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
        let mut detokenizer = Detokenizer::new(Arc::clone(&self.context.tokenizer), skip);
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

    fn token(&mut self, sampled: Sampled) -> Piece {
        let id = sampled.token;
        self.log.so_far.generated.push(id);
        self.lost.clear();
        self.since = None;
        self.trial = None;
        self.ended = 0;
        self.context.meter.token();
        // A prompt with logprobs is shown once all of those are in, which is now.
        let mut piece = if self.owes_echo { self.echo() } else { self.piece() };
        piece.tokens.push(Shown { id, offset: self.offset, logprobs: sampled.logprobs });
        let hidden = !self.text.include_stop && self.log.request.stop.stop_ids.contains(&id);
        if hidden {
            return piece;
        }
        let text = self.detokenizer.push(id);
        self.offset += text.chars().count();
        if self.log.so_far.generated.len() <= self.log.request.stop.min_tokens {
            piece.text.push_str(&text);
            return piece;
        }
        let checked = self.matcher.push(&text);
        self.add(&mut piece, checked);
        piece
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
        self.way = None;
        self.context.meter.finish(finish.reason);
        piece.finish = Some(finish);
    }

    fn finished(&mut self, reason: FinishReason) -> Piece {
        let mut piece = if self.owes_echo { self.echo() } else { self.piece() };
        let rest = self.detokenizer.finish();
        if self.log.so_far.generated.len() > self.log.request.stop.min_tokens {
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
