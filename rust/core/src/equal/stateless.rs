//! Advantages of one batch alone: threads that are started once take both passes.

use std::sync::{Mutex, PoisonError};

use super::reduce::{Sums, groups_of_share, reduce_share};
use super::{EqualGroups, by_size, fits, worth, write_share};
use crate::estimator::Shrinkage;
use crate::{Float, Keys, Options, threads};

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
    let options = Options { eps, ..Options::default() };
    let threads = worth(rewards.len(), threads);
    if threads > 1 && fits(rewards.len(), size) {
        return by_size!(size, G => on_threads::<T, G>(rewards, size, &options, threads, out));
    }
    let Some(groups) = EqualGroups::collect(rewards, size, Keys::ROOT, threads) else { return false };
    groups.write(&options, &[Shrinkage::new(groups.prior(), &options)], threads, out);
    true
}

/// Rewards, groups' means and blocks of one share of the work, and the place of its advantages.
struct Share<'a, T> {
    rewards: &'a [T],
    out: &'a mut [T],
    means: Vec<f64>,
    blocks: Vec<Sums>,
}

#[inline(never)]
fn on_threads<T: Float, const G: usize>(
    rewards: &[T],
    size: usize,
    options: &Options,
    threads: usize,
    out: &mut [T],
) -> bool {
    let rows = groups_of_share(rewards.len(), size) * size;
    let share = |(rewards, out)| Mutex::new(Share { rewards, out, means: Vec::new(), blocks: Vec::new() });
    let shares: Vec<_> = rewards.chunks(rows).zip(out.chunks_mut(rows)).map(share).collect();
    let reduce = |share: &mut Share<'_, T>| (share.means, share.blocks) = reduce_share::<T, G>(share.rewards, size);
    let map = || {
        let mut sums = Sums::default();
        for share in &shares {
            sums.merge_all(&share.lock().unwrap_or_else(PoisonError::into_inner).blocks);
        }
        let groups = EqualGroups::new(rewards, size, Keys::ROOT, Vec::new(), sums, Vec::new())?;
        Some(groups.one_map(options, &Shrinkage::new(groups.prior(), options)))
    };
    let write =
        |share: &mut Share<'_, T>, &map: &_| write_share::<T, G>(map, share.rewards, size, &share.means, share.out);
    threads::map_twice(threads, &shares, reduce, map, write)
}
