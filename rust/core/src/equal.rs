//! The common case in full speed: equal groups in rows of a matrix, every row counted.
//!
//! All groups of a key then share one S, so the statistics reduce to a few sums for each key and the advantages to
//! `(r - offset_m) * scale`, with the offset a map of the group's mean that is one for all groups of a key. Blocks of a
//! fixed number of groups are reduced on their own and merged in order: the result does not depend on how many threads did
//! it.

mod by_key;
mod reduce;
mod stateless;

use core::hint::black_box;
use core::slice;

use pulp::{Arch, NullaryFnOnce};

use self::by_key::reduce_by_key;
use self::reduce::{Sums, groups_of_share, reduce};
pub use self::stateless::equal_advantages;
use crate::estimator::{Shrinkage, inverse_scale};
use crate::groups::in_range;
use crate::lanes::LANES;
use crate::{Affine, Float, Keys, Moments, Normalize, Options, Prior, threads};

/// Rewards of a batch of equal groups, row by row, their keys, and what the priors take of them.
///
/// This is steps 2 to 6 of Algorithm 1 a second time, beside [`Targets::score`](crate::Targets::score), for speed alone:
/// the property tests hold the two together.
#[derive(Clone, Debug)]
pub struct EqualGroups<'a, T> {
    rewards: &'a [T],
    size: usize,
    keys: Keys<'a>,
    /// The groups' means, in the shares that threads took.
    means: Vec<Vec<f64>>,
    prior: Prior,
    /// The prior of each path's own groups; empty for [`Keys::ROOT`], whose one path has all groups.
    by_path: Vec<Prior>,
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
    ///
    /// # Panics
    /// If the keys are those of another number of groups.
    pub fn collect(rewards: &'a [T], size: usize, keys: Keys<'a>, threads: usize) -> Option<Self> {
        if !fits(rewards.len(), size) {
            return None;
        }
        let (means, sums, by_path) = if let Some(of_group) = keys.indices() {
            assert_eq!(of_group.len(), rewards.len() / size);
            by_size!(size, G => reduce_by_key::<T, G>(rewards, size, of_group, keys.len()))
        } else {
            let (means, sums) = by_size!(size, G => reduce::<T, G>(rewards, size, threads));
            (means, sums, Vec::new())
        };
        Self::new(rewards, size, keys, means, sums, by_path)
    }

    /// None where a reward is NaN, infinite or near the bound of magnitude.
    fn new(
        rewards: &'a [T],
        size: usize,
        keys: Keys<'a>,
        means: Vec<Vec<f64>>,
        sums: Sums,
        by_path: Vec<Prior>,
    ) -> Option<Self> {
        let prior = sums.into_prior(size as f64);
        let counted = in_range(prior.rewards().mean(), prior.rewards().m2());
        counted.then_some(Self { rewards, size, keys, means, prior, by_path })
    }

    /// The batch as a prior of its own.
    pub fn prior(&self) -> &Prior {
        &self.prior
    }

    /// The keys of the groups.
    pub(crate) fn keys(&self) -> &Keys<'a> {
        &self.keys
    }

    /// The prior of each path's own groups.
    pub(crate) fn by_path(&self) -> &[Prior] {
        if self.by_path.is_empty() { slice::from_ref(&self.prior) } else { &self.by_path }
    }

    /// True where no difference of a reward and a baseline can leave the range of `T`, toward priors with means up to
    /// `farthest_mean` or toward them and the batch together.
    pub(crate) fn has_room(&self, farthest_mean: f64) -> bool {
        let rewards = self.prior.rewards();
        rewards.mean().abs().max(farthest_mean) + rewards.m2().sqrt() <= 0.25 * T::MAX
    }

    /// What [`EqualGroups::write`] does to the rewards of each group.
    pub fn affine(&self, options: &Options, blended: &[Shrinkage]) -> Affine {
        let (pulls, scale) = self.map(options, blended);
        let offset: Vec<_> = self.offsets(&pulls).into_iter().flatten().collect();
        Affine { scale: vec![scale; offset.len()], offset }
    }

    /// Steps 2 to 6: write the advantages, with the groups of each path shrunk toward that path's blended prior.
    ///
    /// # Panics
    /// If `out` is not as long as the rewards, or `blended` not as long as the paths of the keys.
    pub fn write(&self, options: &Options, blended: &[Shrinkage], threads: usize, out: &mut [T]) {
        assert_eq!(out.len(), self.rewards.len());
        assert_eq!(blended.len(), self.by_path().len());
        if let ([], [target]) = (&self.by_path[..], blended) {
            let (pull, scale) = self.one_map(options, target);
            by_size!(self.size, G => self.write_with::<G>(pull, scale, &self.means, threads, out));
        } else {
            let (pulls, scale) = self.map(options, blended);
            let offsets = self.offsets(&pulls);
            by_size!(self.size, G => self.write_with::<G>(Pull::NONE, scale, &offsets, threads, out));
        }
    }

    /// [`Self::map`] of one path.
    fn one_map(&self, options: &Options, target: &Shrinkage) -> (Pull, f64) {
        let path = [OfPath::new(&self.prior, target, self.size)];
        let (centre, scale) = self.step_6(options, &path);
        (path[0].pull(options, centre), scale)
    }

    /// What takes the means of each path's groups to their offsets, and one scale for all.
    fn map(&self, options: &Options, blended: &[Shrinkage]) -> (Vec<Pull>, f64) {
        let path = |(prior, target)| OfPath::new(prior, target, self.size);
        let of_paths: Vec<_> = self.by_path().iter().zip(blended).map(path).collect();
        let (centre, scale) = self.step_6(options, &of_paths);
        (of_paths.iter().map(|path| path.pull(options, centre)).collect(), scale)
    }

    /// Centre and inverse divisor of the raw advantages.
    fn step_6(&self, options: &Options, of_paths: &[OfPath<'_>]) -> (f64, f64) {
        let counted = || of_paths.iter().filter(|path| path.means.count() > 0.0);
        // About the first one, so that equal ones have exactly that value as mean.
        let first = counted().next().map_or(0.0, |path| path.bias);
        let sum: f64 = counted().map(|path| path.means.count() * (path.bias - first)).sum();
        let mean = first + sum / self.prior.means().count();
        let centre = if options.normalize == Normalize::Batch { mean } else { 0.0 };
        let between = counted().map(|OfPath { means, shrink, bias, .. }| {
            let off = bias - centre;
            shrink * shrink * means.m2() + means.count() * off * off
        });
        let squares = self.prior.ssw() + self.size as f64 * between.sum::<f64>();
        (centre, inverse_scale(options, self.prior.rewards().count(), squares))
    }

    /// What is subtracted from the rewards of each group, in the shares that threads take.
    fn offsets(&self, pulls: &[Pull]) -> Vec<Vec<f64>> {
        let Some(of_group) = self.keys.indices() else {
            return self.means.iter().map(|means| means.iter().map(|&mean| pulls[0].offset(mean)).collect()).collect();
        };
        let groups = groups_of_share(self.rewards.len(), self.size);
        let of_share = |(means, paths): (&Vec<f64>, &[u32])| {
            means.iter().zip(paths).map(|(&mean, &path)| pulls[path as usize].offset(mean)).collect()
        };
        self.means.iter().zip(of_group.chunks(groups)).map(of_share).collect()
    }

    fn write_with<const G: usize>(&self, pull: Pull, scale: f64, means: &[Vec<f64>], threads: usize, out: &mut [T]) {
        let rows = groups_of_share(self.rewards.len(), self.size) * self.size;
        let shares = self.rewards.chunks(rows).zip(means).zip(out.chunks_mut(rows));
        // From the end, where the rewards that were read last may still be in a cache.
        threads::map(worth(self.rewards.len(), threads), shares.rev(), |((rewards, means), out)| {
            write_share::<T, G>((pull, scale), rewards, self.size, means, out);
        });
    }
}

/// True for `len` rewards in groups of `size`.
fn fits(len: usize, size: usize) -> bool {
    size > 0 && len > 0 && len.is_multiple_of(size)
}

/// Rewards that are worth a thread: a quarter of a millisecond's, several times what it costs to start and join one.
const PER_THREAD: usize = 1 << 19;

/// How many threads, up to `threads`, that many rewards are worth.
fn worth(rewards: usize, threads: usize) -> usize {
    threads.min(rewards / PER_THREAD).max(1)
}

/// Steps 2 and 3 for the groups of a path: `b_m = shrink (mu_m - mu_glob)` of a group, and its mean over them, `bias`.
struct OfPath<'a> {
    means: &'a Moments,
    shrink: f64,
    bias: f64,
    mu: f64,
}

impl<'a> OfPath<'a> {
    fn new(prior: &'a Prior, target: &Shrinkage, size: usize) -> Self {
        let (means, shrink) = (prior.means(), target.factor(size as f64));
        Self { means, shrink, bias: shrink * (means.mean() - target.mu), mu: target.mu }
    }

    /// About the mean over the path's groups where it is taken out again, so that a far prior costs no digits.
    fn pull(&self, options: &Options, centre: f64) -> Pull {
        match options.normalize {
            Normalize::Batch => Pull { shrink: self.shrink, target: self.means.mean(), bias: self.bias - centre },
            Normalize::Scale | Normalize::None => Pull { shrink: self.shrink, target: self.mu, bias: 0.0 },
        }
    }
}

/// What takes a group's mean to the offset of its rewards: `mu_m + shrink (target - mu_m) - bias`.
#[derive(Clone, Copy, Debug)]
struct Pull {
    shrink: f64,
    target: f64,
    /// Of the path beside the others; 0 where there is one.
    bias: f64,
}

fn write_share<T: Float, const G: usize>(
    (pull, scale): (Pull, f64),
    rewards: &[T],
    size: usize,
    means: &[f64],
    out: &mut [T],
) {
    Arch::new().dispatch(Write::<T, G> { pull, scale, rewards, size, means, out });
}

/// Write the advantages of some groups, `(r - offset) * scale`.
struct Write<'a, T, const G: usize> {
    pull: Pull,
    scale: f64,
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
                write(rows, self.pull.without_bias(mean), self.scale, out);
            }
        } else {
            let rows = self.rewards.chunks_exact(self.size).zip(self.out.chunks_exact_mut(self.size));
            for ((rows, out), &mean) in rows.zip(self.means) {
                write(rows, self.pull.without_bias(mean), self.scale, out);
            }
        }
    }
}

impl Pull {
    /// Leaves an offset, taken for a mean, as it is.
    const NONE: Self = Self { shrink: 0.0, target: 0.0, bias: 0.0 };

    #[inline(always)]
    fn without_bias(self, mean: f64) -> f64 {
        mean + self.shrink * (self.target - mean)
    }

    #[inline(always)]
    fn offset(self, mean: f64) -> f64 {
        self.without_bias(mean) - self.bias
    }
}

#[inline(always)]
fn write<T: Float>(rows: &[T], offset: f64, scale: f64, out: &mut [T]) {
    // Opaque to the compiler, which would otherwise vectorise across groups: it would shuffle more than it computes.
    let offset = black_box(offset);
    let advantage = |reward: T| T::narrow((reward.widen() - offset) * scale);
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
