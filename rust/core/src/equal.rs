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
use crate::{Affine, Float, Moments, Normalize, Options, Prior, threads};

/// Groups reduced together; fixed, because it decides the order of rounding.
const BLOCK: usize = 512;

/// Rewards of one share of the work.
const SHARE: usize = 1 << 18;

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
    /// The groups' means, in the shares that threads took.
    means: Vec<Vec<f64>>,
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

pub(crate) use by_size;

impl<'a, T: Float> EqualGroups<'a, T> {
    /// The statistics of a batch with `size` rewards in each group.
    ///
    /// None where the general path must look at each row: a reward that is NaN, infinite or near the bound of magnitude,
    /// no reward, or a length that `size` does not divide.
    pub fn collect(rewards: &'a [T], size: usize, threads: usize) -> Option<Self> {
        if size == 0 || rewards.is_empty() || !rewards.len().is_multiple_of(size) {
            return None;
        }
        let (means, sums) = by_size!(size, G => reduce::<T, G>(rewards, size, threads));
        let prior = sums.into_prior(size as f64);
        in_range(prior.rewards().mean(), prior.rewards().m2()).then_some(Self { rewards, size, means, prior })
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

    /// What [`EqualGroups::write`] does to the rewards of each group.
    pub fn affine(&self, options: &Options, prior: &Prior) -> Affine {
        let map = self.map(options, prior);
        let offset: Vec<_> = self.means.iter().flatten().map(|&mean| map.offset(mean)).collect();
        Affine { scale: vec![map.scale; offset.len()], offset }
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
        let rows = groups_of_share(self.rewards.len(), self.size) * self.size;
        let shares = self.rewards.chunks(rows).zip(&self.means).zip(out.chunks_mut(rows));
        // From the end, where the rewards that were read last may still be in a cache.
        threads::map(worth(self.rewards.len(), threads), shares.rev(), |((rewards, means), out)| {
            Arch::new().dispatch(Write::<T, G> { map, rewards, size: self.size, means, out });
        });
    }
}

/// Rewards that are worth a thread: a quarter of a millisecond's, several times what it costs to start and join one.
const PER_THREAD: usize = 1 << 20;

/// How many threads, up to `threads`, that many rewards are worth.
fn worth(rewards: usize, threads: usize) -> usize {
    threads.min(rewards / PER_THREAD).max(1)
}

/// Groups of one share of the work: whole blocks, and few of them, so that a thread that gets no core does not keep the
/// others waiting, and what a share wrote last is still in a cache when it is read again.
fn groups_of_share(rewards: usize, size: usize) -> usize {
    (SHARE.min(rewards) / size).div_ceil(BLOCK).max(1) * BLOCK
}

/// Each group's mean, share by share, and what all groups add up to.
fn reduce<T: Float, const G: usize>(rewards: &[T], size: usize, threads: usize) -> (Vec<Vec<f64>>, Sums) {
    let groups = groups_of_share(rewards.len(), size);
    let reduced = threads::map(worth(rewards.len(), threads), rewards.chunks(groups * size), |rewards| {
        let (mut means, mut sums) = (Vec::with_capacity(rewards.len() / size), Vec::with_capacity(groups / BLOCK));
        Arch::new().dispatch(Blocks::<T, G> { rewards, size, means: &mut means, sums: &mut sums });
        (means, sums)
    });
    let mut total = Sums::default();
    let mut means = Vec::with_capacity(reduced.len());
    for (of_share, sums) in reduced {
        for block in &sums {
            total.merge(block);
        }
        means.push(of_share);
    }
    (means, total)
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
    fn offset(self, mean: f64) -> f64 {
        mean + self.shrink * (self.centre - mean)
    }

    #[inline(always)]
    fn write<T: Float>(self, rows: &[T], mean: f64, out: &mut [T]) {
        // Opaque to the compiler, which would otherwise vectorise across groups: it would shuffle more than it computes.
        let offset = black_box(self.offset(mean));
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
