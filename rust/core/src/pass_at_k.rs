//! Advantages whose policy gradient is that of pass@k (rewards of 0 and 1) or max@k (graded), without bias.
//!
//! ```text
//! max@k = E max of k rewards        estimated over all subsets of k of a group's n rewards
//! A_i   = k E_J max(r_i, max r_J)  -  k E_L max r_L
//!         J: k - 1 of the others        L: k of the others; the k - 1 others themselves where n = k
//! ```
//!
//! The first term weighs `grad log p(y_i)` so that its mean over a group is an unbiased gradient of max@k (arXiv 2505.15201); the
//! second is the same objective estimated from the other rows alone, which adds no bias. `k = 1` is RLOO.

use crate::batch::Batch;
use crate::float::Float;
use crate::{Error, Layout};

/// Write those advantages for every group of a batch. Fails on a group with fewer than k counted rows.
pub(crate) fn pass_at_k<T: Float>(batch: &Batch<'_, T>, k: f64, out: &mut [T]) -> Result<(), Error> {
    let mut members: Vec<Vec<(f64, usize)>> = vec![Vec::new(); batch.groups()];
    for (row, reward) in batch.rewards.iter().enumerate() {
        let value = reward.widen();
        if batch.mask.is_none_or(|mask| mask[row]) && !value.is_nan() {
            let group = match batch.layout {
                Layout::Equal { size } => row / size,
                Layout::Codes { codes, .. } => codes[row] as usize,
            };
            members[group].push((value, row));
        }
    }
    for rows in &mut members {
        #[allow(clippy::cast_precision_loss)] // fewer than 2^53 rows
        let n = rows.len() as f64;
        if rows.is_empty() {
            continue;
        }
        if n < k {
            return Err(Error::InvalidOption {
                name: "k",
                value: k.to_string(),
                expected: "at most the counted rewards of the smallest group; sample more completions a prompt, or lower k",
            });
        }
        rows.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        for (advantage, &(_, row)) in of_sorted(rows, n, k).into_iter().zip(rows.iter()) {
            out[row] = T::narrow(advantage.clamp(-T::MAX, T::MAX)); // k differences may leave the range of `f32`
        }
    }
    Ok(())
}

/// Advantages of one group in ascending order of reward.
fn of_sorted(rows: &[(f64, usize)], n: f64, k: f64) -> Vec<f64> {
    if n == 1.0 {
        return vec![0.0];
    }
    // About the largest reward, so that a large offset costs no digits: every term is a difference.
    let top = rows[rows.len() - 1].0;
    let value = |i: usize| rows[i].0 - top;
    let baseline_size = if k < n { k } else { k - 1.0 };
    // Chance that the largest of `size` draws from the n - 1 others is the one of rank r = 1 .. n - 1.
    let by_rank = |size: f64| -> Vec<f64> {
        let mut chance = vec![0.0; rows.len()];
        let mut p = size / (n - 1.0);
        let mut rank = n - 1.0;
        for slot in chance.iter_mut().skip(1).rev() {
            *slot = p;
            p = if rank > 1.0 { p * (rank - size) / (rank - 1.0) } else { 0.0 };
            rank -= 1.0;
        }
        chance
    };
    let (with, without) = (by_rank(k - 1.0), by_rank(baseline_size));
    // Sums over the rows above (their rank among the others is one lower) and below row i.
    let mut above = vec![(0.0, 0.0); rows.len() + 1];
    for i in (1..rows.len()).rev() {
        above[i] = (above[i + 1].0 + value(i) * with[i], above[i + 1].1 + value(i) * without[i]);
    }
    let mut below_with = vec![0.0; rows.len() + 1];
    let mut below_without = vec![0.0; rows.len() + 1];
    for i in 0..rows.len() - 1 {
        below_with[i + 1] = below_with[i] + with[i + 1];
        below_without[i + 1] = below_without[i] + value(i) * without[i + 1];
    }
    let mut advantages = vec![0.0; rows.len()];
    let mut end = rows.len();
    while end > 0 {
        // Equal rewards share the advantage of the last of them: it does not depend on the order of ties.
        let last = end - 1;
        let start = (0..end).rev().take_while(|&i| rows[i].0 == rows[last].0).last().unwrap_or(last);
        // With k = 1 there is no J, and the maximum is the reward itself.
        let own = if k == 1.0 { 1.0 } else { below_with[last] };
        let first = value(last) * own + above[last + 1].0;
        let second = below_without[last] + above[last + 1].1;
        advantages[start..end].fill(k * (first - second));
        end = start;
    }
    advantages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advantages(rewards: &[f64], k: f64) -> Vec<f64> {
        let batch = Batch::new(rewards, Layout::Equal { size: rewards.len() }, None).unwrap();
        let mut out = vec![0.0; rewards.len()];
        pass_at_k(&batch, k, &mut out).unwrap();
        out
    }

    #[test]
    fn one_draw_is_rloo() {
        assert_eq!(advantages(&[1.0, 0.0, 0.0], 1.0), [1.0, -0.5, -0.5]);
    }

    #[test]
    fn a_group_of_k_is_judged_by_its_others() {
        assert_eq!(advantages(&[1.0, 0.0], 2.0), [2.0, 0.0]);
        assert_eq!(advantages(&[1.0, 1.0], 2.0), [0.0, 0.0]);
    }
}
