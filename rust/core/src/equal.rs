//! The common case in full speed: equal groups in rows of a matrix, every row counted, one prior for all.
//!
//! All groups then share one S, so the statistics reduce to a few sums and the advantages to
//! `(r - (mu_m + S (centre - mu_m))) * scale`. Blocks of a fixed number of groups are reduced on their own and merged in
//! order: the result does not depend on how many threads did it.

use crate::estimator::{Shrinkage, inverse_scale};
use crate::groups::in_range;
use crate::lanes::{mean, mean_and_ssw};
use crate::{Float, Moments, Options, Prior};

/// Groups reduced together; fixed, because it decides the order of rounding.
const BLOCK: usize = 512;

/// Rewards of a batch of equal groups, `M * size` of them, row by row.
#[derive(Clone, Copy, Debug)]
pub struct EqualGroups<'a, T> {
    rewards: &'a [T],
    size: usize,
}

impl<'a, T: Float> EqualGroups<'a, T> {
    /// Rewards from which threads are worth their start: about 20 microseconds for two of them.
    pub const PARALLEL: usize = 1 << 18;

    /// Groups of `size` rewards; `None` if there is none or they do not divide.
    pub fn new(rewards: &'a [T], size: usize) -> Option<Self> {
        (size > 0 && !rewards.is_empty() && rewards.len() % size == 0).then_some(Self { rewards, size })
    }

    /// Stateless EBPO advantages into `out` with the batch as its own prior (`score = After`, no leave-one-out).
    ///
    /// Returns false, with `out` untouched, if a reward is NaN, infinite or near the bound of magnitude: the general path
    /// must then look at each row.
    ///
    /// # Panics
    /// If `out` is not as long as the rewards.
    pub fn advantages(&self, options: &Options, threads: usize, out: &mut [T]) -> bool {
        assert_eq!(out.len(), self.rewards.len());
        let threads = threads.clamp(1, self.rewards.len().div_ceil(Self::PARALLEL / 2));
        let prior = match self.size {
            // A group size known to the compiler lets it keep a whole group in registers.
            2 => self.prior::<2>(threads),
            4 => self.prior::<4>(threads),
            8 => self.prior::<8>(threads),
            16 => self.prior::<16>(threads),
            32 => self.prior::<32>(threads),
            _ => self.prior::<0>(threads),
        };
        let (rewards, means) = (prior.rewards(), prior.means());
        if !in_range(rewards.mean(), rewards.m2()) {
            return false;
        }
        let n = self.size as f64;
        let s = Shrinkage::new(&prior, options).factor(n);
        // Groups are equal and the batch is its own prior, so mu_glob, the mean of the means and the mean of raw + V are
        // one number: every `normalize` centres there.
        let centre = means.mean();
        let squares = prior.ssw() + n * s * s * means.m2();
        let scale = inverse_scale(options, rewards.count(), squares);
        let map = Map { shrink: s, centre, scale, saturate: rewards.m2() > 1e70 || rewards.mean().abs() > 1e35 };
        match self.size {
            2 => self.write::<2>(map, threads, out),
            4 => self.write::<4>(map, threads, out),
            8 => self.write::<8>(map, threads, out),
            16 => self.write::<16>(map, threads, out),
            32 => self.write::<32>(map, threads, out),
            _ => self.write::<0>(map, threads, out),
        }
        true
    }

    /// Statistics of the batch; `G` is the group size, or 0 for one known at run time.
    fn prior<const G: usize>(&self, threads: usize) -> Prior {
        let rows = BLOCK * self.size;
        let reduce = |part: &[T]| part.chunks(rows).map(|block| Sums::of::<T, G>(block, self.size)).collect::<Vec<_>>();
        let mut total = Sums::default();
        if threads == 1 {
            self.rewards.chunks(rows).for_each(|block| total.merge(&Sums::of::<T, G>(block, self.size)));
        } else {
            std::thread::scope(|scope| {
                let parts = self.rewards.chunks(self.rows_of_part(threads));
                let reduce = &reduce;
                let handles: Vec<_> = parts.map(|part| scope.spawn(move || reduce(part))).collect();
                for handle in handles {
                    // A panic of a worker is a bug of ours; pass it on as it is.
                    let sums = handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    sums.iter().for_each(|sum| total.merge(sum));
                }
            });
        }
        total.into_prior(self.size as f64)
    }

    fn write<const G: usize>(&self, map: Map, threads: usize, out: &mut [T]) {
        if threads == 1 {
            return map.write::<T, G>(self.rewards, self.size, out);
        }
        let rows = self.rows_of_part(threads);
        std::thread::scope(|scope| {
            for (part, out) in self.rewards.chunks(rows).zip(out.chunks_mut(rows)) {
                scope.spawn(move || map.write::<T, G>(part, self.size, out));
            }
        });
    }

    /// Rewards of one thread's share: whole blocks.
    fn rows_of_part(&self, threads: usize) -> usize {
        let rows = BLOCK * self.size;
        self.rewards.len().div_ceil(rows).div_ceil(threads) * rows
    }
}

/// What the prior needs of equal groups.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    means: Moments,
    ssw: f64,
}

impl Sums {
    #[inline]
    fn of<T: Float, const G: usize>(block: &[T], size: usize) -> Self {
        let inv_n = 1.0 / size as f64;
        let mut means = [0.0; BLOCK];
        let mut ssw = 0.0;
        let groups = block.len() / size;
        let mut put = |mean_slot: &mut f64, rows: &[T]| {
            let (mean, squares) = mean_and_ssw(rows, inv_n);
            *mean_slot = mean;
            ssw += squares;
        };
        if G > 0 {
            means.iter_mut().zip(block.as_chunks::<G>().0).for_each(|(slot, rows)| put(slot, rows));
        } else {
            means.iter_mut().zip(block.chunks_exact(size)).for_each(|(slot, rows)| put(slot, rows));
        }
        let means = &means[..groups];
        let (mean, m2) = mean_and_ssw(means, 1.0 / groups as f64);
        Self { means: Moments::new(groups as f64, mean, m2), ssw }
    }

    fn merge(&mut self, other: &Self) {
        self.means.merge(&other.means);
        self.ssw += other.ssw;
    }

    fn into_prior(self, n: f64) -> Prior {
        let (groups, mean) = (self.means.count(), self.means.mean());
        let rewards = Moments::new(groups * n, mean, self.ssw + n * self.means.m2());
        Prior::new(rewards, self.means, self.ssw, groups * (n - 1.0), groups / n)
    }
}

/// `(r - (mu_m + shrink (centre - mu_m))) * scale`
#[derive(Clone, Copy, Debug)]
struct Map {
    shrink: f64,
    centre: f64,
    scale: f64,
    /// Whether a difference of two rewards might leave the range of `f32`.
    saturate: bool,
}

impl Map {
    fn write<T: Float, const G: usize>(self, rewards: &[T], size: usize, out: &mut [T]) {
        let inv_n = 1.0 / size as f64;
        if G > 0 {
            for (rows, out) in rewards.as_chunks::<G>().0.iter().zip(out.as_chunks_mut::<G>().0) {
                self.write_group(rows, inv_n, out);
            }
        } else {
            for (rows, out) in rewards.chunks_exact(size).zip(out.chunks_exact_mut(size)) {
                self.write_group(rows, inv_n, out);
            }
        }
    }

    /// The group's mean is computed anew: its rewards are in cache, an array of means would not be.
    #[inline(always)]
    fn write_group<T: Float>(self, rows: &[T], inv_n: f64, out: &mut [T]) {
        let mean = mean(rows, inv_n);
        let offset = mean + self.shrink * (self.centre - mean);
        if self.saturate {
            for (reward, out) in rows.iter().zip(out) {
                *out = T::narrow(((reward.widen() - offset) * self.scale).clamp(-T::MAX, T::MAX));
            }
            return;
        }
        for (reward, out) in rows.iter().zip(out) {
            *out = T::narrow((reward.widen() - offset) * self.scale);
        }
    }
}
