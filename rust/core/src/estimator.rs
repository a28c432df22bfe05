//! EBPO itself: shrink each group's mean toward the prior, then normalise (paper §3.2-3.3, Algorithm 1).
//!
//! ```text
//! S_m     = (sigma2 / n_m) / (sigma2 / n_m + tau2)      shrinkage factor in [0, 1]
//! V_m     = (1 - S_m) mu_m + S_m mu_glob                baseline, the posterior mean of the group's reward
//! raw_mi  = r_mi - V_m
//! A_mi    = (raw_mi - mean(raw)) / (std(raw) + eps)     over all valid rows of the batch
//! ```
//!
//! With `b_m = mu_m - V_m = S_m (mu_m - mu_glob)`, the mean and the variance of `raw` follow from the groups' statistics
//! alone, so rewards are read twice in all: once for the statistics, once to write the advantages.

use crate::groups::Group;
use crate::{Affine, GroupStats, Normalize, Options, Prior, Score};

/// What the estimator remembers between batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct State {
    /// Statistics of the rewards seen.
    pub prior: Prior,
    /// Id of the last update applied.
    pub step: Option<i64>,
}

/// A scored batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Rewards to advantages.
    pub affine: Affine,
    /// S per group; NaN for an empty group.
    pub shrinkage: Vec<f64>,
    /// V per group; NaN for an empty group.
    pub baseline: Vec<f64>,
    /// The prior that the batch was scored with (before any leave-one-out).
    pub prior: Prior,
    /// The prior as it was before this batch.
    pub before: Prior,
    /// The batch's own statistics.
    pub batch: Prior,
    /// With keys: the blended prior of each group (before any leave-one-out); otherwise empty.
    pub blended: Vec<Shrinkage>,
}

/// Mean, noise and spread of a prior, as the options estimate them: what a group is shrunk with.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shrinkage {
    /// Mean of all rewards.
    pub mu: f64,
    /// Variance of a reward about its group's mean.
    pub sigma2: f64,
    /// Variance of the groups' true means.
    pub tau2: f64,
}

impl Shrinkage {
    /// Those of one prior; 0 where it is empty.
    pub fn new(prior: &Prior, options: &Options) -> Self {
        Self {
            mu: prior.rewards().mean(),
            sigma2: prior.sigma2(options.sigma2, options.ddof),
            tau2: prior.tau2(options.tau2, options.ddof),
        }
    }

    /// S of a group of `n` rows: 0 where all rewards seen are equal, and for an empty prior.
    #[inline]
    pub fn factor(&self, n: f64) -> f64 {
        let noise = self.sigma2 / n;
        let total = noise + self.tau2;
        if total > 0.0 { noise / total } else { 0.0 }
    }
}

impl State {
    /// Score a batch and, if `update`, take it into the prior.
    ///
    /// A `step` that is not newer than the last one applied marks a retry or a replay: it scores against the stored
    /// prior, which already holds that batch, and updates nothing.
    pub fn advance(&mut self, options: &Options, groups: &GroupStats, update: bool, step: Option<i64>) -> Scored {
        let update = update && is_new(step, self.step);
        let before = self.prior;
        let batch = Prior::of(groups);
        let mut decayed = before;
        if !batch.is_empty() {
            decayed.decay(options.decay); // rows that do not count never touch the prior, hence neither does time
        }
        let mut after = decayed;
        after.merge(&batch);

        let prior = if update && options.score == Score::After { after } else { before };
        let shrunk = if update && options.leave_one_out {
            leave_one_out(&decayed, options, groups)
        } else {
            let shrinkage = Shrinkage::new(&prior, options);
            let mut known = (1.0, shrinkage.factor(1.0));
            let factor = |g: &Group| {
                if g.n != known.0 {
                    known = (g.n, shrinkage.factor(g.n)); // mostly once: groups are mostly of one size
                }
                (known.1, shrinkage.mu)
            };
            groups.iter().map(factor).collect()
        };
        if update {
            self.prior = after;
            self.step = step.or(self.step);
        }
        finish(options, groups, &shrunk, (before, batch, prior))
    }
}

/// Whether an update with this step id counts: its id is newer than that of the last one applied, or it has none.
pub(crate) fn is_new(step: Option<i64>, last: Option<i64>) -> bool {
    !matches!((step, last), (Some(new), Some(last)) if new <= last)
}

/// `(S_m, mu_glob)` of each group against history and batch without that group.
fn leave_one_out(history: &Prior, options: &Options, groups: &GroupStats) -> Vec<(f64, f64)> {
    let factor = |(g, rest): (&Group, Prior)| {
        let shrinkage = Shrinkage::new(&rest, options);
        (shrinkage.factor(g.n), shrinkage.mu)
    };
    groups.iter().zip(without_each(history, groups.iter())).map(factor).collect()
}

/// For each group: history and all the groups but that one.
///
/// Prefixes and suffixes are merged rather than the group subtracted from the whole: where one group dominates, the
/// difference would have no digits left.
pub(crate) fn without_each<'a>(
    history: &Prior,
    groups: impl DoubleEndedIterator<Item = &'a Group> + ExactSizeIterator + Clone,
) -> impl Iterator<Item = Prior> {
    let of_group = |g: &Group| Prior::of_group(g.n, g.mean, g.ssw);
    let mut suffixes = vec![Prior::default(); groups.len()];
    let mut suffix = Prior::default();
    for (slot, g) in suffixes.iter_mut().zip(groups.clone()).rev() {
        *slot = suffix;
        suffix.merge(&of_group(g));
    }
    let mut prefix = *history;
    groups.zip(suffixes).map(move |(g, suffix)| {
        let mut rest = prefix;
        rest.merge(&suffix);
        prefix.merge(&of_group(g));
        rest
    })
}

/// Normalise, given `(S_m, mu)` of each group.
pub(crate) fn finish(
    options: &Options,
    groups: &GroupStats,
    shrunk: &[(f64, f64)],
    (before, batch, prior): (Prior, Prior, Prior),
) -> Scored {
    // b_m = mean of raw in group m; about the first one, so that equal ones have exactly that value as mean
    let biases: Vec<f64> = groups.iter().zip(shrunk).map(|(g, &(s, mu))| s * (g.mean - mu)).collect();
    let counted = || groups.iter().zip(&biases).filter(|(g, _)| g.n > 0.0);
    let (mut rows, mut ssw, mut sum) = (0.0, 0.0, 0.0);
    let first = counted().next().map_or(0.0, |(_, &b)| b);
    for (g, b) in counted() {
        rows += g.n;
        ssw += g.ssw;
        sum += g.n * (b - first);
    }
    let mean = if rows > 0.0 { first + sum / rows } else { 0.0 };
    let centre = if options.normalize == Normalize::Batch { mean } else { 0.0 };
    let squares = ssw + counted().map(|(g, b)| g.n * (b - centre) * (b - centre)).sum::<f64>();
    let scale = inverse_scale(options, rows, squares);
    let or_nan = |g: &Group, value: f64| if g.n > 0.0 { value } else { f64::NAN };
    Scored {
        affine: Affine {
            // mu_m - (b_m - centre), not V_m + centre: where every b_m is the same this is exactly mu_m.
            offset: groups.iter().zip(&biases).map(|(g, b)| g.mean - (b - centre)).collect(),
            scale: vec![scale; shrunk.len()],
        },
        shrinkage: groups.iter().zip(shrunk).map(|(g, s)| or_nan(g, s.0)).collect(),
        baseline: groups.iter().zip(&biases).map(|(g, b)| or_nan(g, g.mean - b)).collect(),
        prior,
        before,
        batch,
        blended: Vec::new(),
    }
}

/// `1 / (std + eps)`, `1 / (rms + eps)` or 1; 0 where the denominator is 0, since every deviation then is.
#[inline]
pub(crate) fn inverse_scale(options: &Options, rows: f64, squares: f64) -> f64 {
    let divisor = match options.normalize {
        Normalize::None => return 1.0,
        Normalize::Scale => rows,
        Normalize::Batch => rows - f64::from(options.norm_ddof),
    };
    let spread = if divisor > 0.0 { (squares / divisor).sqrt() } else { 0.0 };
    let denominator = spread + options.eps;
    if denominator > 0.0 { 1.0 / denominator } else { 0.0 }
}
