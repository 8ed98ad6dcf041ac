//! The leader's watch over its group's steps: one that takes far longer than usual, and why.
//!
//! A rank that is busy is never taken for dead. When a step is late every other rank is asked what
//! it does, over the path that steps take: who does not answer is cut off or stopped; where all
//! answer and each waits for another, a connection between two of them has died in silence; and as
//! long as one of them computes, the group is slow, and nothing is done about it.

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::{Epoch, GroupId};
use identity::{Expect, Tls};
use planner::NodeId;
use tokio::sync::mpsc as channel;
use tonic::transport::Channel;
use wire::pb::worker_client::WorkerClient;
use wire::{FormGroup, Report, pb, transport};

use crate::pulse::{Look, Pulse};
use crate::rank::{Failure, Formation, Stop};

/// Between two looks at the step.
const LOOK: Duration = Duration::from_millis(100);
/// How long a rank may take to say what it does.
const ANSWER: Duration = Duration::from_millis(300);
/// How often in a row a judgement must be the same before it is acted upon: a rank that only
/// computes may be late with an answer, and who is stopped or cut off is missed by its lease, too.
const DEADLOCK: usize = 2;
const SILENT: usize = 4;

/// Another rank's way.
struct Other {
    node: NodeId,
    client: WorkerClient<Channel>,
}

/// Watches one incarnation of a group from its leader's node.
pub(crate) struct Watchdog {
    group: GroupId,
    epoch: Epoch,
    others: BTreeMap<usize, Other>,
    pulse: Pulse,
    stop: Stop,
    reports: channel::UnboundedSender<Report>,
}

impl Watchdog {
    /// For the leader on `node`, whose pulse it feels.
    pub(crate) fn new(
        formation: &Formation,
        (node, tls): (NodeId, &Tls),
        pulse: Pulse,
        stop: Stop,
        reports: channel::UnboundedSender<Report>,
    ) -> Self {
        let FormGroup { group, epoch, plan, addresses, .. } = &formation.order;
        let elsewhere = plan.ranks.iter().filter(|rank| rank.node != node);
        let other = |rank: &planner::RankPlan| {
            let endpoint = transport::endpoint(&addresses[rank.rank].worker_address).ok()?;
            let expect = Expect::Node(rank.node.0);
            let channel = transport::connect_lazy(&endpoint, expect, tls);
            let client = transport::worker_client(channel);
            Some((rank.rank, Other { node: rank.node, client }))
        };
        let others = elsewhere.filter_map(other).collect();
        Self { group: *group, epoch: *epoch, others, pulse, stop, reports }
    }

    /// Watches until the group has ended, or ends it.
    pub(crate) async fn run(mut self) {
        let mut before = (None, 0);
        while !self.stop.stopped() && self.pulse.verdict().is_none() {
            tokio::time::sleep(LOOK).await;
            if !self.pulse.is_late() {
                before = (None, 0);
                continue;
            }
            let own = self.pulse.look();
            let looks = self.ask().await;
            let now = judge(&own, &looks);
            self.pulse.stalls(&self.words(&own, now));
            before = if now == before.0 { (now, before.1 + 1) } else { (now, 1) };
            // Over by now: it was slow.
            let enough = now.map_or(usize::MAX, Fault::times);
            if before.1 < enough || self.pulse.look().steps != own.steps {
                continue;
            }
            let Some(fault) = now else { continue };
            self.condemn(&own, fault);
        }
    }

    fn condemn(&self, own: &Look, fault: Fault) {
        let reason = self.words(own, Some(fault));
        let failure = Failure { reason: reason.clone(), blames: Some(fault.rank()) };
        let (group, epoch, blames) = (self.group, self.epoch, failure.blames);
        // Told before the collectives end: others will blame this rank for that.
        let _ = self.reports.send(Report::Failed { group, epoch, rank: 0, reason, blames });
        self.pulse.condemn(failure);
    }

    fn words(&self, own: &Look, fault: Option<Fault>) -> String {
        let took = own.running.unwrap_or_default().as_millis();
        let place = match own.place.as_str() {
            "" => "at its beginning".to_owned(),
            place => format!("in the {place}"),
        };
        let name = |rank: usize| match self.others.get(&rank) {
            Some(other) => format!("rank {rank} on node {}", other.node.0),
            None => format!("rank {rank}"),
        };
        let why = match fault {
            Some(Fault::Silent(rank)) => format!("{} does not answer", name(rank)),
            Some(Fault::Deadlock(rank)) => format!("nothing comes from {}", name(rank)),
            None => match own.waits {
                Some((rank, _)) => format!("{} is busy", name(rank)),
                None => "it computes".to_owned(),
            },
        };
        format!("a step has taken {took} ms, {place}: {why}")
    }

    /// By rank elsewhere: what it does, if it says so in time.
    async fn ask(&mut self) -> BTreeMap<usize, Option<Look>> {
        let (group, epoch) = (self.group.0, self.epoch.0);
        let asked = self.others.iter().map(|(&rank, other)| {
            let mut client = other.client.clone();
            let number = u32::try_from(rank).unwrap_or(u32::MAX);
            let request = pb::PulseRequest { group, epoch, rank: number };
            tokio::spawn(async move {
                let answer = tokio::time::timeout(ANSWER, client.pulse(request)).await;
                (rank, answer.ok().and_then(Result::ok).map(|r| Look::from_wire(r.into_inner())))
            })
        });
        let asked: Vec<_> = asked.collect();
        let mut looks = BTreeMap::new();
        for one in asked {
            if let Ok((rank, look)) = one.await {
                looks.insert(rank, look);
            }
        }
        looks
    }
}

/// Whose fault a late step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// This rank does not say what it does.
    Silent(usize),
    /// All wait for each other; the leader, or whom it waits for, for this one.
    Deadlock(usize),
}

impl Fault {
    /// How often in a row it must be found.
    fn times(self) -> usize {
        match self {
            Self::Silent(_) => SILENT,
            Self::Deadlock(_) => DEADLOCK,
        }
    }

    fn rank(self) -> usize {
        match self {
            Self::Silent(rank) | Self::Deadlock(rank) => rank,
        }
    }
}

/// What the answers mean; `None` where somebody is at work.
fn judge(own: &Look, looks: &BTreeMap<usize, Option<Look>>) -> Option<Fault> {
    if let Some((&rank, _)) = looks.iter().find(|(_, look)| look.is_none()) {
        return Some(Fault::Silent(rank));
    }
    let waits = |look: &Look| look.waits.filter(|(_, time)| *time > ANSWER).map(|(rank, _)| rank);
    let first = waits(own)?;
    if looks.values().flatten().any(|look| look.running.is_some() && waits(look).is_none()) {
        return None;
    }
    Some(Fault::Deadlock(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> Look {
        Look { running: Some(Duration::from_secs(1)), ..Look::default() }
    }

    fn waiting(rank: usize) -> Look {
        Look { waits: Some((rank, Duration::from_secs(1))), ..busy() }
    }

    fn of(one: Option<Look>, two: Option<Look>) -> BTreeMap<usize, Option<Look>> {
        BTreeMap::from([(1, one), (2, two)])
    }

    #[test]
    fn busy_is_not_dead() {
        assert_eq!(judge(&waiting(1), &of(Some(busy()), Some(waiting(1)))), None);
        assert_eq!(judge(&busy(), &of(Some(waiting(0)), Some(waiting(0)))), None);
        let just = Look { waits: Some((2, Duration::from_millis(5))), ..busy() };
        assert_eq!(judge(&waiting(1), &of(Some(just), Some(waiting(0)))), None);
    }

    #[test]
    fn who_does_not_answer_is_at_fault_and_so_is_a_connection_that_died() {
        let silent = judge(&waiting(1), &of(Some(waiting(2)), None));
        assert_eq!(silent, Some(Fault::Silent(2)), "and not the one that waits for it");
        let stuck = judge(&waiting(1), &of(Some(waiting(0)), Some(waiting(0))));
        assert_eq!(stuck, Some(Fault::Deadlock(1)));
        // A rank that never got the step waits for nobody and runs nothing.
        let idle = judge(&waiting(1), &of(Some(Look::default()), Some(waiting(1))));
        assert_eq!(idle, Some(Fault::Deadlock(1)));
    }
}
