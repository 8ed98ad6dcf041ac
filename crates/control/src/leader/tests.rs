//! The leader's duties without a network: what it proposes is applied at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod members;
mod moves;

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{Coordinator, Deployment, Model, Phase, Role, Standing, TokenId};
use model::{ComputeType, ModelSpec};
use planner::DeviceSpec;

use super::*;
use crate::replica::{MemberSet, PeerProgress, RoleKind};

const TIMING: Timing = Timing { heartbeat: 100, suspicion: 500, lease: 3_000, takeover: 3_000 };

/// A leader, the state it leads, and workers' ends of sessions.
struct Bench {
    leader: Leader,
    state: ClusterState,
    replica: ReplicaStatus,
    now: u64,
    index: u64,
    session: u64,
    orders: Vec<(SessionId, Order)>,
    ended: Vec<SessionId>,
    changes: Vec<(u64, MemberChange)>,
    transfers: Vec<NodeId>,
    proposed: Vec<Command>,
    /// The log takes nothing.
    refuses: bool,
    /// The state refuses every plan.
    conflicts: bool,
    /// Workers do not say whether they have prepared.
    mute: bool,
}

/// A replica that leads a cluster of one.
fn alone() -> ReplicaStatus {
    ReplicaStatus {
        id: NodeId(1),
        role: RoleKind::Leader,
        term: 2,
        leader: Some(NodeId(1)),
        commit: 0,
        applied: 0,
        last: 0,
        first: 0,
        snapshot: 0,
        members: MemberSet::of_one(NodeId(1)),
        peers: BTreeMap::new(),
        joint_ticks: 0,
        transfer: None,
        storage_full: false,
        removed: false,
        boot: 1,
        refused: BTreeMap::new(),
        last_refusal: None,
    }
}

impl Bench {
    fn new(ranks: usize, workers: u8) -> Self {
        let spec = ModelSpec::from_config(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "vocab_size": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": null, "eos_token_id": 0}"#,
        );
        let spec = Arc::new(spec.unwrap());
        let replica = alone();
        let mut bench = Self {
            leader: Leader::new(TIMING, 1),
            state: ClusterState::new(),
            replica,
            now: 10_000,
            index: 0,
            session: 0,
            orders: Vec::new(),
            ended: Vec::new(),
            changes: Vec::new(),
            transfers: Vec::new(),
            proposed: Vec::new(),
            refuses: false,
            conflicts: false,
            mute: false,
        };
        bench.apply(Command::Found { name: "c1".to_owned() }).unwrap();
        for worker in 1..=workers {
            bench.enrol(worker, Role::Worker);
        }
        bench
            .apply(Command::RegisterModel(Model {
                name: "tiny".to_owned(),
                digest: "abc123".to_owned(),
                spec,
            }))
            .unwrap();
        bench
            .apply(Command::Deploy(Deployment {
                name: "tiny".to_owned(),
                digest: "abc123".to_owned(),
                compute: ComputeType::F32,
                experts: planner::ExpertCut::Stripe,
                stripes: Some(8),
                ranks,
                replicas: 1,
                nodes: BTreeSet::new(),
                kv_blocks: 16,
                block_tokens: 16,
                max_sequences: 4,
                step_tokens: 64,
                context: 128,
            }))
            .unwrap();
        bench.input(Input::Lead);
        bench
    }

    fn enrol(&mut self, token: u8, role: Role) {
        self.apply(Command::Enrol {
            token: TokenId([token; 16]),
            uses_max: 1,
            expires: 1_000,
            now: 1,
            role,
            name: format!("n{token}"),
        })
        .unwrap();
    }

    /// So many nodes are wished to be coordinators; all have numbers.
    fn coordinators(&mut self, count: u64) {
        for node in 1..=count {
            let at = Coordinator {
                cluster_address: format!("host-{node}:8100"),
                http_address: format!("host-{node}:8000"),
                model_digests: BTreeSet::new(),
            };
            self.apply(Command::SetCoordinator { node: NodeId(node), at }).unwrap();
        }
    }

    fn apply(&mut self, command: Command) -> Result<Vec<Event>, Rejected> {
        self.index += 1;
        let result = self.state.apply(self.index, command);
        self.state.check_integrity().unwrap();
        result
    }

    /// One input; what it leads to is done, and what that leads to.
    fn input(&mut self, input: Input) {
        let mut queue = std::collections::VecDeque::from([input]);
        while let Some(input) = queue.pop_front() {
            let sight = Sight { now: self.now, cluster: &self.state, replica: &self.replica };
            for output in self.leader.handle(sight, input) {
                match output {
                    Output::Propose { number, command } => {
                        self.proposed.push(command.clone());
                        assert!(self.proposed.len() < 1_000, "it proposes without end");
                        if self.refuses {
                            queue.push_back(Input::Decided { number, outcome: None });
                            continue;
                        }
                        let plan = matches!(command, Command::Place { .. });
                        let outcome = match self.conflicts && plan {
                            true => Err(Rejected::GroupGone { group: GroupId(1) }),
                            false => self.apply(command),
                        };
                        if let Ok(events) = &outcome {
                            queue.push_back(Input::Changed { events: events.clone() });
                        }
                        queue.push_back(Input::Decided { number, outcome: Some(outcome) });
                    }
                    Output::Change { number, change } => self.changes.push((number, change)),
                    Output::Transfer { to } => self.transfers.push(to),
                    Output::Order { session, order } => {
                        if let Order::Prepare(form) = &order
                            && !self.mute
                        {
                            let (group, epoch, error) = (form.group, form.epoch, None);
                            let report = Report::Prepared { group, epoch, error };
                            queue.push_back(Input::Report { session, report });
                        }
                        self.orders.push((session, order));
                    }
                    Output::Refuse { session, .. } | Output::End { session, .. } => {
                        self.ended.push(session);
                    }
                }
            }
        }
    }

    fn wait(&mut self, milliseconds: u64) {
        self.now += milliseconds;
        self.input(Input::Tick);
    }

    /// Worker `number` opens a session, holding this.
    fn open(&mut self, number: u64, held: Vec<Held>) -> SessionId {
        self.session += 1;
        let session = SessionId(self.session);
        let info = NodeInfo {
            boot: number,
            name: format!("w{number}"),
            worker_address: format!("host-{number}:9000"),
            collective_addresses: vec![format!("host-{number}:9100")],
            devices: vec![DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 }],
            model_digests: BTreeSet::from(["abc123".to_owned()]),
            kernel_class: "avx2".to_owned(),
            version: "0.0.0".to_owned(),
        };
        self.input(Input::Open { session, node: NodeId(number + 1), info, held });
        session
    }

    fn report(&mut self, session: SessionId, report: Report) {
        self.input(Input::Report { session, report });
    }

    /// Orders to a session since the last look, without the answers to heartbeats.
    fn take(&mut self, session: SessionId) -> Vec<Order> {
        let (mine, rest) =
            std::mem::take(&mut self.orders).into_iter().partition(|o| o.0 == session);
        self.orders = rest;
        let mine: Vec<(SessionId, Order)> = mine;
        mine.into_iter().map(|(_, order)| order).filter(|order| *order != Order::Lease).collect()
    }

    /// The group, its epoch and phase.
    fn group(&self) -> (GroupId, Epoch, Phase) {
        let (&id, group) = self.state.groups().iter().next_back().unwrap();
        (id, group.epoch, group.phase)
    }

    /// By rank of the newest group: its node, and how many stripes it holds.
    fn holders(&self) -> Vec<(u64, usize)> {
        let (_, group) = self.state.groups().iter().next_back().unwrap();
        group.plan.ranks.iter().map(|rank| (rank.node.0, rank.stripes.len())).collect()
    }

    fn standing(&self, number: u64) -> Standing {
        self.state.nodes()[&NodeId(number + 1)].standing
    }

    /// Two workers whose group serves.
    fn serving() -> (Self, [SessionId; 2], GroupId, Epoch) {
        let mut bench = Self::new(2, 2);
        let sessions = [bench.open(1, Vec::new()), bench.open(2, Vec::new())];
        let (group, epoch, _) = bench.group();
        for (rank, session) in sessions.into_iter().enumerate() {
            bench.report(session, Report::Ready { group, epoch, rank });
        }
        assert_eq!(bench.group().2, Phase::Serving);
        sessions.iter().for_each(|&session| drop(bench.take(session)));
        (bench, sessions, group, epoch)
    }
}

/// A peer that is there.
fn peer(matched: u64, voter: bool) -> PeerProgress {
    PeerProgress {
        matched,
        recent_active: true,
        answers: true,
        full: false,
        snapshot: false,
        voter,
    }
}

fn formed(orders: &[Order]) -> bool {
    orders.iter().any(|order| matches!(order, Order::Form(_)))
}

fn retired(orders: &[Order]) -> bool {
    orders.iter().any(|order| matches!(order, Order::Retire { .. }))
}

#[test]
fn workers_come_and_are_told_what_to_hold() {
    let mut bench = Bench::new(2, 2);
    let first = bench.open(1, Vec::new());
    let orders = bench.take(first);
    assert!(
        matches!(orders[..], [Order::Welcome { node: NodeId(2), heartbeat_ms: 100, .. }]),
        "{orders:?}"
    );
    let second = bench.open(2, Vec::new());
    assert!(formed(&bench.take(first)) && formed(&bench.take(second)));
    let (group, epoch, phase) = bench.group();
    assert_eq!(phase, Phase::Forming);
    bench.report(first, Report::Progress { group, epoch, rank: 0, bytes_read: 1, bytes_total: 2 });
    assert_eq!(bench.group().2, Phase::Loading);
    assert_eq!(bench.leader.progress()[&(group, 0)], (1, 2));
    // A report about a rank that is another's changes nothing.
    bench.report(first, Report::Ready { group, epoch, rank: 1 });
    bench.report(first, Report::Ready { group, epoch, rank: 0 });
    assert_eq!(bench.group().2, Phase::Loading);
    bench.report(second, Report::Ready { group, epoch, rank: 1 });
    assert_eq!(bench.group().2, Phase::Serving);
}

#[test]
fn silence_makes_a_worker_suspect_and_then_lost() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    for _ in 0..4 {
        bench.wait(100);
        bench.report(first, Report::Heartbeat(Vec::new()));
    }
    bench.wait(100);
    assert_eq!((bench.standing(1), bench.standing(2)), (Standing::Ready, Standing::Suspect));
    bench.report(second, Report::Heartbeat(Vec::new()));
    assert_eq!(bench.standing(2), Standing::Ready);
    // Silent for longer, it is fenced: the other one does its part from now on.
    for _ in 0..10 {
        bench.report(first, Report::Heartbeat(Vec::new()));
        bench.wait(100);
    }
    assert_eq!(bench.standing(2), Standing::Suspect);
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_eq!(bench.holders(), [(2, 8)]);
    let orders = bench.take(first);
    assert!(retired(&orders) && formed(&orders), "{orders:?}");
    for _ in 0..20 {
        bench.report(first, Report::Heartbeat(Vec::new()));
        bench.wait(100);
    }
    assert_eq!(bench.standing(2), Standing::Lost);
    assert_eq!(bench.ended, [second]);
}

#[test]
fn a_heartbeat_of_an_epoch_that_is_over_is_counted_and_answered() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    for beat in [vec![(group, epoch)], Vec::new(), vec![(group, epoch.next())]] {
        bench.report(first, Report::Heartbeat(beat));
        assert!(!retired(&bench.take(first)), "it says what is so, or what is not known here yet");
    }
    assert_eq!(bench.leader.stale_reports(), 0);
    let failed = "a link broke".to_owned();
    bench.report(second, Report::Failed { group, epoch, rank: 1, reason: failed, blames: None });
    bench.take(first);
    for over in [(group, epoch), (GroupId(99), epoch)] {
        let before = bench.leader.stale_reports();
        bench.report(first, Report::Heartbeat(vec![over]));
        let told = bench.take(first).into_iter().any(|order| match order {
            Order::Retire { group, epoch, .. } => (group, epoch) == over,
            _ => false,
        });
        assert!(told, "{over:?}");
        assert_eq!(bench.leader.stale_reports(), before + 1);
    }
    let before = bench.leader.stale_reports();
    bench.report(first, Report::Ready { group, epoch, rank: 0 });
    assert_eq!(bench.leader.stale_reports(), before + 1);
}

#[test]
fn a_lone_worker_that_is_silent_is_waited_for() {
    let mut bench = Bench::new(1, 1);
    let session = bench.open(1, Vec::new());
    let (group, epoch, _) = bench.group();
    bench.report(session, Report::Ready { group, epoch, rank: 0 });
    bench.wait(500);
    bench.wait(2_000);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving), "nobody could do better");
    bench.report(session, Report::Heartbeat(Vec::new()));
    assert_eq!(bench.standing(1), Standing::Ready);
}

#[test]
fn stripes_of_a_dead_worker_go_to_those_that_stay_and_come_back() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    assert_eq!(bench.holders(), [(2, 4), (3, 4)]);
    bench.input(Input::Closed { session: second, left: false });
    let reason = "rank 1 closed its link".to_owned();
    let failed = Report::Failed { group, epoch, rank: 0, reason, blames: Some(1) };
    bench.report(first, failed);
    // It is known why, so nothing is waited for.
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_eq!(bench.holders(), [(2, 8)]);
    let (_, now, _) = bench.group();
    bench.report(first, Report::Ready { group, epoch: now, rank: 0 });
    // Another process of that node; it is taken in once the group has served for a while.
    bench.wait(400);
    assert_eq!(bench.standing(2), Standing::Lost);
    let again = bench.open(2, Vec::new());
    for _ in 0..40 {
        bench.wait(100);
        bench.report(first, Report::Heartbeat(Vec::new()));
        bench.report(again, Report::Heartbeat(Vec::new()));
        assert_eq!(bench.group(), (group, now, Phase::Serving));
    }
    for _ in 0..10 {
        bench.wait(100);
        bench.report(first, Report::Heartbeat(Vec::new()));
        bench.report(again, Report::Heartbeat(Vec::new()));
    }
    assert_eq!(bench.group(), (group, now.next(), Phase::Forming));
    assert_eq!(bench.holders(), [(2, 4), (3, 4)]);
}

#[test]
fn who_is_blamed_is_left_out_for_a_while() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    let reason = "rank 0 does not answer".to_owned();
    let failed = Report::Failed { group, epoch, rank: 1, reason, blames: Some(0) };
    bench.report(second, failed);
    // Both are there, and nobody waits: the one that was blamed has no part in it.
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_eq!(bench.holders(), [(3, 8)], "without the one that was blamed");
    let (_, epoch, _) = bench.group();
    bench.report(second, Report::Ready { group, epoch, rank: 0 });
    // When the narrow group has served for its while, the blame still stands; then it is over.
    let served = narrow_for(&mut bench, [first, second]);
    assert!((9_900..=10_100).contains(&served), "taken in again after {served} ms");
}

/// How long the group serves with one rank, in milliseconds.
fn narrow_for(bench: &mut Bench, sessions: [SessionId; 2]) -> u64 {
    let mut served = 0;
    while bench.holders().len() == 1 {
        bench.wait(100);
        sessions
            .into_iter()
            .for_each(|session| bench.report(session, Report::Heartbeat(Vec::new())));
        served += 100;
    }
    served
}

/// The way between two nodes is cut, and each of them is there.
#[test]
fn a_group_that_cannot_form_with_another_tries_ever_more_rarely() {
    let (mut bench, sessions, group, _) = Bench::serving();
    // The second worker gives up the first, and serves alone for so many seconds.
    let alone = |bench: &mut Bench| {
        let (_, epoch, _) = bench.group();
        let rank = bench.holders().iter().position(|(node, _)| *node == 3).expect("its rank");
        let reason = "the other rank did not answer in time".to_owned();
        let blames = Some(1 - rank);
        bench.report(sessions[1], Report::Failed { group, epoch, rank, reason, blames });
        let (_, epoch, _) = bench.group();
        bench.report(sessions[1], Report::Ready { group, epoch, rank: 0 });
        assert_eq!(bench.group(), (group, epoch, Phase::Serving));
        narrow_for(bench, sessions) / 1_000
    };
    // Blame alone lasts for ten seconds; at the first failure the group served.
    let waited = [0; 5].map(|_| alone(&mut bench));
    assert_eq!(waited, [10, 10, 20, 40, 80]);
    // Once it has formed that is forgotten.
    let (_, epoch, _) = bench.group();
    for (rank, (node, _)) in bench.holders().into_iter().enumerate() {
        let session = sessions[usize::from(node == 3)];
        bench.report(session, Report::Ready { group, epoch, rank });
    }
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    assert_eq!(alone(&mut bench), 10);
}

#[test]
fn a_group_whose_workers_are_all_gone_waits_for_all_of_them() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    for session in [first, second] {
        bench.input(Input::Closed { session, left: false });
    }
    bench.wait(300);
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Repairing));
    let first = bench.open(1, Vec::new());
    assert_eq!(bench.group().2, Phase::Repairing, "the other one may be on its way");
    bench.open(2, Vec::new());
    assert_eq!(bench.group().2, Phase::Forming);
    assert_eq!(bench.holders(), [(2, 4), (3, 4)]);
    let _ = first;
}

#[test]
fn a_broken_session_is_suspect_at_once_and_may_resume() {
    let (mut bench, [first, _], group, epoch) = Bench::serving();
    bench.input(Input::Closed { session: first, left: false });
    assert_eq!(bench.standing(1), Standing::Suspect);
    bench.wait(200);
    let held = Held { group, epoch, rank: 0, ready: true };
    let again = bench.open(1, vec![held]);
    assert_eq!(bench.standing(1), Standing::Ready);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    let orders = bench.take(again);
    assert!(matches!(orders[..], [Order::Welcome { .. }]), "{orders:?}");
    // A process that ended does not come back.
    bench.input(Input::Closed { session: again, left: false });
    bench.wait(300);
    assert_eq!(bench.standing(1), Standing::Lost);
}

#[test]
fn a_goodbye_is_not_waited_upon() {
    let (mut bench, [first, _], ..) = Bench::serving();
    bench.input(Input::Closed { session: first, left: true });
    assert_eq!(bench.standing(1), Standing::Lost);
    // What an old stream still says is nobody's.
    bench.report(first, Report::Heartbeat(Vec::new()));
    assert_eq!(bench.standing(1), Standing::Lost);
}

#[test]
fn a_new_leader_learns_from_workers_what_they_hold() {
    let (mut bench, _, group, epoch) = Bench::serving();
    let before = bench.proposed.len();
    bench.input(Input::Follow);
    bench.leader = Leader::new(TIMING, 1_000);
    bench.input(Input::Lead);
    bench.wait(400);
    assert_eq!(bench.proposed.len(), before, "nobody is blamed for not having come yet");
    let stale = Held { group, epoch: Epoch(epoch.0 + 5), rank: 0, ready: true };
    let held = Held { group, epoch, rank: 0, ready: true };
    let first = bench.open(1, vec![held, stale]);
    let orders = bench.take(first);
    assert!(retired(&orders) && !formed(&orders), "{orders:?}");
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    // The other one has lost what the state says it has.
    let second = bench.open(2, Vec::new());
    let (_, next, phase) = bench.group();
    assert_eq!((next, phase), (epoch.next(), Phase::Forming));
    assert!(formed(&bench.take(first)) && formed(&bench.take(second)));
}

#[test]
fn a_new_leader_gives_workers_up_that_do_not_come() {
    let (mut bench, ..) = Bench::serving();
    bench.input(Input::Follow);
    bench.input(Input::Lead);
    bench.wait(2_900);
    assert_ne!(bench.standing(1), Standing::Lost);
    bench.wait(200);
    assert_eq!((bench.standing(1), bench.standing(2)), (Standing::Lost, Standing::Lost));
}

#[test]
fn an_order_that_was_missed_is_given_again() {
    let mut bench = Bench::new(2, 2);
    bench.open(1, Vec::new());
    let second = bench.open(2, Vec::new());
    let (group, epoch, _) = bench.group();
    bench.input(Input::Closed { session: second, left: false });
    let again = bench.open(2, Vec::new());
    assert!(formed(&bench.take(again)));
    assert_eq!(bench.group(), (group, epoch, Phase::Forming));
}

#[test]
fn failures_pause_placement_longer_each_time_until_a_group_serves_for_long() {
    let mut bench = Bench::new(1, 1);
    let session = bench.open(1, Vec::new());
    let fail = |bench: &mut Bench| {
        let (group, epoch, _) = bench.group();
        let reason = "broken".to_owned();
        bench.report(session, Report::Failed { group, epoch, rank: 0, reason, blames: None });
        assert_eq!(bench.group().2, Phase::Repairing, "placed within the pause");
        let mut waited = 0;
        while bench.group().2 == Phase::Repairing {
            bench.report(session, Report::Heartbeat(Vec::new()));
            bench.wait(50);
            waited += 50;
        }
        waited
    };
    let pauses: Vec<u64> = (0..9).map(|_| fail(&mut bench)).collect();
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    let (group, epoch, _) = bench.group();
    bench.report(session, Report::Ready { group, epoch, rank: 0 });
    // It fails as soon as it serves: nothing has changed.
    assert_eq!(fail(&mut bench), 30_000);
    let (group, epoch, _) = bench.group();
    bench.report(session, Report::Ready { group, epoch, rank: 0 });
    for _ in 0..700 {
        bench.report(session, Report::Heartbeat(Vec::new()));
        bench.wait(50);
    }
    assert_eq!(fail(&mut bench), 250);
}

#[test]
fn what_a_worker_says_before_its_join_is_decided_is_not_lost() {
    let (mut bench, [first, _], group, epoch) = Bench::serving();
    bench.input(Input::Closed { session: first, left: false });
    // Its join waits for the log while its lease runs out.
    let session = SessionId(99);
    let held = vec![Held { group, epoch, rank: 0, ready: true }];
    // It was made anew meanwhile, so that there is something to decide.
    let info = bench.state.nodes()[&NodeId(2)].info.clone().unwrap();
    let info = NodeInfo { version: "0.0.1".to_owned(), ..info };
    let open = Input::Open { session, node: NodeId(2), info: info.clone(), held };
    let sight = Sight { now: bench.now, cluster: &bench.state, replica: &bench.replica };
    let waiting = bench.leader.handle(sight, open);
    let joins = |output: &Output| match output {
        Output::Propose { number, command: Command::Join { .. } } => Some(*number),
        _ => None,
    };
    let number = waiting.iter().find_map(joins).unwrap();
    let reason = "its lease ran out".to_owned();
    bench.report(session, Report::Failed { group, epoch, rank: 0, reason, blames: None });
    let events = bench.apply(Command::Join { node: NodeId(2), info });
    bench.input(Input::Decided { number, outcome: Some(events) });
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
}

#[test]
fn what_the_log_does_not_take_waits_and_is_not_forgotten() {
    let mut bench = Bench::new(2, 2);
    let [first, second] = [bench.open(1, Vec::new()), bench.open(2, Vec::new())];
    let (group, epoch, _) = bench.group();
    bench.refuses = true;
    bench.proposed.clear();
    bench.report(first, Report::Ready { group, epoch, rank: 0 });
    bench.report(second, Report::Ready { group, epoch, rank: 1 });
    bench.report(second, Report::Ready { group, epoch, rank: 1 });
    // Nothing more in the same instant, and not at every tick.
    assert_eq!(bench.proposed.len(), 1);
    bench.wait(10);
    assert_eq!(bench.proposed.len(), 1);
    bench.wait(40);
    assert_eq!(bench.proposed.len(), 3);
    bench.refuses = false;
    bench.wait(50);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    // A leader that fell forgets what it wanted.
    bench.refuses = true;
    bench.report(
        first,
        Report::Failed { group, epoch, rank: 0, reason: "it fell".to_owned(), blames: None },
    );
    bench.input(Input::Follow);
    bench.refuses = false;
    bench.input(Input::Lead);
    bench.wait(50);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
}

#[test]
fn a_worker_that_the_state_has_comes_back_though_the_log_takes_nothing() {
    let (mut bench, [first, _], group, epoch) = Bench::serving();
    bench.refuses = true;
    bench.input(Input::Closed { session: first, left: false });
    let held = vec![Held { group, epoch, rank: 0, ready: true }];
    let again = bench.open(1, held);
    let orders = bench.take(again);
    assert!(matches!(orders[..], [Order::Welcome { .. }]), "{orders:?}");
    assert_eq!((bench.ended.clone(), bench.group()), (vec![], (group, epoch, Phase::Serving)));
}

#[test]
fn a_second_process_with_one_certificate_is_turned_away_while_the_first_is_heard() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    let twin = |bench: &mut Bench, boot: u64| {
        bench.session += 1;
        let session = SessionId(bench.session);
        let info = bench.state.nodes()[&NodeId(2)].info.clone().unwrap();
        let info = NodeInfo { boot, ..info };
        bench.input(Input::Open { session, node: NodeId(2), info, held: Vec::new() });
        session
    };
    let other = twin(&mut bench, 77);
    assert_eq!((bench.ended.pop(), bench.take(other)), (Some(other), Vec::new()));
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    // The first is silent: this is its next life.
    for _ in 0..5 {
        bench.report(second, Report::Heartbeat(Vec::new()));
        bench.wait(100);
    }
    let next = twin(&mut bench, 78);
    assert!(matches!(bench.take(next)[0], Order::Welcome { .. }));
    assert_eq!(bench.ended, [first]);
}

#[test]
fn a_worker_whose_process_died_is_not_waited_for() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    bench.input(Input::Closed { session: first, left: false });
    assert_eq!(bench.group(), (group, epoch, Phase::Serving), "it may come back");
    let held = vec![Held { group, epoch, rank: 0, ready: true }];
    let first = bench.open(1, held);
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    bench.input(Input::Died { session: first });
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Forming));
    assert_eq!(bench.holders(), [(3, 8)]);
    // Nor is one in the middle of forming, where nobody waits for it in a collective.
    bench.open(1, Vec::new());
    bench.input(Input::Died { session: second });
    let (_, now, _) = bench.group();
    assert!(now > epoch.next(), "the next incarnation waits for a process that is gone");
    // Who is there is enough: the one that went is not being restarted with it.
    assert_eq!(bench.group().2, Phase::Forming);
    assert_eq!(bench.holders(), [(2, 8)]);
}

#[test]
fn a_lone_worker_whose_process_died_is_lost_in_its_time() {
    let mut bench = Bench::new(1, 1);
    let session = bench.open(1, Vec::new());
    let (group, epoch, _) = bench.group();
    bench.report(session, Report::Ready { group, epoch, rank: 0 });
    bench.input(Input::Died { session });
    assert_eq!(bench.group(), (group, epoch, Phase::Serving));
    bench.wait(300);
    assert_eq!(bench.group(), (group, epoch.next(), Phase::Repairing));
}

#[test]
fn a_new_process_is_not_blamed_for_the_one_before() {
    let (mut bench, [first, second], group, epoch) = Bench::serving();
    let reason = "rank 1 closed its link".to_owned();
    let failed = Report::Failed { group, epoch, rank: 0, reason, blames: Some(1) };
    bench.report(first, failed);
    assert_eq!(bench.holders(), [(2, 8)], "without the one at fault, and at once");
    let (_, epoch, _) = bench.group();
    bench.report(first, Report::Ready { group, epoch, rank: 0 });
    // It served for long enough, and the other one is a new process.
    bench.input(Input::Closed { session: second, left: true });
    bench.open(2, Vec::new());
    for _ in 0..51 {
        bench.report(first, Report::Heartbeat(Vec::new()));
        bench.report(SessionId(bench.session), Report::Heartbeat(Vec::new()));
        bench.wait(100);
    }
    assert_eq!(bench.holders(), [(2, 4), (3, 4)]);
    // What fails by itself, or over everybody, waits.
    let (_, epoch, _) = bench.group();
    let reason = "its thread panicked".to_owned();
    bench.report(first, Report::Failed { group, epoch, rank: 0, reason, blames: None });
    assert_eq!(bench.group().2, Phase::Repairing);
    bench.report(first, Report::Heartbeat(Vec::new()));
    bench.wait(250);
    assert_eq!(bench.group().2, Phase::Forming);
}
