//! Statistics of equal groups with keys: one pass over the rewards, two over the groups' means.

use pulp::{Arch, NullaryFnOnce};

use super::reduce::{BLOCK, Sums, groups_of_share};
use crate::lanes::{Aligned, LANES, fold, mean_and_squares, mean_and_ssw};
use crate::{Float, Moments, Prior};

/// Each group's mean, share by share, what all groups add up to, and the prior of the groups of each path.
///
/// On one thread, as reading the list of keys is.
pub(super) fn reduce_by_key<T: Float, const G: usize>(
    rewards: &[T],
    size: usize,
    of_group: &[u32],
    paths: usize,
) -> (Vec<Vec<f64>>, Sums, Vec<Prior>) {
    // Lanes for each path: folding them once per group would cost as much as filling them.
    let mut squares = vec![Aligned([0.0; LANES]); paths];
    let groups = groups_of_share(rewards.len(), size);
    let shares = rewards.chunks(groups * size).zip(of_group.chunks(groups));
    let mut total = Sums::default();
    let means: Vec<_> = shares
        .clone()
        .map(|(rewards, paths)| {
            let mut means = vec![0.0; paths.len()];
            Arch::new().dispatch(ByKey::<T, G> {
                rewards,
                size,
                paths,
                means: &mut means,
                squares: &mut squares,
                total: &mut total.means,
            });
            means
        })
        .collect();

    let mut by_path: Vec<_> =
        squares.iter().map(|&Aligned(lanes)| OfPath { ssw: fold(lanes), ..OfPath::default() }).collect();
    let pairs = || means.iter().zip(shares.clone().map(|(_, paths)| paths));
    for (means, paths) in pairs() {
        for (&mean, &path) in means.iter().zip(paths) {
            let sums = &mut by_path[path as usize];
            if sums.count == 0.0 {
                sums.mean = mean; // the first, about which the others are summed: equal ones have exactly that mean
            }
            sums.count += 1.0;
            sums.sum += mean - sums.mean;
        }
    }
    for sums in by_path.iter_mut().filter(|sums| sums.count > 0.0) {
        sums.mean += sums.sum / sums.count;
    }
    for (means, paths) in pairs() {
        for (&mean, &path) in means.iter().zip(paths) {
            let sums = &mut by_path[path as usize];
            sums.m2 += (mean - sums.mean) * (mean - sums.mean);
        }
    }
    total.ssw = by_path.iter().map(|sums| sums.ssw).sum();
    let prior = |sums: &OfPath| {
        let means = Moments::new(sums.count, sums.mean, sums.m2);
        Sums { means, ssw: sums.ssw }.into_prior(size as f64)
    };
    let priors = by_path.iter().map(prior).collect();
    (means, total, priors)
}

/// Sums over the groups of a path.
#[derive(Clone, Copy, Debug, Default)]
struct OfPath {
    count: f64,
    mean: f64,
    sum: f64,
    m2: f64,
    ssw: f64,
}

/// Reduce the groups of a share.
struct ByKey<'a, T, const G: usize> {
    rewards: &'a [T],
    size: usize,
    paths: &'a [u32],
    means: &'a mut [f64],
    squares: &'a mut [Aligned<LANES>],
    total: &'a mut Moments,
}

impl<T: Float, const G: usize> NullaryFnOnce for ByKey<'_, T, G> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let inv_n = 1.0 / self.size as f64;
        let slots = self.means.iter_mut().zip(self.paths);
        if G > 0 {
            for ((mean, &path), rows) in slots.zip(self.rewards.as_chunks::<G>().0) {
                let squares = &mut self.squares[path as usize].0;
                // Widened once, for both passes.
                *mean = mean_and_squares(&rows.map(T::widen), T::EXACT_SUM, inv_n, squares);
            }
        } else {
            for ((mean, &path), rows) in slots.zip(self.rewards.chunks_exact(self.size)) {
                *mean = mean_and_squares(rows, T::EXACT_SUM, inv_n, &mut self.squares[path as usize].0);
            }
        }
        for means in self.means.chunks(BLOCK) {
            let groups = means.len() as f64;
            let (mean, m2) = mean_and_ssw(means, 1.0 / groups);
            self.total.merge(&Moments::new(groups, mean, m2));
        }
    }
}
