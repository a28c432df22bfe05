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
//!
//! Where a row is left out of its group's mean, `mu_m` becomes `mu_m - (r - mu_m) / (n - 1)` and S that of n - 1 rows, the
//! same for all rows of the group. So this too is a map of the group: `raw = (1 + (1 - S) / (n - 1)) (r - mu_m) + b_m`.

use std::collections::HashMap;

use crate::groups::Group;
use crate::keys::Visits;
use crate::{Affine, GroupStats, Keys, LeaveOneOut, Normalize, Options, Prior, Tree};

/// A scored batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Rewards to advantages.
    pub affine: Affine,
    /// S per group; NaN for an empty group.
    pub shrinkage: Vec<f64>,
    /// V per group, the mean of its rows' where each leaves itself out; NaN for an empty group.
    pub baseline: Vec<f64>,
    /// What the groups were shrunk toward.
    pub targets: Targets,
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

/// What the groups of a batch are shrunk toward, before any leave-one-out.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    /// The root's prior that the batch is scored with.
    pub prior: Prior,
    /// The root's prior as it was before this batch.
    pub before: Prior,
    /// The blended prior of each path of the keys.
    pub blended: Vec<Shrinkage>,
}

impl Targets {
    /// Steps 2 to 6.
    pub fn score(self, options: &Options, groups: &GroupStats, keys: &Keys<'_>) -> Scored {
        // S and mu of a key are computed mostly once, for its groups are mostly of one size.
        let mut known = vec![(0.0, (0.0, 0.0)); self.blended.len()];
        let of_group = |(group, g): (usize, &Group)| {
            let key = keys.of_group(group);
            let (n, shrunk) = &mut known[key];
            if *n != g.n {
                (*n, *shrunk) = (g.n, self.blended[key].of_row(g.n, options.leave_one_out));
            }
            *shrunk
        };
        let shrunk: Vec<_> = groups.iter().enumerate().map(of_group).collect();
        finish(options, groups, &shrunk, self)
    }

    /// The same, where each group is shrunk toward priors of its own.
    pub(crate) fn score_without(self, options: &Options, groups: &GroupStats, without: &[Shrinkage]) -> Scored {
        let of_group = |(rest, g): (&Shrinkage, &Group)| rest.of_row(g.n, options.leave_one_out);
        let shrunk: Vec<_> = without.iter().zip(groups.iter()).map(of_group).collect();
        finish(options, groups, &shrunk, self)
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
    /// What stands in for the estimated S.
    pub fixed: Option<f64>,
}

impl Shrinkage {
    /// Those of one prior; 0 where it is empty.
    pub fn new(prior: &Prior, options: &Options) -> Self {
        Self {
            mu: prior.rewards().mean(),
            sigma2: prior.sigma2(options.sigma2, options.ddof),
            tau2: prior.tau2(options.tau2, options.ddof),
            fixed: options.shrinkage,
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
            fixed: own.fixed,
        }
    }

    /// S of a group of `n` rows: 0 where all rewards seen are equal, and for an empty prior, a fixed one included.
    #[inline]
    pub fn factor(&self, n: f64) -> f64 {
        let noise = self.sigma2 / n;
        let total = noise + self.tau2;
        if total > 0.0 { self.fixed.unwrap_or(noise / total) } else { 0.0 }
    }

    /// S and mean for a row of a group of `n`: S of the rows that its group's mean holds, 1 where it holds none.
    #[inline]
    pub(crate) fn of_row(&self, n: f64, left_out: LeaveOneOut) -> (f64, f64) {
        let s = match left_out {
            LeaveOneOut::Row if n > 1.0 => self.factor(n - 1.0),
            LeaveOneOut::Row => 1.0,
            LeaveOneOut::Nothing | LeaveOneOut::Group => self.factor(n),
        };
        (s, self.mu)
    }
}

/// The numbers each group is shrunk with where every prior on its way from the root holds the history and the batch
/// without that group, and without the other groups of its prompt; `found` are the keys of the visits in the history, as
/// [`Tree::forget`] left them.
pub(crate) fn leave_one_out_by_key(
    history: &Tree,
    options: &Options,
    groups: &GroupStats,
    visits: &Visits<'_>,
    found: &[Option<usize>],
    keys: &Keys<'_>,
) -> Vec<Shrinkage> {
    let all: Vec<usize> = (0..groups.len()).collect();
    let at_root = without_prompt_of_each(&history.root, groups, &all, keys);
    let mut blended: Vec<_> = at_root.iter().map(|rest| Shrinkage::new(rest, options)).collect();
    // A prefix comes after its parents, so each group passes through these first.
    for (prefix, &key) in visits.prefixes().iter().zip(found) {
        let list = visits.groups(prefix);
        let rests = without_prompt_of_each(&history.at(key), groups, list, keys);
        for (&group, rest) in list.iter().zip(&rests) {
            blended[group] = Shrinkage::blended(rest, blended[group], options);
        }
    }
    blended
}

/// For each group listed: history and those of other prompts. A group is a prompt of its own, unless the keys say more.
fn without_prompt_of_each(history: &Prior, groups: &GroupStats, list: &[usize], keys: &Keys<'_>) -> Vec<Prior> {
    let of_group = |group: usize| {
        let g = groups.get(group);
        Prior::of_group(g.n, g.mean, g.ssw)
    };
    let Some(prompts) = keys.prompts() else {
        return without_each(history, &list.iter().map(|&group| of_group(group)).collect::<Vec<_>>());
    };
    let (mut slots, mut parts) = (HashMap::new(), Vec::new());
    let slot_of: Vec<usize> = list
        .iter()
        .map(|&group| {
            let slot = *slots.entry(prompts[group]).or_insert(parts.len());
            if slot == parts.len() {
                parts.push(Prior::default());
            }
            parts[slot].merge(&of_group(group));
            slot
        })
        .collect();
    let rests = without_each(history, &parts);
    slot_of.into_iter().map(|slot| rests[slot]).collect()
}

/// For each part: history and all the parts but that one.
///
/// Prefixes and suffixes are merged rather than the part subtracted from the whole: where one part dominates, the
/// difference would have no digits left. Parts equal to the first leave exactly what it leaves: in a batch of equal groups
/// every difference is then exactly zero, as it is by algebra, and not the rounding of another order of merging.
fn without_each(history: &Prior, parts: &[Prior]) -> Vec<Prior> {
    let mut rests = vec![Prior::default(); parts.len()];
    let mut suffix = Prior::default();
    for (slot, part) in rests.iter_mut().zip(parts).rev() {
        *slot = suffix;
        suffix.merge(part);
    }
    let mut prefix = *history;
    for (slot, part) in rests.iter_mut().zip(parts) {
        let mut rest = prefix;
        rest.merge(slot);
        *slot = rest;
        prefix.merge(part);
    }
    for at in 1..parts.len() {
        if parts[at] == parts[0] {
            rests[at] = rests[0];
        }
    }
    rests
}

/// Steps 4 to 6, given `(S_m, mu_glob)` of each group.
fn finish(options: &Options, groups: &GroupStats, shrunk: &[(f64, f64)], targets: Targets) -> Scored {
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
    // What multiplies r - mu_m in raw; then the squares above are not those of raw, and nothing is divided by them.
    let slope = |g: &Group, s: f64| {
        if options.leave_one_out == LeaveOneOut::Row && g.n > 1.0 { 1.0 + (1.0 - s) / (g.n - 1.0) } else { 1.0 }
    };
    let slopes: Vec<f64> = groups.iter().zip(shrunk).map(|(g, &(s, _))| slope(g, s)).collect();
    let affine = Affine {
        // mu_m - (b_m - centre), not V_m + centre: where every b_m is the same this is exactly mu_m.
        offset: groups.iter().zip(&biases).zip(&slopes).map(|((g, b), slope)| g.mean - (b - centre) / slope).collect(),
        scale: slopes.iter().map(|slope| slope * scale).collect(),
    };
    let shrinkage = groups.iter().zip(shrunk).map(|(g, s)| or_nan(g, s.0)).collect();
    let baseline = groups.iter().zip(&biases).map(|(g, b)| or_nan(g, g.mean - b)).collect();
    Scored { affine, shrinkage, baseline, targets }
}

/// `1 / (std + eps)`, `1 / (rms + eps)` or 1; 0 where the denominator is 0, since every deviation then is, or has no finite
/// reciprocal, since the spread then is 0.
#[inline]
pub(crate) fn inverse_scale(options: &Options, rows: f64, squares: f64) -> f64 {
    let divisor = match options.normalize {
        Normalize::None => return 1.0,
        Normalize::Scale => rows,
        Normalize::Batch => rows - f64::from(options.norm_ddof),
    };
    let spread = if divisor > 0.0 { (squares / divisor).sqrt() } else { 0.0 };
    reciprocal_or_zero(spread + options.eps)
}

/// `1 / x`; 0 where that is not finite, so that its product with 0 is 0.
#[inline]
pub(crate) fn reciprocal_or_zero(x: f64) -> f64 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}
