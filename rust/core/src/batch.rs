//! A batch of rewards with its groups, and the one way advantages are written: an affine map per group.

use core::array;
use core::hint::black_box;

use pulp::{Arch, NullaryFnOnce};

use crate::equal::by_size;
use crate::lanes::LANES;
use crate::{Error, Float};

/// How rows belong to groups.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// Consecutive groups of `size` rows: a C-ordered `(M, size)` array.
    Equal {
        /// Rows of each group.
        size: usize,
    },
    /// `codes[row]` is the group of a row; rows of a group may stand anywhere.
    Codes {
        /// One code per row, below `groups`.
        codes: &'a [u32],
        /// Number of groups; some may be empty.
        groups: usize,
    },
}

/// Rewards, their groups, and which rows count.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a, T> {
    pub(crate) rewards: &'a [T],
    pub(crate) layout: Layout<'a>,
    pub(crate) mask: Option<&'a [bool]>,
}

impl<'a, T: Float> Batch<'a, T> {
    /// A batch; lengths and codes are checked here once, so that the kernels need not.
    pub fn new(rewards: &'a [T], layout: Layout<'a>, mask: Option<&'a [bool]>) -> Result<Self, Error> {
        match layout {
            Layout::Equal { size } => {
                if size == 0 || !rewards.len().is_multiple_of(size) {
                    return Err(Error::NotDivisible { len: rewards.len(), size });
                }
            }
            Layout::Codes { codes, groups } => {
                if codes.len() != rewards.len() {
                    let (name, got) = ("groups", codes.len());
                    return Err(Error::LengthMismatch { name, got, expected: rewards.len() });
                }
                if let Some(index) = codes.iter().position(|&code| code as usize >= groups) {
                    return Err(Error::GroupOutOfRange { index, code: codes[index], groups });
                }
            }
        }
        if let Some(mask) = mask
            && mask.len() != rewards.len()
        {
            return Err(Error::LengthMismatch { name: "mask", got: mask.len(), expected: rewards.len() });
        }
        Ok(Self { rewards, layout, mask })
    }

    /// Number of groups, the empty ones included.
    pub fn groups(&self) -> usize {
        match self.layout {
            Layout::Equal { size } => self.rewards.len() / size,
            Layout::Codes { groups, .. } => groups,
        }
    }

    /// Call `f(group, reward)` for each row that counts (mask true and reward not NaN), in row order.
    #[inline(always)]
    pub(crate) fn for_each(&self, mut f: impl FnMut(usize, f64)) {
        let valid = |row: usize, value: f64| self.mask.is_none_or(|mask| mask[row]) && !value.is_nan();
        match self.layout {
            Layout::Equal { size } => {
                for (group, rows) in self.rewards.chunks_exact(size).enumerate() {
                    for (i, reward) in rows.iter().enumerate() {
                        let value = reward.widen();
                        if valid(group * size + i, value) {
                            f(group, value);
                        }
                    }
                }
            }
            Layout::Codes { codes, .. } => {
                for (row, (&code, reward)) in codes.iter().zip(self.rewards).enumerate() {
                    let value = reward.widen();
                    if valid(row, value) {
                        f(code as usize, value);
                    }
                }
            }
        }
    }

    /// Largest distance of a counted reward from `centre`; 0 when no row counts.
    pub fn max_distance(&self, centre: f64) -> f64 {
        if self.mask.is_none() {
            return Arch::new().dispatch(Farthest { rewards: self.rewards, centre });
        }
        let mut farthest = 0.0_f64;
        self.for_each(|_, value| farthest = farthest.max((value - centre).abs()));
        farthest
    }

    /// Refuse a counted reward below 0, which `method` has no meaning for.
    pub(crate) fn check_non_negative(&self, method: &'static str) -> Result<(), Error> {
        let mut lowest = 0.0_f64;
        self.for_each(|_, value| lowest = lowest.min(value));
        if lowest < 0.0 {
            return Err(Error::InvalidReward { value: lowest, method, expected: "at least 0" });
        }
        Ok(())
    }

    /// Refuse counted rewards that are infinite or too large to be squared.
    pub(crate) fn check_range(&self) -> Result<(), Error> {
        let out_of_range = |(row, reward): (usize, &T)| {
            let value = reward.widen();
            let counted = self.mask.is_none_or(|mask| mask[row]) && !value.is_nan();
            counted && value.abs() > crate::MAX_REWARD
        };
        match self.rewards.iter().enumerate().position(out_of_range) {
            Some(index) => Err(Error::RewardOutOfRange { index, value: self.rewards[index].widen() }),
            None => Ok(()),
        }
    }
}

/// The advantages of a batch as a map of its rewards: `(reward - offset[group]) * scale[group]`.
///
/// Every estimator here has this form, so statistics are all it has to compute and one kernel writes the result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Affine {
    /// Per group: what is subtracted.
    pub offset: Vec<f64>,
    /// Per group: what multiplies the difference.
    pub scale: Vec<f64>,
}

/// Write the advantages; rows that do not count get 0.
///
/// # Panics
/// If `out` is not as long as the rewards, or `affine` not as long as the groups.
pub fn apply<T: Float>(batch: &Batch<'_, T>, affine: &Affine, out: &mut [T]) {
    assert_eq!(out.len(), batch.rewards.len());
    assert_eq!(affine.offset.len(), batch.groups());
    assert_eq!(affine.scale.len(), batch.groups());
    match batch.layout {
        Layout::Equal { size } => {
            let rewards = batch.rewards;
            by_size!(size, G => Arch::new().dispatch(ApplyEqual::<T, G> { rewards, size, affine, out: &mut *out }));
            if let Some(mask) = batch.mask {
                for (out, _) in out.iter_mut().zip(mask).filter(|(_, counts)| !**counts) {
                    *out = T::default();
                }
            }
        }
        Layout::Codes { codes, .. } => {
            for (row, ((&code, &reward), out)) in codes.iter().zip(batch.rewards).zip(out).enumerate() {
                let (offset, scale) = (affine.offset[code as usize], affine.scale[code as usize]);
                let counts = batch.mask.is_none_or(|mask| mask[row]);
                *out = if counts { advantage(reward, offset, scale) } else { T::default() };
            }
        }
    }
}

/// The advantage of one reward, 0 for NaN.
///
/// A difference can leave the range of `f32` although both terms are in it; such a value saturates instead of becoming
/// infinite. `f64` rewards are at most 1e140, so theirs cannot.
#[inline(always)]
fn advantage<T: Float>(reward: T, offset: f64, scale: f64) -> T {
    let value = reward.widen();
    let scaled = ((value - offset) * scale).clamp(-T::MAX, T::MAX);
    T::narrow(if value.is_nan() { 0.0 } else { scaled })
}

/// See [`Batch::max_distance`]: of all rewards, under the widest vectors of the CPU.
struct Farthest<'a, T> {
    rewards: &'a [T],
    centre: f64,
}

impl<T: Float> NullaryFnOnce for Farthest<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let (chunks, rest) = self.rewards.as_chunks::<LANES>();
        // A comparison with NaN is false, so a reward that does not count changes nothing.
        let farther = |lane: f64, reward: T| {
            let distance = (reward.widen() - self.centre).abs();
            if distance > lane { distance } else { lane }
        };
        let mut lanes = [0.0; LANES];
        for chunk in chunks {
            lanes = array::from_fn(|i| farther(lanes[i], chunk[i]));
        }
        lanes[0] = rest.iter().fold(lanes[0], |lane, &reward| farther(lane, reward));
        lanes.into_iter().fold(0.0, f64::max)
    }
}

/// Write consecutive groups, under the widest vectors of the CPU.
struct ApplyEqual<'a, T, const G: usize> {
    rewards: &'a [T],
    size: usize,
    affine: &'a Affine,
    out: &'a mut [T],
}

impl<T: Float, const G: usize> NullaryFnOnce for ApplyEqual<'_, T, G> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let maps = self.affine.offset.iter().zip(&self.affine.scale);
        if G > 0 {
            let rows = self.rewards.as_chunks::<G>().0.iter().zip(self.out.as_chunks_mut::<G>().0);
            for ((rewards, out), (&offset, &scale)) in rows.zip(maps) {
                write_group(rewards, offset, scale, out);
            }
        } else {
            let rows = self.rewards.chunks_exact(self.size).zip(self.out.chunks_exact_mut(self.size));
            for ((rewards, out), (&offset, &scale)) in rows.zip(maps) {
                write_group(rewards, offset, scale, out);
            }
        }
    }
}

#[inline(always)]
fn write_group<T: Float>(rewards: &[T], offset: f64, scale: f64, out: &mut [T]) {
    // Opaque to the compiler, which would otherwise vectorise across groups: it would shuffle more than it computes.
    let (offset, scale) = (black_box(offset), black_box(scale));
    let (chunks, rest) = rewards.as_chunks::<LANES>();
    let (out_chunks, out_rest) = out.as_chunks_mut::<LANES>();
    for (chunk, out) in chunks.iter().zip(out_chunks) {
        *out = chunk.map(|reward| advantage(reward, offset, scale));
    }
    for (&reward, out) in rest.iter().zip(out_rest) {
        *out = advantage(reward, offset, scale);
    }
}
