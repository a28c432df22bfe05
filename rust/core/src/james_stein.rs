//! Two-level leave-one-out James-Stein baseline (arXiv 2511.03710), for comparison.
//!
//! ```text
//! b_mi  = (1 - l_m) mu_m^{-i} + l_m mubar_{-m}          A_mi = r_mi - b_mi
//! v_-m  = mean over the other groups of s_k^2 / n_k     (s_k^2 with n_k - 1; groups of one row left out)
//! s_-m  = variance of the other groups' means
//! l_m   = (K - 1) / K * v_-m / (v_-m + s_-m)            1 for a group of one row, 0 if it is the only group
//! ```

use crate::groups::Group;
use crate::{Affine, GroupStats, Moments};

/// The other groups' noise and spread, mergeable so that each group can be left out without subtraction.
#[derive(Clone, Copy, Default)]
struct Others {
    means: Moments,
    noise: f64,
    noisy: f64,
}

impl Others {
    fn of(g: &Group) -> Self {
        if g.n == 0.0 {
            return Self::default();
        }
        let means = Moments::new(1.0, g.mean, 0.0);
        if g.n < 2.0 {
            return Self { means, noise: 0.0, noisy: 0.0 };
        }
        Self { means, noise: g.ssw / (g.n - 1.0) / g.n, noisy: 1.0 }
    }

    fn merge(&mut self, other: &Self) {
        self.means.merge(&other.means);
        self.noise += other.noise;
        self.noisy += other.noisy;
    }

    fn lambda(&self) -> f64 {
        let others = self.means.count();
        let v = if self.noisy > 0.0 { self.noise / self.noisy } else { 0.0 };
        let total = v + self.means.variance(0);
        if others > 0.0 && total > 0.0 { others / (others + 1.0) * (v / total) } else { 0.0 }
    }
}

/// The advantages of a batch under that baseline.
///
/// Both leave-one-outs are affine in the reward itself: with `f = n / (n - 1)` and `a = (1 - l) f + l`,
/// `A = a (r - mu) + l (mu - mubar)`.
pub(crate) fn james_stein(groups: &GroupStats) -> Affine {
    let mut suffixes = vec![Others::default(); groups.len()];
    let mut suffix = Others::default();
    for (slot, g) in suffixes.iter_mut().zip(groups.iter()).rev() {
        *slot = suffix;
        suffix.merge(&Others::of(g));
    }
    let mut prefix = Others::default();
    let mut affine = Affine::default();
    for (g, suffix) in groups.iter().zip(&suffixes) {
        let mut others = prefix;
        others.merge(suffix);
        prefix.merge(&Others::of(g));
        let alone = others.means.count() == 0.0;
        let (scale, pull) = match g.n {
            n if n < 1.0 || (n < 2.0 && alone) => (0.0, 0.0),
            n if n < 2.0 => (1.0, 1.0),
            n => {
                let lambda = others.lambda();
                ((1.0 - lambda) * (n / (n - 1.0)) + lambda, lambda)
            }
        };
        let shift = if scale > 0.0 { pull * (g.mean - others.means.mean()) / scale } else { 0.0 };
        affine.offset.push(g.mean - shift);
        affine.scale.push(scale);
    }
    affine
}
