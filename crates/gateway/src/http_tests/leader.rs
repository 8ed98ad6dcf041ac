//! A leader without a model: it answers with the tokens of the prompt, again and again.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::Stream;
use identity::{Admit, Role};
use tokio::net::TcpListener;
use tonic::{Code, Request, Response, Status, Streaming};
use wire::pb;
use wire::pb::finished::Reason;
use wire::pb::generate_event::Event;
use wire::pb::worker_server::{Worker, WorkerServer};

use super::FixedView;

/// How the leader behaves.
#[derive(Clone, Default)]
pub(super) struct Rule {
    /// Between tokens.
    pub(super) pace: Duration,
    /// Refuses every sequence.
    pub(super) refuse: Option<Code>,
    /// Fails after so many tokens.
    pub(super) break_after: Option<usize>,
    /// Ends the stream without its last event after so many tokens.
    pub(super) cut_after: Option<usize>,
    /// By attempt, whosever it is: the group ends under the stream before this token.
    pub(super) losses: Arc<Mutex<VecDeque<usize>>>,
    /// In epochs before this one no token ever comes.
    pub(super) mute_before: u64,
    /// The group ends over every request whose prompt begins like this, once it has so many tokens.
    pub(super) poison: Option<(u32, usize)>,
    /// What the group says after its epoch is over: this token, again and again.
    pub(super) ghost: Option<u32>,
    /// What the leader says of its steps.
    pub(super) stalled: String,
    /// This event of a stream comes under the next epoch.
    pub(super) mislabelled: Option<usize>,
}

#[derive(Clone)]
pub(super) struct FakeLeader {
    pub(super) address: String,
    rule: Rule,
    /// Says which epoch the group has.
    view: FixedView,
    /// Streams that nobody has dropped.
    open: Arc<AtomicUsize>,
    /// How often its pulse was felt.
    looks: Arc<AtomicUsize>,
    /// Tokens that were asked for by the transport, over all streams.
    produced: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<pb::GenerateRequest>>>,
}

impl FakeLeader {
    pub(super) async fn start(rule: Rule, view: FixedView) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let this = Self {
            address,
            rule,
            view,
            open: Arc::default(),
            looks: Arc::default(),
            produced: Arc::default(),
            seen: Arc::default(),
        };
        let server =
            tonic::transport::Server::builder().add_service(WorkerServer::new(this.clone()));
        let tls = super::node(1, Role::Worker);
        let incoming = wire::transport::incoming(listener, &tls, Admit::nodes()).expect("TLS");
        tokio::spawn(server.serve_with_incoming(incoming));
        this
    }

    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    pub(super) fn produced(&self) -> usize {
        self.produced.load(Ordering::SeqCst)
    }

    /// Waits until `count` streams are open.
    pub(super) async fn wait_open(&self, count: usize) {
        let open = reached(|| self.open() == count).await;
        assert!(open, "{} streams are open, {count} expected", self.open());
    }

    /// Waits until at least `count` tokens were produced.
    pub(super) async fn wait_produced(&self, count: usize) {
        let produced = reached(|| self.produced() >= count).await;
        assert!(produced, "{} tokens, {count} expected", self.produced());
    }

    /// The requests so far, oldest first.
    pub(super) fn seen(&self) -> Vec<pb::GenerateRequest> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

/// Whether something holds before one has waited for too long.
async fn reached(holds: impl Fn() -> bool) -> bool {
    let holds = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), holds).await.is_ok()
}

/// The answer's tokens: the prompt from its `choice`th token on, over and over.
pub(super) fn answer(prompt: &[u32], choice: u32, count: usize) -> Vec<u32> {
    prompt.iter().copied().cycle().skip(choice as usize).take(count).collect()
}

/// Logprobs by rule: a token's own is its id in hundredths; alternatives are the lowest ids.
fn logprobs(token: u32, top: u32) -> pb::TokenLogprobs {
    let value = |id: u32| -(f32::from(u16::try_from(id).expect("a small id")) / 100.0);
    pb::TokenLogprobs {
        token,
        logprob: value(token),
        top_tokens: (10..10 + top).collect(),
        top_logprobs: (10..10 + top).map(value).collect(),
    }
}

/// Counts a stream for as long as it lives, and its tokens.
struct Counted(Arc<AtomicUsize>, Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn events(
    request: pb::GenerateRequest,
    leader: FakeLeader,
    counted: Counted,
) -> impl Stream<Item = Result<pb::GenerateEvent, Status>> {
    async_stream::stream! {
        let counted = counted;
        let (rule, view) = (&leader.rule, &leader.view);
        let loss = rule.losses.lock().expect("not poisoned").pop_front();
        let (group, epoch) = (request.group, request.epoch);
        let event = |event| Ok(pb::GenerateEvent { group, epoch, event: Some(event) });
        if let Some(top) = request.prompt_logprobs {
            let all: Vec<_> = request.prompt[1..].iter().map(|id| logprobs(*id, top)).collect();
            for part in all[usize::try_from(request.scored).expect("a count")..].chunks(2) {
                yield event(Event::PromptLogprobs(pb::PromptLogprobs { tokens: part.to_vec() }));
            }
        }
        if epoch < rule.mute_before {
            std::future::pending::<()>().await;
        }
        let stop = request.stop.clone().expect("stop rules");
        let choice = request.sampling.as_ref().expect("sampling").choice;
        let most = usize::try_from(stop.max_tokens).expect("a count");
        let tokens = answer(&request.prompt, choice, most);
        let first = request.generated.len();
        assert_eq!(request.generated, tokens[..first], "it goes on from what was said");
        let mut generated = first as u64;
        let mut stop_id = None;
        for (i, right) in tokens.iter().copied().enumerate().skip(first) {
            if rule.break_after == Some(i) {
                yield Err(Status::unavailable("10.0.0.1:7000 went away"));
                return;
            }
            if rule.cut_after == Some(i) {
                return;
            }
            let poison = rule.poison.is_some_and(|(id, at)| request.prompt[0] == id && i == at);
            if poison || loss == Some(i) {
                view.fence(epoch);
                yield Err(Status::unavailable("the group ended"));
                return;
            }
            tokio::time::sleep(rule.pace).await;
            let ghost = rule.ghost.filter(|_| !leader.serves(epoch));
            let token = ghost.unwrap_or(right);
            let logprobs = request.logprobs.map(|top| logprobs(token, top));
            let index = i as u64;
            let event = event(Event::Token(pb::Token { token, index, logprobs }));
            yield match rule.mislabelled == Some(i) && first == 0 {
                true => event.map(|event| pb::GenerateEvent { epoch: epoch + 1, ..event }),
                false => event,
            };
            counted.1.fetch_add(1, Ordering::SeqCst);
            generated += 1;
            if stop.stop_ids.contains(&token) {
                stop_id = Some(token);
                break;
            }
        }
        let reason = if stop_id.is_some() { Reason::Stop } else { Reason::Length };
        if loss == Some(tokens.len()) {
            // Everything was said but that it is the end.
            view.fence(epoch);
            return;
        }
        yield event(Event::Finished(pb::Finished { reason: reason.into(), stop_id, generated }));
    }
}

impl FakeLeader {
    fn serves(&self, epoch: u64) -> bool {
        self.view.get().is_ok_and(|route| route.epoch.0 == epoch)
    }
}

#[tonic::async_trait]
impl Worker for FakeLeader {
    type GenerateStream = Events<pb::GenerateEvent>;
    type StepsStream = Events<pb::StepReport>;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        assert_eq!(request.group, 3);
        if !self.serves(request.epoch) {
            return Err(Status::failed_precondition("another epoch"));
        }
        self.seen.lock().expect("not poisoned").push(request.clone());
        if let Some(code) = self.rule.refuse {
            return Err(Status::new(code, "refused at 10.0.0.1:7000"));
        }
        self.open.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(Arc::clone(&self.open), Arc::clone(&self.produced));
        Ok(Response::new(Box::pin(events(request, self.clone(), counted))))
    }

    async fn steps(
        &self,
        _: Request<Streaming<pb::StepPlan>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        Err(Status::unimplemented("no steps here"))
    }

    async fn pulse(
        &self,
        request: Request<pb::PulseRequest>,
    ) -> Result<Response<pb::PulseReply>, Status> {
        if !self.serves(request.into_inner().epoch) {
            return Err(Status::failed_precondition("another epoch"));
        }
        let stalled = self.rule.stalled.clone();
        // Steps go on whenever somebody looks.
        let steps = self.looks.fetch_add(1, Ordering::SeqCst) as u64;
        Ok(Response::new(pb::PulseReply { steps, stalled, ..Default::default() }))
    }

    async fn counts(
        &self,
        request: Request<pb::CountsRequest>,
    ) -> Result<Response<pb::CountsReply>, Status> {
        let request = request.into_inner();
        assert_eq!(request.group, 3);
        let running = self.open() as u64;
        let blocks = pb::CountsReply {
            running,
            blocks_used: running,
            blocks_total: 4,
            ..Default::default()
        };
        Ok(Response::new(blocks))
    }
}
