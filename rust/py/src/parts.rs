//! Priors as plain numbers and keys as lists of strings, the form in which Python stores them.

use ebpo_core::{Moments, Path, Prior, Tree};

use crate::error::Result;

/// count, mean and M2 of the rewards; the same of the group means; ssw, dof, `inv_n`.
pub(crate) type Parts = (f64, f64, f64, f64, f64, f64, f64, f64, f64);
/// The root's prior, and each key's.
pub(crate) type TreeParts = (Parts, Vec<(Path, Parts)>);

pub(crate) fn parts_of(prior: &Prior) -> Parts {
    let (rewards, means) = (prior.rewards(), prior.means());
    (
        rewards.count(),
        rewards.mean(),
        rewards.m2(),
        means.count(),
        means.mean(),
        means.m2(),
        prior.ssw(),
        prior.dof(),
        prior.inv_n(),
    )
}

pub(crate) fn prior_of(parts: Parts) -> Result<Prior> {
    let rewards = Moments::from_parts(parts.0, parts.1, parts.2)?;
    let means = Moments::from_parts(parts.3, parts.4, parts.5)?;
    Ok(Prior::from_parts(rewards, means, parts.6, parts.7, parts.8)?)
}

pub(crate) fn tree_parts(tree: &Tree) -> TreeParts {
    (parts_of(&tree.root), tree.keys().map(|(path, prior)| (path.clone(), parts_of(prior))).collect())
}

pub(crate) fn tree_of((root, keys): TreeParts) -> Result<Tree> {
    let keys: Result<Vec<_>> = keys.into_iter().map(|(path, parts)| Ok((path, prior_of(parts)?))).collect();
    Ok(Tree::from_parts(prior_of(root)?, keys?)?)
}
