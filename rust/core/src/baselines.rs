//! The stateless methods that users compare EBPO with, in one enum.

use crate::batch::Batch;
use crate::estimator::{inverse_scale, reciprocal_or_zero};
use crate::float::Float;
use crate::groups::Group;
use crate::james_stein::james_stein;
use crate::options::check_eps;
use crate::pass_at_k::pass_at_k;
use crate::{Affine, Error, GroupStats, Normalize, Options, Prior, apply};

/// A method other than EBPO, with its one parameter where it has one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// `(r - mu) / (s + eps)`, s with n - 1; 0 where s = 0 or n = 1.
    Grpo(f64),
    /// `r - mu`.
    DrGrpo,
    /// `r` less the mean of the group's other rewards, `n / (n - 1) (r - mu)`; 0 where n = 1.
    Rloo,
    /// `(r - mean) / (std + eps)` over the batch, std with n - 1.
    ReinforcePp(f64),
    /// See the module `james_stein`.
    JamesStein,
    /// `r - c`.
    Constant(f64),
    /// `r - mean` over the batch.
    BatchMean,
    /// `(r - mu) / (mu + eps)` for rewards of at least 0; 0 where mu = 0, or `mu + eps` has no finite reciprocal.
    MaxRl(f64),
    /// See the module `pass_at_k`.
    PassAtK(f64),
}

impl Method {
    /// The method of that name, with its parameter: `eps`, `c` or `k`, by the name; ignored by the others.
    pub fn parse(name: &str, parameter: f64) -> Result<Self, Error> {
        let method = match name {
            "grpo" => Self::Grpo(parameter),
            "dr_grpo" => Self::DrGrpo,
            "rloo" => Self::Rloo,
            "reinforce_pp" => Self::ReinforcePp(parameter),
            "james_stein" => Self::JamesStein,
            "constant" => Self::Constant(parameter),
            "batch_mean" => Self::BatchMean,
            "maxrl" => Self::MaxRl(parameter),
            "pass_at_k" => Self::PassAtK(parameter),
            _ => {
                return Err(Error::InvalidOption {
                    name: "method",
                    value: format!("{name:?}"),
                    expected: "\"ebpo\", \"grpo\", \"dr_grpo\", \"rloo\", \"reinforce_pp\", \"james_stein\", \"constant\", \
                               \"batch_mean\", \"maxrl\", \"pass_at_k\" or \"gdpo\"",
                });
            }
        };
        match method {
            Self::Grpo(eps) | Self::ReinforcePp(eps) | Self::MaxRl(eps) => check_eps(eps)?,
            Self::Constant(c) if !(c.is_finite() && c.abs() <= crate::MAX_REWARD) => {
                let expected = "a finite number of a reward's magnitude";
                return Err(Error::InvalidOption { name: "c", value: c.to_string(), expected });
            }
            Self::PassAtK(k) if !(k >= 1.0 && k.fract() == 0.0) => {
                let expected = "a whole number, at least 1";
                return Err(Error::InvalidOption { name: "k", value: k.to_string(), expected });
            }
            _ => {}
        }
        Ok(method)
    }

    /// Write the advantages of a batch; rows that do not count keep what `out` holds, which must be 0.
    pub fn advantages<T: Float>(self, batch: &Batch<'_, T>, out: &mut [T]) -> Result<(), Error> {
        let stats = GroupStats::collect(batch)?;
        match self {
            Self::PassAtK(k) => return pass_at_k(batch, k, out),
            Self::MaxRl(_) => batch.check_non_negative("maxrl")?,
            _ => {}
        }
        apply(batch, &self.affine(&stats), out);
        Ok(())
    }

    /// Offset and scale of each group, for the methods that have that form.
    fn affine(self, groups: &GroupStats) -> Affine {
        let everywhere =
            |offset: f64, scale: f64| Affine { offset: vec![offset; groups.len()], scale: vec![scale; groups.len()] };
        match self {
            Self::Grpo(eps) => about_means(groups, |g| {
                let variance = g.ssw / (g.n - 1.0); // NaN of one row, and of none
                if variance > 0.0 { 1.0 / (variance.sqrt() + eps) } else { 0.0 }
            }),
            Self::DrGrpo => about_means(groups, |_| 1.0),
            Self::Rloo => about_means(groups, |g| if g.n > 1.0 { g.n / (g.n - 1.0) } else { 0.0 }),
            Self::ReinforcePp(eps) => {
                let batch = *Prior::of(groups).rewards();
                let options = Options { normalize: Normalize::Batch, eps, ..Options::default() };
                everywhere(batch.mean(), inverse_scale(&options, batch.count(), batch.m2()))
            }
            Self::JamesStein => james_stein(groups),
            Self::Constant(c) => everywhere(c, 1.0),
            Self::BatchMean => everywhere(Prior::of(groups).rewards().mean(), 1.0),
            Self::MaxRl(eps) => {
                about_means(groups, |g| if g.mean > 0.0 { reciprocal_or_zero(g.mean + eps) } else { 0.0 })
            }
            Self::PassAtK(_) => Affine::default(), // not of that form
        }
    }
}

/// `(r - mu_m) * scale(m)`.
fn about_means(groups: &GroupStats, scale: impl Fn(&Group) -> f64) -> Affine {
    Affine { offset: groups.iter().map(|g| g.mean).collect(), scale: groups.iter().map(scale).collect() }
}
