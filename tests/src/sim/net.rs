//! The network between nodes: what is lost, late, doubled, out of order or cut off.

use std::collections::{BTreeMap, BTreeSet};

use super::rng::Rng;

/// How a network treats messages. Times are microseconds, chances per mille.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Chance that a message is lost.
    pub lose: u64,
    /// Chance that a message arrives twice.
    pub double: u64,
    /// Chance that a message comes with a damaged or forged twin.
    pub forge: u64,
    /// Shortest way.
    pub shortest: u64,
    /// Added at most to an ordinary way.
    pub jitter: u64,
    /// Chance of a way that is longer by up to `detour`.
    pub detours: u64,
    /// Added at most to such a way.
    pub detour: u64,
    /// Whether messages of one sender to one receiver keep their order, as on one connection.
    pub ordered: bool,
}

impl NetConfig {
    /// A network in order, for the time after the faults.
    pub fn calm() -> Self {
        Self {
            lose: 0,
            double: 0,
            forge: 0,
            shortest: 200,
            jitter: 800,
            detours: 0,
            detour: 0,
            ordered: true,
        }
    }

    /// One of many.
    pub fn draw(rng: &mut Rng) -> Self {
        let bad = rng.chance(500);
        Self {
            lose: if bad { rng.below(120) } else { rng.below(5) },
            double: if rng.chance(400) { rng.below(100) } else { 0 },
            forge: if rng.chance(300) { rng.below(20) } else { 0 },
            shortest: rng.range(50, 2_000),
            jitter: rng.range(50, 8_000),
            detours: if bad { rng.below(80) } else { 0 },
            detour: rng.range(10_000, 600_000),
            ordered: rng.chance(500),
        }
    }
}

/// How nodes are cut off from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Two camps that hear nothing of each other.
    Camps,
    /// Two camps, one of which is still heard by the other.
    OneWay,
    /// Two camps and one node that talks with both.
    Bridge,
    /// One node alone.
    Alone,
    /// Each way of each pair by lot.
    Lots,
}

/// The network's state.
#[derive(Debug)]
pub struct Network {
    /// How it treats messages.
    pub config: NetConfig,
    /// Ways (from, to) on which everything is lost.
    cut: BTreeSet<(u64, u64)>,
    /// Nodes whose messages, in and out, wait until this time.
    clogged: BTreeMap<u64, u64>,
    /// The last arrival by way, to keep order.
    last: BTreeMap<(u64, u64), u64>,
}

impl Network {
    /// A network without cuts.
    pub fn new(config: NetConfig) -> Self {
        let (cut, clogged, last) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
        Self { config, cut, clogged, last }
    }

    /// The times at which a message sent `now` arrives: none when it is lost, two when doubled.
    pub fn arrivals(&mut self, now: u64, from: u64, to: u64, rng: &mut Rng) -> Vec<u64> {
        if self.cut.contains(&(from, to)) || rng.chance(self.config.lose) {
            return Vec::new();
        }
        let copies = 1 + usize::from(rng.chance(self.config.double));
        (0..copies).map(|_| self.arrival(now, from, to, rng)).collect()
    }

    fn arrival(&mut self, now: u64, from: u64, to: u64, rng: &mut Rng) -> u64 {
        let config = &self.config;
        let mut at = now + config.shortest + rng.below(config.jitter + 1);
        if rng.chance(config.detours) {
            at += rng.below(config.detour + 1);
        }
        for end in [from, to] {
            at = at.max(self.clogged.get(&end).copied().unwrap_or(0));
        }
        if config.ordered {
            let last = self.last.entry((from, to)).or_insert(0);
            at = at.max(*last + 1);
            *last = at;
        }
        at
    }

    /// Whether everything from `from` to `to` is lost.
    pub fn is_cut(&self, from: u64, to: u64) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Cuts `nodes` apart. Cuts add up until [`heal`](Self::heal).
    pub fn partition(&mut self, kind: Cut, nodes: &[u64], rng: &mut Rng) {
        let mut order = nodes.to_vec();
        rng.shuffle(&mut order);
        let share = match kind {
            Cut::Alone => 1,
            _ => rng.range(1, (order.len() as u64).saturating_sub(1).max(1)) as usize,
        };
        let bridge = order.last().copied().filter(|_| kind == Cut::Bridge);
        for (i, &a) in order.iter().enumerate() {
            for (j, &b) in order.iter().enumerate() {
                let apart = i < share && j >= share && Some(a) != bridge && Some(b) != bridge;
                let lot = kind == Cut::Lots && i != j && rng.chance(400);
                if lot || (apart && kind != Cut::Lots) {
                    self.cut.insert((a, b));
                    if !matches!(kind, Cut::OneWay | Cut::Lots) {
                        self.cut.insert((b, a));
                    }
                }
            }
        }
    }

    /// Cuts one way.
    pub fn cut(&mut self, from: u64, to: u64) {
        self.cut.insert((from, to));
    }

    /// Holds back what `node` sends and is sent until `until`.
    pub fn clog(&mut self, node: u64, until: u64) {
        let had = self.clogged.entry(node).or_insert(0);
        *had = (*had).max(until);
    }

    /// Ends every cut.
    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// Ends everything: cuts, clogs, loss.
    pub fn calm(&mut self) {
        self.heal();
        self.clogged.clear();
        self.config = NetConfig::calm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(kind: Cut, seed: u64) -> BTreeSet<(u64, u64)> {
        let mut network = Network::new(NetConfig::calm());
        network.partition(kind, &[1, 2, 3, 4, 5], &mut Rng::new(seed, 0));
        network.cut
    }

    #[test]
    fn cuts_have_their_shapes() {
        for seed in 0..50 {
            let both = cuts(Cut::Camps, seed);
            assert!(!both.is_empty() && both.iter().all(|&(a, b)| both.contains(&(b, a))));
            let one = cuts(Cut::OneWay, seed);
            assert!(!one.is_empty() && one.iter().all(|&(a, b)| !one.contains(&(b, a))));
            assert_eq!(cuts(Cut::Alone, seed).len(), 8);
            let bridged = cuts(Cut::Bridge, seed);
            let free = (1..=5).filter(|node| !bridged.iter().any(|(a, _)| a == node)).count();
            assert!(free == 1 || bridged.is_empty(), "{bridged:?}");
        }
    }

    #[test]
    fn an_ordered_way_keeps_order_and_a_clog_holds_back() {
        let mut rng = Rng::new(1, 0);
        let mut config = NetConfig::draw(&mut rng);
        (config.lose, config.double, config.ordered) = (0, 0, true);
        let mut network = Network::new(config);
        network.clog(2, 90_000);
        let arrivals: Vec<u64> =
            (0..200).flat_map(|now| network.arrivals(now * 10, 1, 2, &mut rng)).collect();
        assert_eq!(arrivals.len(), 200);
        assert!(arrivals.is_sorted() && arrivals[0] >= 90_000);
        network.cut(1, 2);
        assert!(network.arrivals(0, 1, 2, &mut rng).is_empty());
        network.calm();
        assert!(network.arrivals(0, 2, 1, &mut rng)[0] < 90_000);
    }
}
