//! The stateless methods that users compare EBPO with, in one enum.

use crate::estimator::inverse_scale;
use crate::groups::Group;
use crate::james_stein::james_stein;
use crate::options::check_eps;
use crate::{Affine, Error, GroupStats, Normalize, Options, Prior};

/// A method other than EBPO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `(r - mu) / (s + eps)`, s with n - 1; 0 where s = 0 or n = 1.
    Grpo,
    /// `r - mu`.
    DrGrpo,
    /// `r` less the mean of the group's other rewards, `n / (n - 1) (r - mu)`; 0 where n = 1.
    Rloo,
    /// `(r - mean) / (std + eps)` over the batch, std with n - 1.
    ReinforcePp,
    /// See the module `james_stein`.
    JamesStein,
}

impl Method {
    /// The method of that name.
    pub fn parse(name: &str) -> Result<Self, Error> {
        match name {
            "grpo" => Ok(Self::Grpo),
            "dr_grpo" => Ok(Self::DrGrpo),
            "rloo" => Ok(Self::Rloo),
            "reinforce_pp" => Ok(Self::ReinforcePp),
            "james_stein" => Ok(Self::JamesStein),
            _ => Err(Error::InvalidOption {
                name: "method",
                value: format!("{name:?}"),
                expected: "\"ebpo\", \"grpo\", \"dr_grpo\", \"rloo\", \"reinforce_pp\" or \"james_stein\"",
            }),
        }
    }

    /// The advantages of a batch; `eps` matters to those that divide by a standard deviation.
    pub fn affine(self, groups: &GroupStats, eps: f64) -> Result<Affine, Error> {
        check_eps(eps)?;
        Ok(match self {
            Self::Grpo => about_means(groups, |g| {
                let variance = g.ssw / (g.n - 1.0); // NaN of one row, and of none
                if variance > 0.0 { 1.0 / (variance.sqrt() + eps) } else { 0.0 }
            }),
            Self::DrGrpo => about_means(groups, |_| 1.0),
            Self::Rloo => about_means(groups, |g| if g.n > 1.0 { g.n / (g.n - 1.0) } else { 0.0 }),
            Self::ReinforcePp => {
                let batch = *Prior::of(groups).rewards();
                let options = Options { normalize: Normalize::Batch, eps, ..Options::default() };
                let scale = inverse_scale(&options, batch.count(), batch.m2());
                Affine { offset: vec![batch.mean(); groups.len()], scale: vec![scale; groups.len()] }
            }
            Self::JamesStein => james_stein(groups),
        })
    }
}

/// `(r - mu_m) * scale(m)`.
fn about_means(groups: &GroupStats, scale: impl Fn(&Group) -> f64) -> Affine {
    Affine { offset: groups.iter().map(|g| g.mean).collect(), scale: groups.iter().map(scale).collect() }
}
