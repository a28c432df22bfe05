//! Count, mean and sum of squares within, for each group of a batch.

use pulp::{Arch, NullaryFnOnce};

use crate::equal::by_size;
use crate::lanes::{LANES, fold, mean_and_squares, mean_and_ssw};
use crate::{Batch, Error, Float, Layout, MAX_REWARD};

/// Statistics of one group's valid rows; `mean` and `ssw` are 0 where `n` is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Group {
    pub(crate) n: f64,
    pub(crate) mean: f64,
    pub(crate) ssw: f64,
}

/// Statistics of every group of a batch, in the order of their codes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupStats {
    groups: Vec<Group>,
}

impl GroupStats {
    /// Collect them; fails on a counted reward that is out of range.
    pub fn collect<T: Float>(batch: &Batch<'_, T>) -> Result<Self, Error> {
        if let (Layout::Equal { size }, None) = (batch.layout, batch.mask) {
            let stats = Self::of_equal(batch.rewards, size);
            if stats.surely_in_range() {
                return Ok(stats);
            }
            // A NaN, an infinity, or a magnitude near the bound: look at each row.
        }
        let stats = Self::of_rows(batch);
        if !stats.surely_in_range() {
            batch.check_range()?;
        }
        Ok(stats)
    }

    /// Number of groups, the empty ones included.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// True where there is no group.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Valid rows of each group.
    pub fn counts(&self) -> Vec<f64> {
        self.groups.iter().map(|g| g.n).collect()
    }

    /// Shares of the non-empty groups whose valid rewards are all equal: below and above the centre.
    ///
    /// A saturated group exactly at the centre counts as failed unless its reward is positive: in a first batch of
    /// nothing but failures the centre is the failure itself.
    pub fn saturated(&self, centre: f64) -> (f64, f64) {
        let (mut groups, mut fail, mut pass) = (0.0, 0.0, 0.0);
        for g in self.iter().filter(|g| g.n > 0.0) {
            groups += 1.0;
            if g.ssw > 0.0 {
                continue;
            }
            if g.mean > centre || (g.mean == centre && g.mean > 0.0) {
                pass += 1.0;
            } else {
                fail += 1.0;
            }
        }
        if groups == 0.0 { (0.0, 0.0) } else { (fail / groups, pass / groups) }
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Group> + ExactSizeIterator + Clone {
        self.groups.iter()
    }

    pub(crate) fn get(&self, group: usize) -> &Group {
        &self.groups[group]
    }

    fn of_equal<T: Float>(rewards: &[T], size: usize) -> Self {
        let mut groups = vec![Group::default(); rewards.len() / size];
        by_size!(size, G => Arch::new().dispatch(OfEqual::<T, G> { rewards, size, groups: &mut groups }));
        Self { groups }
    }

    fn of_rows<T: Float>(batch: &Batch<'_, T>) -> Self {
        let mut groups = vec![Group::default(); batch.groups()];
        // The first valid reward of a group is what its mean is taken about: equal rewards then have exactly their
        // value as mean, and a large offset costs no digits.
        let mut first = vec![0.0; groups.len()];
        batch.for_each(|group, value| {
            let g = &mut groups[group];
            if g.n == 0.0 {
                first[group] = value;
            }
            g.n += 1.0;
            g.mean += value - first[group];
        });
        for (g, &first) in groups.iter_mut().zip(&first).filter(|(g, _)| g.n > 0.0) {
            g.mean = first + g.mean / g.n;
        }
        batch.for_each(|group, value| {
            let g = &mut groups[group];
            let d = value - g.mean;
            g.ssw += d * d;
        });
        Self { groups }
    }

    /// True where the statistics alone prove that every counted reward is finite and small enough.
    ///
    /// A reward beyond the bound is at least half of it away from 0 in its mean, or from its mean; a NaN or an infinity
    /// makes every comparison false.
    fn surely_in_range(&self) -> bool {
        self.groups.iter().all(|g| in_range(g.mean, g.ssw))
    }
}

/// Statistics of consecutive groups, under the widest vectors of the CPU.
struct OfEqual<'a, T, const G: usize> {
    rewards: &'a [T],
    size: usize,
    groups: &'a mut [Group],
}

impl<T: Float, const G: usize> NullaryFnOnce for OfEqual<'_, T, G> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let n = self.size as f64;
        let inv_n = 1.0 / n;
        if G > 0 {
            for (group, rows) in self.groups.iter_mut().zip(self.rewards.as_chunks::<G>().0) {
                // Widened once, for both passes.
                let mut squares = [0.0; LANES];
                let mean = mean_and_squares(&rows.map(T::widen), T::EXACT_SUM, inv_n, &mut squares);
                *group = Group { n, mean, ssw: fold(squares) };
            }
        } else {
            for (group, rows) in self.groups.iter_mut().zip(self.rewards.chunks_exact(self.size)) {
                let (mean, ssw) = mean_and_ssw(rows, inv_n);
                *group = Group { n, mean, ssw };
            }
        }
    }
}

/// See [`GroupStats::surely_in_range`].
#[inline]
pub(crate) fn in_range(mean: f64, ssw: f64) -> bool {
    mean.abs() <= 0.5 * MAX_REWARD && ssw <= (0.5 * MAX_REWARD) * (0.5 * MAX_REWARD)
}
