//! How many stripes each rank gets: in proportion to its speed, then as memory allows.

/// Stripes per rank in proportion to `weights` (finite, positive), at least one each, adding up to
/// `stripes >= weights.len()`. What remains after whole shares goes to the largest remainders, on
/// a tie to the lower rank: equal weights give 3, 3, 2.
pub(crate) fn proportional(stripes: usize, weights: &[f64]) -> Vec<usize> {
    // By the largest, so that sums stay finite.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let weights: Vec<f64> = weights.iter().map(|weight| weight / largest).collect();
    // Ranks whose share is under one stripe get one, and the others share the rest.
    let mut minimal = vec![false; weights.len()];
    let quota = loop {
        let (mut total, mut left) = (0.0, stripes);
        for (weight, minimal) in weights.iter().zip(&minimal) {
            if *minimal {
                left -= 1;
            } else {
                total += weight;
            }
        }
        let quota = |rank: usize| left as f64 * weights[rank] / total;
        let small = (0..weights.len()).find(|&rank| !minimal[rank] && quota(rank) < 1.0);
        match small {
            Some(rank) => minimal[rank] = true,
            None => break (0..weights.len()).map(quota).collect::<Vec<f64>>(),
        }
    };
    let mut shares: Vec<usize> = (0..weights.len())
        .map(|rank| if minimal[rank] { 1 } else { quota[rank] as usize })
        .collect();
    let mut order: Vec<usize> = (0..weights.len()).filter(|&rank| !minimal[rank]).collect();
    // A stable sort keeps lower ranks first among equals.
    order.sort_by(|&a, &b| quota[b].fract().total_cmp(&quota[a].fract()));
    let missing = stripes.saturating_sub(shares.iter().sum());
    for &rank in order.iter().cycle().take(missing) {
        shares[rank] += 1;
    }
    shares
}

/// Among all contiguous splits with a stripe for every rank in which `fits(rank, begin, end)`
/// holds for every rank: one with the least time of the slowest rank (stripes / weight), and among
/// those the one nearest to `ideal`. `None` where no split fits.
pub(crate) fn fitting(
    stripes: usize,
    weights: &[f64],
    ideal: &[usize],
    fits: impl Fn(usize, usize, usize) -> bool,
) -> Option<Vec<usize>> {
    let allowed = |rank: usize, begin: usize, end: usize| {
        fits(rank, begin, end).then(|| (end - begin) as f64 / weights[rank])
    };
    let slowest = |before: f64, here: f64| before.max(here);
    let (bound, _) = best(stripes, weights.len(), allowed, slowest)?;
    let near = |rank: usize, begin: usize, end: usize| {
        let within = allowed(rank, begin, end)? <= bound;
        // Squares: two ranks that are one off are nearer than one that is two off.
        within.then(|| ((end - begin).abs_diff(ideal[rank]) as f64).powi(2))
    };
    best(stripes, weights.len(), near, |before, here| before + here).map(|(_, split)| split)
}

/// A dynamic programme over (ranks served, stripes given): the cheapest split, where `cost` of one
/// rank's run (`None` forbids it) is combined along the ranks by a monotone `join`.
fn best(
    stripes: usize,
    ranks: usize,
    cost: impl Fn(usize, usize, usize) -> Option<f64>,
    join: impl Fn(f64, f64) -> f64,
) -> Option<(f64, Vec<usize>)> {
    // `table[rank][end]`: cheapest way for ranks up to `rank` to hold `0..end`, and where the last
    // of them begins.
    let mut table: Vec<Vec<Option<(f64, usize)>>> = Vec::with_capacity(ranks);
    for rank in 0..ranks {
        let mut row = vec![None; stripes + 1];
        for (end, cell) in row.iter_mut().enumerate() {
            for begin in 0..end {
                let before = match table.last() {
                    None => (begin == 0).then_some(0.0),
                    Some(previous) => previous[begin].map(|(cost, _)| cost),
                };
                let Some((before, here)) = before.zip(cost(rank, begin, end)) else {
                    continue;
                };
                let total = join(before, here);
                // `<=` prefers the later begin, so that lower ranks get the larger runs.
                if cell.is_none_or(|(known, _)| total <= known) {
                    *cell = Some((total, begin));
                }
            }
        }
        table.push(row);
    }
    let total = table.last()?[stripes]?.0;
    let mut split = vec![0; ranks];
    let mut end = stripes;
    for (rank, row) in table.iter().enumerate().rev() {
        let (_, begin) = row[end]?;
        split[rank] = end - begin;
        end = begin;
    }
    Some((total, split))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_or_by_weight() {
        let check = |stripes, weights: &[f64], expected: &[usize]| {
            assert_eq!(proportional(stripes, weights), expected, "{stripes} over {weights:?}");
        };
        check(8, &[1.0; 1], &[8]);
        check(8, &[1.0; 3], &[3, 3, 2]);
        check(8, &[1.0; 5], &[2, 2, 2, 1, 1]);
        check(8, &[1.0; 7], &[2, 1, 1, 1, 1, 1, 1]);
        check(8, &[3.0, 1.0], &[6, 2]);
        check(8, &[1.0, 3.0], &[2, 6]);
        check(8, &[100.0, 1.0, 1.0], &[6, 1, 1]);
        check(8, &[f64::MAX, f64::MAX], &[4, 4]);
        check(4, &[f64::MIN_POSITIVE, 1.0, 1.0], &[1, 2, 1]);
    }

    #[test]
    fn a_short_rank_gives_to_those_with_room() {
        let room = [2, 9, 3];
        let fits = |rank: usize, begin, end| end - begin <= room[rank];
        assert_eq!(fitting(8, &[1.0; 3], &[3, 3, 2], fits), Some(vec![2, 3, 3]));
        let room = [2, 3, 2];
        let fits = |rank: usize, begin, end| end - begin <= room[rank];
        assert_eq!(fitting(8, &[1.0; 3], &[3, 3, 2], fits), None);
    }

    #[test]
    fn among_equally_slow_splits_the_nearest_to_the_ideal_is_taken() {
        // Rank 1 must take 6, so ranks 0 and 2 could share the others in any way.
        let fits = |rank: usize, begin: usize, end: usize| rank != 1 || end - begin == 6;
        let split = fitting(12, &[1.0; 3], &[4, 4, 4], fits);
        assert_eq!(split, Some(vec![3, 6, 3]));
    }
}
