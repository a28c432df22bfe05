//! EBPO itself: shrink each group's mean toward a prior, then normalise (paper §3.2-3.3, Algorithm 1).
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
use crate::tree::Members;
use crate::{Affine, GroupStats, Normalize, Options, Prior, Tree};

/// A scored batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Rewards to advantages.
    pub affine: Affine,
    /// S per group; NaN for an empty group.
    pub shrinkage: Vec<f64>,
    /// V per group; NaN for an empty group.
    pub baseline: Vec<f64>,
    /// The root's prior that the batch was scored with (before any leave-one-out).
    pub prior: Prior,
    /// The root's prior as it was before this batch.
    pub before: Prior,
    /// The blended prior of each distinct key (before any leave-one-out).
    pub blended: Vec<Shrinkage>,
}

impl Scored {
    /// Mean `|A|` over the valid rows of the groups whose valid rewards are all equal; NaN where no group is such.
    pub fn dead_advantage(&self, groups: &GroupStats) -> f64 {
        let (mut rows, mut sum) = (0.0, 0.0);
        for ((g, offset), scale) in groups.iter().zip(&self.affine.offset).zip(&self.affine.scale) {
            if g.n > 0.0 && g.ssw == 0.0 {
                rows += g.n;
                sum += g.n * ((g.mean - offset) * scale).abs();
            }
        }
        sum / rows // 0 / 0 is NaN
    }
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

    /// `theta~` of a key with this prior, given its parent's (see [`Tree::shrunken`]).
    pub(crate) fn blended(prior: &Prior, parent: Self, options: &Options) -> Self {
        let groups = prior.means().count();
        if groups == 0.0 {
            return parent;
        }
        let own = Self::new(prior, options);
        let h = options.kappa / (options.kappa + groups);
        // Not (1 - h) a + h b: where key and parent agree, this is exactly their common value.
        let blend = |own: f64, parent: f64| own + h * (parent - own);
        Self {
            mu: blend(own.mu, parent.mu),
            sigma2: blend(own.sigma2, parent.sigma2),
            tau2: blend(own.tau2, parent.tau2),
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

/// The numbers each group is shrunk with where every prior on its way from the root holds the history and the batch
/// without that group.
pub(crate) fn leave_one_out_by_key(
    history: &Tree,
    options: &Options,
    groups: &GroupStats,
    members: &Members<'_>,
) -> Vec<Shrinkage> {
    let at_root = without_each(&history.root, groups.iter());
    let mut blended: Vec<_> = at_root.map(|rest| Shrinkage::new(&rest, options)).collect();
    // A path comes after its prefixes, so each group passes through its parents first.
    for (path, list) in members {
        let history = history.get(path).copied().unwrap_or_default();
        let rests = without_each(&history, list.iter().map(|&group| groups.get(group)));
        for (&group, rest) in list.iter().zip(rests) {
            blended[group] = Shrinkage::blended(&rest, blended[group], options);
        }
    }
    blended
}

/// For each group: history and all the groups but that one.
///
/// Prefixes and suffixes are merged rather than the group subtracted from the whole: where one group dominates, the
/// difference would have no digits left.
fn without_each<'a>(
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

/// Steps 4 to 6, given `(S_m, mu_glob)` of each group: the advantages as a map, S and V per group.
pub(crate) fn finish(options: &Options, groups: &GroupStats, shrunk: &[(f64, f64)]) -> (Affine, Vec<f64>, Vec<f64>) {
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
    // mean(raw), then the squares of raw about the centre: within groups, and of the groups' b_m
    let mean = if rows > 0.0 { first + sum / rows } else { 0.0 };
    let centre = if options.normalize == Normalize::Batch { mean } else { 0.0 };
    let squares = ssw + counted().map(|(g, b)| g.n * (b - centre) * (b - centre)).sum::<f64>();
    let scale = inverse_scale(options, rows, squares);
    let or_nan = |g: &Group, value: f64| if g.n > 0.0 { value } else { f64::NAN };
    let affine = Affine {
        // mu_m - (b_m - centre), not V_m + centre: where every b_m is the same this is exactly mu_m.
        offset: groups.iter().zip(&biases).map(|(g, b)| g.mean - (b - centre)).collect(),
        scale: vec![scale; shrunk.len()],
    };
    let shrinkage = groups.iter().zip(shrunk).map(|(g, s)| or_nan(g, s.0)).collect();
    let baseline = groups.iter().zip(&biases).map(|(g, b)| or_nan(g, g.mean - b)).collect();
    (affine, shrinkage, baseline)
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
