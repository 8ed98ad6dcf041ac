//! Whether a request would be answered: what the cluster has decided, what the group's leader says
//! of its steps, and, where nothing was computed lately, a token computed for the purpose.
//!
//! Busy is not dead: a group whose steps go on is healthy however many wait for it.

use std::time::Duration;

use cluster::Route;
use engine::{Event, Request, Resume, Sampling, StopRules};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use wire::Generate;

use crate::error::ApiError;
use crate::way::Ways;

/// Answers within this time of each other are the same: asking often costs nothing.
const FRESH: Duration = Duration::from_millis(200);
/// How long a leader may take to say what it does.
const ANSWER: Duration = Duration::from_secs(2);
/// How long an idle group may take for one token.
const CANARY: Duration = Duration::from_millis(1_500);
/// How long either may take once a node of the group is known to be silent.
const SOON: Duration = Duration::from_millis(250);
/// Times that a group which moves on under the look is looked at again.
const LOOKS: usize = 3;
/// How long a token vouches for a group that is idle.
const VOUCHES: Duration = Duration::from_secs(5);

/// The last look.
#[derive(Default)]
pub(crate) struct Health {
    last: Mutex<Option<Seen>>,
}

#[derive(Clone)]
struct Seen {
    at: Instant,
    verdict: Result<(), String>,
    /// The group that was looked at.
    route: Option<Route>,
    steps: u64,
    /// When it was last known to compute.
    computed: Option<Instant>,
}

impl Seen {
    /// Whether the cluster's state is still what was looked at: that costs nothing to know.
    fn holds(&self, ways: &Ways, deployment: &str) -> bool {
        match &self.route {
            Some(route) => ways.view().stands(route),
            None => ways.route(deployment).is_err(),
        }
    }
}

impl Health {
    /// Whether a deployment would answer, or in words for an operator why not.
    ///
    /// # Errors
    /// 503, with the reason.
    pub(crate) async fn check(&self, ways: &Ways, deployment: &str) -> Result<(), ApiError> {
        let mut last = self.last.lock().await;
        let seen = match last.take() {
            Some(seen) if seen.at.elapsed() < FRESH && seen.holds(ways, deployment) => seen,
            before => look(ways, deployment, before).await,
        };
        let verdict = seen.verdict.clone();
        *last = Some(seen);
        let late = |why: String| ApiError::unavailable(format!("the model is not ready: {why}"));
        verdict.map_err(late)
    }
}

/// Looks at the group that serves; at the next one where that has gone meanwhile.
async fn look(ways: &Ways, deployment: &str, mut before: Option<Seen>) -> Seen {
    let mut looks = 0;
    loop {
        looks += 1;
        let seen = look_once(ways, deployment, before).await;
        if seen.verdict.is_ok() || seen.holds(ways, deployment) || looks == LOOKS {
            return seen;
        }
        before = Some(seen);
    }
}

async fn look_once(ways: &Ways, deployment: &str, before: Option<Seen>) -> Seen {
    let route = match ways.route(deployment) {
        Ok(route) => route,
        Err(no) => {
            let why = [Some(no.why), ways.view().trouble(deployment)];
            let why = why.into_iter().flatten().collect::<Vec<_>>().join("; ");
            let (at, verdict) = (Instant::now(), Err(why));
            return Seen { at, verdict, route: None, steps: 0, computed: None };
        }
    };
    let before = before.filter(|before| before.route.as_ref() == Some(&route));
    let mut seen = Seen {
        at: Instant::now(),
        verdict: Ok(()),
        steps: before.as_ref().map_or(0, |before| before.steps),
        computed: before.as_ref().and_then(|before| before.computed),
        route: Some(route.clone()),
    };
    seen.verdict = group(ways, &route, &mut seen, before.is_some()).await;
    seen.at = Instant::now();
    seen
}

async fn group(ways: &Ways, route: &Route, seen: &mut Seen, known: bool) -> Result<(), String> {
    let (group, node) = (route.group, route.leader.0);
    let Some(pulse) = unless_silent(ways, route, ways.pulse(route, ANSWER)).await.flatten() else {
        let why = ways.view().suspect(route);
        let why = why.unwrap_or_else(|| format!("rank 0 on node {node} does not answer"));
        return Err(format!("group {group}: {why}"));
    };
    if !pulse.stalled.is_empty() {
        return Err(format!("group {group}: {}", pulse.stalled));
    }
    let advanced = known && pulse.steps != seen.steps;
    seen.steps = pulse.steps;
    if advanced {
        seen.computed = Some(Instant::now());
    }
    let vouched = seen.computed.is_some_and(|since| since.elapsed() < VOUCHES);
    let suspect = ways.view().suspect(route);
    if advanced || pulse.running_ms.is_some() || (vouched && suspect.is_none()) {
        return Ok(());
    }
    if canary(ways, route).await {
        seen.computed = Some(Instant::now());
        return Ok(());
    }
    let suspect = ways.view().suspect(route);
    let known = suspect.is_some();
    let mut why = suspect.unwrap_or_else(|| "it gives no token".to_owned());
    // What it hangs on, now that it hangs.
    let pulse = if known { None } else { ways.pulse(route, ANSWER).await };
    if let Some(pulse) = pulse {
        if !pulse.stalled.is_empty() {
            why = pulse.stalled;
        } else if let Some(rank) = pulse.waits_for {
            why = format!("{why}; rank 0 waits for rank {rank} in the {}", pulse.place);
        }
    }
    Err(format!("group {group}: {why}"))
}

/// Whether the group gives a token.
async fn canary(ways: &Ways, route: &Route) -> bool {
    let stop = StopRules { max_tokens: 1, min_tokens: 0, stop_ids: Vec::new() };
    let sampling = Sampling::greedy();
    let request =
        Request { prompt: vec![0], sampling, stop, logprobs: None, prompt_logprobs: None };
    let (group, epoch) = (route.group, route.epoch);
    let request_id = "canary".to_owned();
    let generate = Generate { group, epoch, request_id, request, so_far: Resume::default() };
    let token = async {
        let mut way = ways.try_one(route, generate.to_wire()).await?;
        loop {
            match ways.next(&mut way).await {
                Ok(Event::Token { .. }) => return Some(()),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    };
    let token = unless_silent(ways, route, timeout(CANARY, token)).await;
    token.is_some_and(|token| token.is_ok_and(|token| token.is_some()))
}

/// What an answer comes to, unless the group falls meanwhile, or a node of it is silent and the
/// answer does not come soon.
async fn unless_silent<T>(
    ways: &Ways,
    route: &Route,
    answer: impl Future<Output = T>,
) -> Option<T> {
    let silent = async {
        loop {
            let change = ways.view().change();
            if !ways.view().stands(route) {
                return;
            }
            if ways.view().suspect(route).is_some() {
                return tokio::time::sleep(SOON).await;
            }
            change.await;
        }
    };
    tokio::select! {
        biased;
        answer = answer => Some(answer),
        () = silent => None,
    }
}
