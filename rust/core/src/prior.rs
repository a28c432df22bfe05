//! The running prior: the paper's two accumulators, and the sums that its refinements need.

use crate::groups::Group;
use crate::{Error, GroupStats, Moments, Sigma2, Tau2};

/// Sufficient statistics of all rewards seen so far (paper §3.2: `W_glob` and `W_group`; ours: the sums within groups).
///
/// Merging is associative and commutative up to rounding and equals having seen all the data.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prior {
    rewards: Moments,
    means: Moments,
    ssw: f64,
    dof: f64,
    inv_n: f64,
}

impl Prior {
    /// A prior from its parts: moments of the rewards and of the group means, `sum SSW_m`, `sum (n_m - 1)`, `sum 1/n_m`.
    pub fn from_parts(rewards: Moments, means: Moments, ssw: f64, dof: f64, inv_n: f64) -> Result<Self, Error> {
        for (field, value) in [("ssw", ssw), ("dof", dof), ("inv_n", inv_n)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::InvalidState { field, value, expected: "a finite number, at least 0" });
            }
        }
        if (rewards.count() == 0.0) != (means.count() == 0.0) {
            let (field, value) = ("group_means.count", means.count());
            return Err(Error::InvalidState { field, value, expected: "0 exactly when rewards.count is 0" });
        }
        // What holds exactly of data holds of the stored sums up to their rounding.
        let (n, slack) = (rewards.count(), 1e-6);
        let checks = [
            ("group_means.count", means.count(), means.count() <= n * (1.0 + slack), "at most rewards.count"),
            ("ssw", ssw, ssw <= rewards.m2() * (1.0 + slack), "at most rewards.m2"),
            ("dof", dof, (dof - (n - means.count())).abs() <= slack * n, "rewards.count - group_means.count"),
            ("inv_n", inv_n, inv_n <= means.count() * (1.0 + slack), "at most group_means.count"),
        ];
        for (field, value, holds, expected) in checks {
            if !holds {
                return Err(Error::InvalidState { field, value, expected });
            }
        }
        Ok(Self { rewards, means, ssw, dof, inv_n })
    }

    /// A prior of the numbers that [`Prior::parts`] gives.
    pub fn of_parts(parts: &[f64; 9]) -> Result<Self, Error> {
        let [n, mean, m2, groups, mean_of_means, m2_of_means, ssw, dof, inv_n] = *parts;
        let rewards = Moments::from_parts(n, mean, m2)?;
        Self::from_parts(rewards, Moments::from_parts(groups, mean_of_means, m2_of_means)?, ssw, dof, inv_n)
    }

    /// count, mean and M2 of the rewards; the same of the group means; `sum SSW_m`, `sum (n_m - 1)`, `sum 1/n_m`.
    pub fn parts(&self) -> [f64; 9] {
        let (r, m) = (&self.rewards, &self.means);
        [r.count(), r.mean(), r.m2(), m.count(), m.mean(), m.m2(), self.ssw, self.dof, self.inv_n]
    }

    #[inline]
    pub(crate) fn new(rewards: Moments, means: Moments, ssw: f64, dof: f64, inv_n: f64) -> Self {
        Self { rewards, means, ssw, dof, inv_n }
    }

    /// Statistics of one group with `n` valid rows.
    pub(crate) fn of_group(n: f64, mean: f64, ssw: f64) -> Self {
        if n == 0.0 {
            return Self::default();
        }
        Self::new(Moments::new(n, mean, ssw), Moments::new(1.0, mean, 0.0), ssw, n - 1.0, 1.0 / n)
    }

    /// Statistics of a batch.
    #[inline(never)] // a caller's live values would push the sums out of registers
    pub fn of(groups: &GroupStats) -> Self {
        Self::of_groups(groups.iter())
    }

    /// Statistics of some groups.
    #[inline]
    pub(crate) fn of_groups<'a>(groups: impl Iterator<Item = &'a Group> + Clone) -> Self {
        let mut rows = 0.0;
        let mut count = 0.0;
        let Some(first) = groups.clone().find(|g| g.n > 0.0).map(|g| g.mean) else {
            return Self::default();
        };
        // Means about the first group's, so that equal groups have exactly the common mean.
        let (mut by_row, mut by_group, mut ssw, mut dof, mut inv_n) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for g in groups.clone().filter(|g| g.n > 0.0) {
            rows += g.n;
            count += 1.0;
            by_row += g.n * (g.mean - first);
            by_group += g.mean - first;
            ssw += g.ssw;
            dof += g.n - 1.0;
            inv_n += 1.0 / g.n;
        }
        let mean_of_rows = first + by_row / rows;
        let mean_of_means = first + by_group / count;
        let (mut between_rows, mut between_means) = (0.0, 0.0);
        for g in groups.filter(|g| g.n > 0.0) {
            let (d, e) = (g.mean - mean_of_rows, g.mean - mean_of_means);
            between_rows += g.n * d * d;
            between_means += e * e;
        }
        Self::new(
            Moments::new(rows, mean_of_rows, ssw + between_rows),
            Moments::new(count, mean_of_means, between_means),
            ssw,
            dof,
            inv_n,
        )
    }

    /// True where nothing has been seen, or everything has been forgotten.
    pub fn is_empty(&self) -> bool {
        self.rewards.count() == 0.0
    }

    /// Add everything another prior has seen.
    pub fn merge(&mut self, other: &Self) {
        self.rewards.merge(&other.rewards);
        self.means.merge(&other.means);
        self.ssw += other.ssw;
        self.dof += other.dof;
        self.inv_n += other.inv_n;
    }

    /// Multiply every count and sum by `rho`; means and variances stay.
    pub fn decay(&mut self, rho: f64) {
        self.rewards.decay(rho);
        self.means.decay(rho);
        self.ssw *= rho;
        self.dof *= rho;
        self.inv_n *= rho;
        // Below this a product has lost digits, and the sums would no longer agree with each other.
        if self.rewards.count() < f64::MIN_POSITIVE || self.means.count() < f64::MIN_POSITIVE {
            *self = Self::default();
        }
    }

    /// Moments of all rewards (`W_glob`).
    pub fn rewards(&self) -> &Moments {
        &self.rewards
    }

    /// Moments of the group means (`W_group`).
    pub fn means(&self) -> &Moments {
        &self.means
    }

    /// Sum over groups of the sum of squares within.
    pub fn ssw(&self) -> f64 {
        self.ssw
    }

    /// Sum over groups of `n - 1`.
    pub fn dof(&self) -> f64 {
        self.dof
    }

    /// Sum over groups of `1 / n`.
    pub fn inv_n(&self) -> f64 {
        self.inv_n
    }

    /// Variance of a reward about its group's mean, as `kind` estimates it.
    pub fn sigma2(&self, kind: Sigma2, ddof: u8) -> f64 {
        match kind {
            Sigma2::Within if self.dof > 0.0 => self.ssw / self.dof,
            _ => self.rewards.variance(ddof),
        }
    }

    /// Variance of the groups' true means, as `kind` estimates it.
    pub fn tau2(&self, kind: Tau2, ddof: u8) -> f64 {
        match kind {
            Tau2::Raw => self.means.variance(ddof),
            Tau2::Debiased if self.is_empty() => 0.0,
            Tau2::Debiased => {
                let noise = self.sigma2(Sigma2::Within, ddof) * (self.inv_n / self.means.count());
                (self.means.variance(1) - noise).max(0.0)
            }
        }
    }
}
