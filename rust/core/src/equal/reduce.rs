//! Statistics of equal groups in one pass over their rewards.

use pulp::{Arch, NullaryFnOnce};

use super::worth;
use crate::lanes::{LANES, fold, mean_and_squares, mean_and_ssw};
use crate::{Float, Moments, Prior, threads};

/// Groups reduced together; fixed, because it decides the order of rounding.
pub(super) const BLOCK: usize = 512;

/// Rewards of one share of the work.
const SHARE: usize = 1 << 18;

/// Groups of one share of the work: whole blocks, and few of them, so that a thread that gets no core does not keep the
/// others waiting, and what a share wrote last is still in a cache when it is read again.
pub(super) fn groups_of_share(rewards: usize, size: usize) -> usize {
    (SHARE.min(rewards) / size).div_ceil(BLOCK).max(1) * BLOCK
}

/// Each group's mean, share by share, and what all groups add up to.
pub(super) fn reduce<T: Float, const G: usize>(rewards: &[T], size: usize, threads: usize) -> (Vec<Vec<f64>>, Sums) {
    let groups = groups_of_share(rewards.len(), size);
    let of_share = |rewards| reduce_share::<T, G>(rewards, size);
    let reduced = threads::map(worth(rewards.len(), threads), rewards.chunks(groups * size), of_share);
    let mut total = Sums::default();
    let mut means = Vec::with_capacity(reduced.len());
    for (of_share, blocks) in reduced {
        total.merge_all(&blocks);
        means.push(of_share);
    }
    (means, total)
}

/// Each group's mean, and the sums of each block.
pub(super) fn reduce_share<T: Float, const G: usize>(rewards: &[T], size: usize) -> (Vec<f64>, Vec<Sums>) {
    let groups = rewards.len() / size;
    let (mut means, mut blocks) = (Vec::with_capacity(groups), Vec::with_capacity(groups.div_ceil(BLOCK)));
    Arch::new().dispatch(Blocks::<T, G> { rewards, size, means: &mut means, sums: &mut blocks });
    (means, blocks)
}

/// Reduce block by block.
struct Blocks<'a, T, const G: usize> {
    rewards: &'a [T],
    size: usize,
    means: &'a mut Vec<f64>,
    sums: &'a mut Vec<Sums>,
}

impl<T: Float, const G: usize> NullaryFnOnce for Blocks<'_, T, G> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for rewards in self.rewards.chunks(BLOCK * self.size) {
            let start = self.means.len();
            self.means.resize(start + rewards.len() / self.size, 0.0); // a block at a time, which stays in a cache
            self.sums.push(Sums::of::<T, G>(rewards, self.size, &mut self.means[start..]));
        }
    }
}

/// Statistics of equal groups that make up a prior.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    pub(super) means: Moments,
    pub(super) ssw: f64,
}

impl Sums {
    #[inline(always)]
    fn of<T: Float, const G: usize>(rewards: &[T], size: usize, means: &mut [f64]) -> Self {
        let inv_n = 1.0 / size as f64;
        // One set of lanes for the whole block: folding them once per group would cost as much as filling them.
        let mut squares = [0.0; LANES];
        if G > 0 {
            for (mean, rows) in means.iter_mut().zip(rewards.as_chunks::<G>().0) {
                // Widened once, for both passes.
                *mean = mean_and_squares(&rows.map(T::widen), T::EXACT_SUM, inv_n, &mut squares);
            }
        } else {
            for (mean, rows) in means.iter_mut().zip(rewards.chunks_exact(size)) {
                *mean = mean_and_squares(rows, T::EXACT_SUM, inv_n, &mut squares);
            }
        }
        let groups = means.len() as f64;
        let (mean, m2) = mean_and_ssw(means, 1.0 / groups);
        Self { means: Moments::new(groups, mean, m2), ssw: fold(squares) }
    }

    /// Merge blocks in their order, which decides the rounding.
    pub(super) fn merge_all(&mut self, blocks: &[Self]) {
        for block in blocks {
            self.means.merge(&block.means);
            self.ssw += block.ssw;
        }
    }

    pub(super) fn into_prior(self, n: f64) -> Prior {
        let (groups, mean) = (self.means.count(), self.means.mean());
        let rewards = Moments::new(groups * n, mean, self.ssw + n * self.means.m2());
        Prior::new(rewards, self.means, self.ssw, groups * (n - 1.0), groups / n)
    }
}
