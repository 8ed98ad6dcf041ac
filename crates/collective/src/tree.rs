//! The fixed balanced binary tree over stripe numbers, along which partial sums are added.
//!
//! A node is a run of stripes `lo..hi`. One stripe is a leaf; a longer run splits at
//! `lo + ceil((hi - lo) / 2)`, so for an odd count the left half is the longer one:
//! `0..5 = (0..3 = (0..2 = (0, 1), 2), 3..5 = (3, 4))`. The shape depends on the number of
//! stripes alone. Every sum is `left + right` in f32, per element, and is never reassociated;
//! who computes a node, and when, therefore cannot change a bit of it.

use std::ops::Range;

/// Elements that are taken through the whole tree before the next ones, so that intermediate
/// sums stay in the first-level cache (8 KiB for each level).
const BLOCK: usize = 2048;

/// Where a node of two or more stripes splits.
fn split(node: &Range<usize>) -> usize {
    node.start + node.len().div_ceil(2)
}

/// The largest subtrees of the tree over `stripes` whose leaves all stand in `owned` (any order),
/// by ascending stripe. Together they cover `owned` exactly; numbers beyond the tree are ignored.
pub fn owned_subtrees(stripes: usize, owned: &[usize]) -> Vec<Range<usize>> {
    let mut holds = vec![false; stripes];
    for &stripe in owned {
        if let Some(held) = holds.get_mut(stripe) {
            *held = true;
        }
    }
    let mut found = Vec::new();
    if stripes > 0 {
        collect_owned(0..stripes, &holds, &mut found);
    }
    found
}

fn collect_owned(node: Range<usize>, holds: &[bool], found: &mut Vec<Range<usize>>) {
    if holds[node.clone()].iter().all(|&held| held) {
        found.push(node);
    } else if node.len() > 1 {
        let middle = split(&node);
        collect_owned(node.start..middle, holds, found);
        collect_owned(middle..node.end, holds, found);
    }
}

/// The part of the tree above a set of nodes whose sums are already known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SumTree {
    root: Node,
    depth: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Input(usize),
    Sum(Box<Node>, Box<Node>),
}

impl Node {
    /// The node for a run of stripes, marking the inputs it uses.
    fn build(run: Range<usize>, inputs: &[Range<usize>], used: &mut [bool]) -> Option<Node> {
        if let Some(index) = inputs.iter().position(|input| *input == run) {
            used[index] = true;
            return Some(Node::Input(index));
        }
        if run.len() < 2 {
            return None;
        }
        let middle = split(&run);
        let left = Node::build(run.start..middle, inputs, used)?;
        let right = Node::build(middle..run.end, inputs, used)?;
        Some(Node::Sum(Box::new(left), Box::new(right)))
    }

    fn depth(&self) -> usize {
        match self {
            Node::Input(_) => 0,
            Node::Sum(left, right) => 1 + left.depth().max(right.depth()),
        }
    }

    /// `out = ` this node's sum over the elements `at`. `scratch` holds `depth` blocks.
    fn evaluate<'a>(
        &self,
        inputs: &dyn Fn(usize) -> &'a [f32],
        at: &Range<usize>,
        out: &mut [f32],
        scratch: &mut [f32],
    ) {
        match self {
            Node::Input(index) => out.copy_from_slice(&inputs(*index)[at.clone()]),
            Node::Sum(left, right) => {
                left.evaluate(inputs, at, out, scratch);
                if let Node::Input(index) = **right {
                    add(out, &inputs(index)[at.clone()]);
                } else {
                    let (sum, rest) = scratch.split_at_mut(out.len());
                    right.evaluate(inputs, at, sum, rest);
                    add(out, sum);
                }
            }
        }
    }
}

impl SumTree {
    /// The tree of the run `root`, with `inputs` as its known nodes. `None` unless every input is
    /// a node of that tree and every leaf lies under exactly one of them.
    ///
    /// `root` must itself be a node of the tree over all stripes for the sums to be that tree's.
    pub fn over(root: Range<usize>, inputs: &[Range<usize>]) -> Option<Self> {
        let mut used = vec![false; inputs.len()];
        let root = Node::build(root, inputs, &mut used)?;
        let depth = root.depth();
        used.into_iter().all(|used| used).then_some(Self { root, depth })
    }

    /// The tree of the run `root` over its single stripes.
    pub fn over_leaves(root: Range<usize>) -> Option<Self> {
        let leaves: Vec<_> = root.clone().map(|stripe| stripe..stripe + 1).collect();
        Self::over(root, &leaves)
    }

    /// `out[e] = ` the sum along the tree of `inputs(i)[e]`, where `i` counts the inputs given to
    /// [`SumTree::over`]. Every input is at least as long as `out`. `scratch` is reused memory.
    pub fn sum<'a>(
        &self,
        inputs: &dyn Fn(usize) -> &'a [f32],
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        self.sum_from(0, inputs, out, scratch);
    }

    /// The same of the elements from `first` on: `out[e]` is the sum of `inputs(i)[first + e]`.
    pub(crate) fn sum_from<'a>(
        &self,
        first: usize,
        inputs: &dyn Fn(usize) -> &'a [f32],
        out: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let needed = self.depth * BLOCK.min(out.len());
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        for (block, part) in out.chunks_mut(BLOCK).enumerate() {
            let start = first + block * BLOCK;
            let at = start..start + part.len();
            self.root.evaluate(inputs, &at, part, scratch);
        }
    }
}

fn add(sum: &mut [f32], right: &[f32]) {
    for (left, right) in sum.iter_mut().zip(right) {
        *left += right;
    }
}

/// `out[e] = ` the sum over all stripes, in tree order, of `leaves[s * out.len() + e]`.
///
/// What one rank that holds everything computes; the measure of all other ways. `false`, and
/// `out` untouched, where `leaves` is not a whole number of stripes or empty.
pub fn sum_tree(stripes: usize, leaves: &[f32], out: &mut [f32]) -> bool {
    let elements = out.len();
    if stripes.checked_mul(elements) != Some(leaves.len()) {
        return false;
    }
    let Some(tree) = SumTree::over_leaves(0..stripes) else { return false };
    let leaf = |stripe: usize| &leaves[stripe * elements..(stripe + 1) * elements];
    tree.sum(&leaf, out, &mut Vec::new());
    true
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs are meant")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn odd_runs_are_longer_on_the_left() {
        assert_eq!(split(&(0..8)), 4);
        assert_eq!(split(&(0..5)), 3);
        assert_eq!(split(&(4..7)), 6);
        assert_eq!(split(&(3..5)), 4);
    }

    #[test]
    fn owned_subtrees_are_maximal() {
        assert_eq!(owned_subtrees(8, &[0, 1, 2]), [0..2, 2..3]);
        assert_eq!(owned_subtrees(8, &[3, 4, 5]), [3..4, 4..6]);
        assert_eq!(owned_subtrees(8, &[5, 0, 7, 4, 6, 1]), [0..2, 4..8]);
        assert_eq!(owned_subtrees(8, &[1, 2]), [1..2, 2..3]);
        assert_eq!(owned_subtrees(5, &[0, 1, 2]), [0..3]);
        assert_eq!(owned_subtrees(7, &[0, 1, 2, 3, 4, 5, 6]), [0..7]);
        assert_eq!(owned_subtrees(3, &[]), []);
        assert_eq!(owned_subtrees(2, &[1, 9]), [1..2]);
        assert_eq!(owned_subtrees(0, &[]), []);
    }

    #[test]
    fn five_leaves_are_added_as_documented() {
        let leaves = [1.0e8, 0.0, 3.0, 5.0, 5.0_f32];
        let mut out = [0.0];
        assert!(sum_tree(5, &leaves, &mut out));
        let [a, b, c, d, e] = leaves;
        assert_eq!(out[0].to_bits(), (((a + b) + c) + (d + e)).to_bits());
        // The same five from left to right are another number, so the order is really tested.
        assert_ne!(out[0].to_bits(), ((((a + b) + c) + d) + e).to_bits());
        // And so are they with the shorter half on the left.
        assert_ne!(out[0].to_bits(), ((a + b) + (c + (d + e))).to_bits());
    }

    #[test]
    fn another_order_gives_other_bits() {
        for stripes in [4, 5, 6, 7, 8, 16] {
            // Each 3 alone is lost beside 1e8, whose neighbours are 8 away; two together are not.
            let leaves: Vec<f32> = (0..stripes).map(|s| if s == 0 { 1.0e8 } else { 3.0 }).collect();
            let mut out = [0.0];
            assert!(sum_tree(stripes, &leaves, &mut out));
            let in_a_row = leaves.iter().copied().reduce(|sum, leaf| sum + leaf);
            assert_ne!(in_a_row.map(f32::to_bits), Some(out[0].to_bits()), "{stripes} stripes");
        }
    }

    #[test]
    fn a_single_negative_zero_survives() {
        let mut out = [1.0];
        assert!(sum_tree(1, &[-0.0], &mut out));
        assert_eq!(out[0].to_bits(), (-0.0_f32).to_bits());
    }

    #[test]
    fn inputs_must_be_nodes_that_cover_the_run_once() {
        assert!(SumTree::over(0..8, &[0..4, 4..8]).is_some());
        assert!(SumTree::over(0..8, &[4..8, 0..2, 2..4]).is_some());
        for wrong in [vec![0..4], vec![0..3, 3..8], vec![0..4, 4..8, 4..6], vec![0..4, 0..4, 4..8]]
        {
            assert_eq!(SumTree::over(0..8, &wrong), None, "{wrong:?}");
        }
        assert_eq!(SumTree::over(0..0, &[]), None);
        let mut out = [0.0; 2];
        assert!(!sum_tree(2, &[0.0; 3], &mut out));
        assert!(!sum_tree(0, &[], &mut []));
    }

    /// Finite values of all sizes, both zeros, subnormals and infinities; no NaN, whose payload
    /// the language does not fix.
    fn value() -> impl Strategy<Value = f32> {
        prop_oneof![
            8 => any::<u32>().prop_map(f32::from_bits).prop_filter("no NaN", |v| !v.is_nan()),
            8 => -4.0_f32..4.0,
            1 => Just(-0.0),
            1 => Just(0.0),
            1 => Just(f32::INFINITY),
            1 => Just(f32::NEG_INFINITY),
            1 => (1_u32..0x0080_0000).prop_map(f32::from_bits),
        ]
    }

    /// Stripes, the owner of each, element count, values.
    fn case() -> impl Strategy<Value = (usize, Vec<usize>, usize, Vec<f32>)> {
        (1_usize..=16, 1_usize..6).prop_flat_map(|(stripes, elements)| {
            (
                Just(stripes),
                (1..=stripes).prop_flat_map(move |ranks| prop::collection::vec(0..ranks, stripes)),
                Just(elements),
                prop::collection::vec(value(), stripes * elements),
            )
        })
    }

    proptest! {
        #[test]
        fn any_partition_gives_the_same_bits((stripes, owner, elements, leaves) in case()) {
            let mut whole = vec![0.0; elements];
            prop_assert!(sum_tree(stripes, &leaves, &mut whole));

            let leaf = |s: usize| &leaves[s * elements..(s + 1) * elements];
            let mut ranges = Vec::new();
            let mut sums: Vec<Vec<f32>> = Vec::new();
            for rank in 0..=owner.iter().copied().max().unwrap_or(0) {
                let owned: Vec<_> = (0..stripes).filter(|&s| owner[s] == rank).collect();
                let subtrees = owned_subtrees(stripes, &owned);
                let covered: Vec<_> = subtrees.iter().cloned().flatten().collect();
                prop_assert_eq!(covered, owned);
                for subtree in subtrees {
                    let tree = SumTree::over_leaves(subtree.clone()).expect("a node");
                    let mut sum = vec![0.0; elements];
                    let input = |i: usize| leaf(subtree.start + i);
                    tree.sum(&input, &mut sum, &mut Vec::new());
                    ranges.push(subtree);
                    sums.push(sum);
                }
            }
            let top = SumTree::over(0..stripes, &ranges).expect("a partition");
            let mut out = vec![0.0; elements];
            top.sum(&|i| sums[i].as_slice(), &mut out, &mut Vec::new());
            prop_assert_eq!(bits(&out), bits(&whole));
        }

        #[test]
        fn blocks_do_not_show(stripes in 1_usize..9, extra in 0_usize..5, seed in any::<u32>()) {
            let elements = BLOCK - 2 + extra;
            let mut state = seed | 1;
            let leaves: Vec<f32> = (0..stripes * elements).map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as f32 / 1.0e9 - 2.0
            }).collect();
            let mut out = vec![0.0; elements];
            prop_assert!(sum_tree(stripes, &leaves, &mut out));
            for element in [0, elements / 2, elements - 1] {
                let column: Vec<f32> =
                    (0..stripes).map(|s| leaves[s * elements + element]).collect();
                let mut one = [0.0];
                prop_assert!(sum_tree(stripes, &column, &mut one));
                prop_assert_eq!(one[0].to_bits(), out[element].to_bits());
            }
        }
    }
}
