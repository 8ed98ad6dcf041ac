//! The way from a sequence to a group that serves it, and to the next one when that is lost.
//!
//! A token is taken from a group only under the epoch that the view holds for it. When the view
//! moves on, or the stream breaks, the way is lost; whoever holds the token log asks for another.

use std::sync::Arc;
use std::time::Duration;

use cluster::Route;
use engine::{Event, SeqId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};
use tonic::{Code, Status, Streaming};
use wire::{Generate, pb, transport};

use crate::error::ApiError;
use crate::leader::Leaders;
use crate::load::{Busy, Load};
use crate::metrics::Metrics;
use crate::view::{NoRoute, Outlook, View};

/// Pause before a group is asked again that failed and that the view still holds; doubles up to
/// the longest. A change of the view is not waited out.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// So many times as patient as a search is the line of suspects.
const LINE: u32 = 10;
/// Suspects that are tried together. Most are innocent, and a line of many is short then.
const FEW: u32 = 8;

/// How a suspect is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trial {
    /// With a few other suspects.
    AmongFew,
    /// While no other suspect runs.
    Alone,
}

/// The ways to all groups.
pub(crate) struct Ways {
    view: Box<dyn View>,
    leaders: Leaders,
    load: Load,
    metrics: Metrics,
    /// How long a sequence may look for a group.
    patience: Duration,
    /// Suspects run a few at a time.
    quarantine: Arc<Semaphore>,
}

/// A sequence that a group's leader has taken. Dropping it cancels the sequence there.
pub(crate) struct Way {
    pub(crate) route: Route,
    events: Streaming<pb::GenerateEvent>,
    /// Counts as the group's work as long as it is there.
    _busy: Busy,
}

/// The group, its epoch or the connection to it is gone; the sequence can go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lost;

/// A sequence that looks for a group.
pub(crate) struct Search<'a> {
    /// What shall serve it.
    pub(crate) deployment: &'a str,
    /// It had a group and lost it: whatever it takes, it is to go on.
    pub(crate) resumed: bool,
    /// When it is too late.
    pub(crate) until: Instant,
    /// The token log, not addressed to a group yet.
    pub(crate) generate: Generate,
}

/// Why a leader did not take a sequence.
enum Refusal {
    /// It never will, nor will another.
    Final(ApiError),
    /// It has too much to do.
    Full,
    /// It is not there, or is not the leader.
    Gone,
}

/// Groups that failed a moment ago, and when they are asked again.
struct Failed {
    routes: Vec<Route>,
    again: Instant,
    pause: Duration,
}

impl Failed {
    fn new() -> Self {
        Self { routes: Vec::new(), again: Instant::now(), pause: FIRST_PAUSE }
    }

    fn add(&mut self, route: Route) {
        if self.routes.is_empty() {
            self.again = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        self.routes.push(route);
    }
}

impl Ways {
    pub(crate) fn new(
        view: Box<dyn View>,
        leaders: Leaders,
        metrics: Metrics,
        patience: Duration,
    ) -> Self {
        let quarantine = Arc::new(Semaphore::new(FEW as usize));
        Self { view, leaders, load: Load::default(), metrics, patience, quarantine }
    }

    pub(crate) fn view(&self) -> &dyn View {
        self.view.as_ref()
    }

    /// The least busy group that serves a deployment at this moment.
    pub(crate) fn route(&self, deployment: &str) -> Result<Route, NoRoute> {
        let routes = self.view.routes(deployment)?;
        let none = || NoRoute { why: "no group serves it".to_owned(), outlook: Outlook::Wished };
        self.load.least(routes).ok_or_else(none)
    }

    /// The scheduler's counts of a group, where its leader tells them in time.
    pub(crate) async fn counts(&self, route: &Route, within: Duration) -> Option<pb::CountsReply> {
        self.leaders.counts(route, within).await
    }

    /// What a group's leader does, where it says so in time.
    pub(crate) async fn pulse(&self, route: &Route, within: Duration) -> Option<pb::PulseReply> {
        self.leaders.pulse(route, within).await
    }

    /// A sequence on that group or none.
    pub(crate) async fn try_one(&self, route: &Route, request: pb::GenerateRequest) -> Option<Way> {
        self.take(route, request).await.ok()
    }

    /// Finds a group that takes the sequence: the least busy one that serves, or the first that
    /// does while the sequence waits. A fresh sequence does not wait for a group that has never
    /// served, nor for room in a full queue.
    ///
    /// # Errors
    /// The request can never be served; or nothing serves, as long as the gateway is patient.
    pub(crate) async fn find(&self, mut search: Search<'_>) -> Result<Way, ApiError> {
        let until = search.until;
        let mut failed = Failed::new();
        loop {
            if Instant::now() >= until {
                return Err(late(&search, None));
            }
            let change = self.view.change();
            let (routes, why) = self.candidates(&search, &failed)?;
            let Some(route) = self.load.least(routes) else {
                let again = async {
                    match failed.routes.is_empty() {
                        true => std::future::pending().await,
                        false => sleep_until(failed.again).await,
                    }
                };
                tokio::select! {
                    () = change => {}
                    () = again => failed.routes.clear(),
                    () = sleep_until(until) => return Err(late(&search, why)),
                }
                continue;
            };
            (search.generate.group, search.generate.epoch) = (route.group, route.epoch);
            let taken = tokio::select! {
                taken = self.take(&route, search.generate.to_wire()) => taken,
                () = self.falls(&route) => Err(Refusal::Gone),
                () = sleep_until(until) => return Err(late(&search, None)),
            };
            match taken {
                Ok(way) => return Ok(way),
                Err(Refusal::Final(error)) => return Err(error),
                Err(Refusal::Full) if !search.resumed => return Err(ApiError::full()),
                Err(Refusal::Full | Refusal::Gone) => failed.add(route),
            }
        }
    }

    /// The groups that may be asked now; where there are none, perhaps why.
    fn candidates(
        &self,
        search: &Search<'_>,
        failed: &Failed,
    ) -> Result<(Vec<Route>, Option<String>), ApiError> {
        match self.view.routes(search.deployment) {
            Ok(mut routes) => {
                routes.retain(|route| !failed.routes.contains(route));
                Ok((routes, None))
            }
            Err(NoRoute { why, outlook }) => {
                let least = if search.resumed { Outlook::Wished } else { Outlook::Returns };
                match outlook >= least {
                    true => Ok((Vec::new(), Some(why))),
                    false => Err(late(search, Some(why))),
                }
            }
        }
    }

    async fn take(&self, route: &Route, request: pb::GenerateRequest) -> Result<Way, Refusal> {
        let busy = self.load.begin(route.group);
        let answer = self.leaders.generate(route, request).await;
        let events = answer.map_err(|status| refusal(&status))?;
        Ok(Way { route: route.clone(), events, _busy: busy })
    }

    /// Completes when the view holds another epoch for the group, or none.
    async fn falls(&self, route: &Route) {
        loop {
            let change = self.view.change();
            if !self.view.stands(route) {
                return;
            }
            change.await;
        }
    }

    /// The sequence's next event. Waits on the leader, and so does the leader on a caller that
    /// does not ask: nothing is buffered here.
    pub(crate) async fn next(&self, way: &mut Way) -> Result<Event, Lost> {
        let message = tokio::select! {
            biased;
            message = way.events.message() => message,
            () = self.falls(&way.route) => return Err(Lost),
        };
        let event = match message {
            Ok(Some(event)) => event,
            // A stream that ends without its last event was cut.
            Ok(None) => return Err(Lost),
            Err(status) => {
                let (code, message) = (status.code(), transport::reason(&status));
                tracing::warn!(?code, message, "a group left its sequences");
                return Err(Lost);
            }
        };
        let Ok((group, epoch, event)) = wire::event_from_wire(SeqId(0), event) else {
            tracing::warn!("a group leader sent an event that cannot be");
            return Err(Lost);
        };
        let route = &way.route;
        if (group, epoch) != (route.group, route.epoch) || !self.view.stands(route) {
            self.metrics.stale();
            tracing::warn!(%group, %epoch, "a token of another epoch was refused");
            return Err(Lost);
        }
        Ok(event)
    }

    /// Waits for what becomes of a group whose stream broke: whether it is gone, or, as far as
    /// anybody knows after a moment, just the connection.
    pub(crate) async fn settle(&self, route: &Route) -> bool {
        tokio::time::timeout(FIRST_PAUSE, self.falls(route)).await.is_ok()
    }

    /// Whether a group left its epoch by choice: nobody is to blame for that.
    pub(crate) fn moved(&self, route: &Route) -> bool {
        self.view.moved(route)
    }

    /// How many of these groups are gone, and not just out of reach for a while.
    pub(crate) fn gone(&self, routes: &[Route]) -> usize {
        routes.iter().filter(|route| !self.view.stands(route)).count()
    }

    /// Until when a sequence that looks for a group since then may go on looking.
    pub(crate) fn until(&self, since: Instant) -> Instant {
        since + self.patience
    }

    /// Waits until a suspect can be tried. There may be many in line, most of them innocent, and
    /// each may be as patient as a search: who waits here is not late yet.
    pub(crate) async fn tried(&self, trial: Trial) -> Result<OwnedSemaphorePermit, ApiError> {
        let places = if trial == Trial::Alone { FEW } else { 1 };
        let permit = Arc::clone(&self.quarantine).acquire_many_owned(places);
        let permit = tokio::time::timeout(self.patience * LINE, permit).await;
        permit.map_err(|_| ApiError::interrupted())?.map_err(|_| ApiError::interrupted())
    }
}

/// What is told to a sequence that waited in vain.
fn late(search: &Search<'_>, why: Option<String>) -> ApiError {
    if search.resumed {
        return ApiError::interrupted();
    }
    let why = why.unwrap_or_else(|| "its group does not answer".to_owned());
    ApiError::unavailable(format!("the model is not ready: {why}"))
}

/// What a leader's status means. Transport texts hold addresses and stay here.
fn refusal(status: &Status) -> Refusal {
    match status.code() {
        Code::InvalidArgument => Refusal::Final(ApiError::rejected(status.message().to_owned())),
        Code::ResourceExhausted => Refusal::Full,
        code => {
            let message = transport::reason(status);
            tracing::warn!(?code, message, "a group leader refused or left");
            Refusal::Gone
        }
    }
}
