//! The common case in full speed: equal groups in rows of a matrix, every row counted, one prior for all.
//!
//! All groups then share one S, so the statistics reduce to a few sums and the advantages to
//! `(r - (mu_m + S (centre - mu_m))) * scale`. Blocks of a fixed number of groups are reduced on their own and merged in
//! order: the result does not depend on how many threads did it.

use core::hint::black_box;

use pulp::{Arch, NullaryFnOnce};

use crate::estimator::{Shrinkage, inverse_scale};
use crate::groups::in_range;
use crate::lanes::{LANES, fold, mean_and_squares, mean_and_ssw};
use crate::{Float, Moments, Normalize, Options, Prior, threads};

/// Groups reduced together; fixed, because it decides the order of rounding.
const BLOCK: usize = 512;

/// Stateless EBPO advantages of equal groups, `size` rewards each, into `out`: the batch is its own prior, and every other
/// option is at its default.
///
/// Returns false, with `out` untouched, where [`EqualGroups::collect`] leaves the batch to the general path. No result can
/// overflow: divided by the batch's own spread, no advantage exceeds the square root of the number of rewards.
///
/// # Panics
/// If `out` is not as long as the rewards.
pub fn equal_advantages<T: Float>(rewards: &[T], size: usize, eps: f64, threads: usize, out: &mut [T]) -> bool {
    assert_eq!(out.len(), rewards.len());
    let Some(groups) = EqualGroups::collect(rewards, size, threads) else { return false };
    groups.write(&Options { eps, ..Options::default() }, groups.prior(), threads, out);
    true
}

/// Rewards of a batch of equal groups, row by row, and what a prior takes of them.
///
/// With [`State::advance_equal`](crate::State::advance_equal) this is Algorithm 1 a second time, beside
/// [`State::advance`](crate::State::advance), for speed alone: the property tests hold the two together.
#[derive(Clone, Debug)]
pub struct EqualGroups<'a, T> {
    rewards: &'a [T],
    size: usize,
    means: Vec<f64>,
    prior: Prior,
}

/// `call` with `G` the group size, or 0 for one known at run time: a size known to the compiler lets it keep a whole group in
/// registers.
macro_rules! by_size {
    ($size:expr, $G:ident => $call:expr) => {
        by_size!($size, $G => $call, 2 4 8 16 32)
    };
    ($size:expr, $G:ident => $call:expr, $($known:literal)+) => {
        match $size {
            $($known => {
                const $G: usize = $known;
                $call
            })+
            _ => {
                const $G: usize = 0;
                $call
            }
        }
    };
}

impl<'a, T: Float> EqualGroups<'a, T> {
    /// Rewards of a thread's smallest share: fewer are done sooner than a thread starts.
    const SHARE: usize = 1 << 17;

    /// The statistics of a batch with `size` rewards in each group.
    ///
    /// None where the general path must look at each row: a reward that is NaN, infinite or near the bound of magnitude,
    /// no reward, or a length that `size` does not divide.
    pub fn collect(rewards: &'a [T], size: usize, threads: usize) -> Option<Self> {
        if size == 0 || rewards.is_empty() || !rewards.len().is_multiple_of(size) {
            return None;
        }
        let mut this = Self { rewards, size, means: vec![0.0; rewards.len() / size], prior: Prior::default() };
        this.prior = by_size!(size, G => this.sums::<G>(threads)).into_prior(size as f64);
        in_range(this.prior.rewards().mean(), this.prior.rewards().m2()).then_some(this)
    }

    /// The batch as a prior of its own.
    pub fn prior(&self) -> &Prior {
        &self.prior
    }

    /// True where no difference of a reward and a baseline can leave the range of `T`, toward this prior or toward it and
    /// the batch together.
    pub(crate) fn has_room(&self, prior: &Prior) -> bool {
        let rewards = self.prior.rewards();
        let farthest = rewards.mean().abs().max(prior.rewards().mean().abs()) + rewards.m2().sqrt();
        farthest <= 0.25 * T::MAX
    }

    /// Steps 2 to 6: write the advantages, with every group shrunk toward `prior`.
    ///
    /// # Panics
    /// If `out` is not as long as the rewards.
    pub fn write(&self, options: &Options, prior: &Prior, threads: usize, out: &mut [T]) {
        assert_eq!(out.len(), self.rewards.len());
        let map = self.map(options, prior);
        by_size!(self.size, G => self.write_with::<G>(map, threads, out));
    }

    fn sums<const G: usize>(&mut self, threads: usize) -> Sums {
        let (threads, groups) = self.shares(threads);
        let (size, shares) = (self.size, self.rewards.chunks(groups * self.size).zip(self.means.chunks_mut(groups)));
        let reduced = threads::map(threads, shares, |(rewards, means)| {
            let mut sums = Vec::with_capacity(groups / BLOCK);
            let each = |block| sums.push(block);
            Arch::new().dispatch(Blocks::<T, _, G> { rewards, size, means, each });
            sums
        });
        let mut total = Sums::default();
        for block in reduced.iter().flatten() {
            total.merge(block);
        }
        total
    }

    /// One S, one centre, one scale.
    fn map(&self, options: &Options, prior: &Prior) -> Map {
        let (n, means) = (self.size as f64, self.prior.means());
        let target = Shrinkage::new(prior, options);
        let shrink = target.factor(n);
        // raw = r - mu_m + S (mu_m - mu_glob), whose mean is that of the groups' means in place of mu_m.
        let centre = if options.normalize == Normalize::Batch { means.mean() } else { target.mu };
        let off = means.mean() - centre;
        let squares = self.prior.ssw() + n * shrink * shrink * (means.m2() + means.count() * off * off);
        Map { shrink, centre, scale: inverse_scale(options, self.prior.rewards().count(), squares) }
    }

    fn write_with<const G: usize>(&self, map: Map, threads: usize, out: &mut [T]) {
        let (threads, groups) = self.shares(threads);
        let rows = groups * self.size;
        let shares = self.rewards.chunks(rows).zip(self.means.chunks(groups)).zip(out.chunks_mut(rows));
        threads::map(threads, shares, |((rewards, means), out)| {
            Arch::new().dispatch(Write::<T, G> { map, rewards, size: self.size, means, out });
        });
    }

    /// How many threads the batch is worth, and the groups of one thread's share: whole blocks.
    fn shares(&self, threads: usize) -> (usize, usize) {
        let threads = threads.clamp(1, self.rewards.len().div_ceil(Self::SHARE));
        (threads, self.means.len().div_ceil(BLOCK).div_ceil(threads) * BLOCK)
    }
}

/// Reduce block by block, writing each group's mean.
struct Blocks<'a, T, F, const G: usize> {
    rewards: &'a [T],
    size: usize,
    means: &'a mut [f64],
    each: F,
}

impl<T: Float, F: FnMut(Sums), const G: usize> NullaryFnOnce for Blocks<'_, T, F, G> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        for (rewards, means) in self.rewards.chunks(BLOCK * self.size).zip(self.means.chunks_mut(BLOCK)) {
            (self.each)(Sums::of::<T, G>(rewards, self.size, means));
        }
    }
}

/// Statistics of equal groups that make up a prior.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    means: Moments,
    ssw: f64,
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
}

/// Write the advantages of some groups.
struct Write<'a, T, const G: usize> {
    map: Map,
    rewards: &'a [T],
    size: usize,
    means: &'a [f64],
    out: &'a mut [T],
}

impl<T: Float, const G: usize> NullaryFnOnce for Write<'_, T, G> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        // `for`, not `for_each`: a closure that is not inlined would lose the vectors that this runs under.
        if G > 0 {
            let rows = self.rewards.as_chunks::<G>().0.iter().zip(self.out.as_chunks_mut::<G>().0);
            for ((rows, out), &mean) in rows.zip(self.means) {
                self.map.write(rows, mean, out);
            }
        } else {
            let rows = self.rewards.chunks_exact(self.size).zip(self.out.chunks_exact_mut(self.size));
            for ((rows, out), &mean) in rows.zip(self.means) {
                self.map.write(rows, mean, out);
            }
        }
    }
}

impl Map {
    #[inline(always)]
    fn write<T: Float>(self, rows: &[T], mean: f64, out: &mut [T]) {
        // Opaque to the compiler, which would otherwise vectorise across groups: it would shuffle more than it computes.
        let offset = black_box(mean + self.shrink * (self.centre - mean));
        let advantage = |reward: T| T::narrow((reward.widen() - offset) * self.scale);
        // Arrays by value become vectors without a proof that `rows` and `out` are apart.
        let (chunks, rest) = rows.as_chunks::<LANES>();
        let (out_chunks, out_rest) = out.as_chunks_mut::<LANES>();
        for (chunk, out) in chunks.iter().zip(out_chunks) {
            *out = chunk.map(advantage);
        }
        for (&reward, out) in rest.iter().zip(out_rest) {
            *out = advantage(reward);
        }
    }
}
