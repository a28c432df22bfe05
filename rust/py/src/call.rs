//! What a call of the estimator leaves for its diagnostics, which are computed when they are asked for.

use ebpo_core::{Batch, EqualGroups, Float, GroupStats, Keys, Layout, Options, Scored, Shrinkage, Targets};
use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

use crate::error::{BindingError, Result};
use crate::keys::GroupKeys;

type Vector<'py> = Bound<'py, PyArray1<f64>>;
/// `mu_glob`, sigma2, tau2, failed and passed shares of saturated groups, outlier, size of their advantages.
type Scalars = (f64, f64, f64, f64, f64, f64, f64);
/// S, V, n of each group, and with keys the blended mean, sigma2 and tau2.
type Vectors<'py> = (Vector<'py>, Vector<'py>, Vector<'py>, Option<(Vector<'py>, Vector<'py>, Vector<'py>)>);

/// What one call was given and was scored with: its own copies, so that neither a later call nor a change of the caller's
/// arrays changes what it says.
#[pyclass(name = "Call", module = "ebpo_core._core", frozen)]
pub(crate) struct PyCall {
    options: Options,
    kept: Kept,
}

pub(crate) enum Kept {
    /// The groups' statistics, and the largest distance of a counted reward from the root's mean before the batch.
    Groups { scored: Scored, stats: GroupStats, farthest: f64, key_of_group: Option<Vec<u32>> },
    /// A copy of the rewards, the keys, and what the groups were shrunk toward.
    Matrix { rewards: Values, keys: Option<GroupKeys>, targets: Targets },
}

/// A C-contiguous matrix of either element type that nothing else refers to.
pub(crate) enum Values {
    F32(Py<PyArray2<f32>>),
    F64(Py<PyArray2<f64>>),
}

impl PyCall {
    pub(crate) fn new(options: &Options, kept: Kept) -> Self {
        Self { options: *options, kept }
    }

    /// The diagnostics of a matrix, for which its call computed none: by the general path.
    fn of_matrix<'py, T: Float + Element>(
        &self,
        rewards: &Bound<'py, PyArray2<T>>,
        given: Option<&GroupKeys>,
        targets: &Targets,
    ) -> Result<(Vectors<'py>, Scalars)> {
        let (py, size) = (rewards.py(), rewards.dims()[1]);
        let readable = rewards.try_readonly()?;
        let values = readable.as_slice().map_err(|_| BindingError::NotContiguous)?;
        let batch = Batch::new(values, Layout::Equal { size }, None)?;
        let stats = GroupStats::collect(&batch)?;
        let keys = given.map_or(Ok(Keys::ROOT), GroupKeys::keys)?;
        let mut scored = targets.clone().score(&self.options, &stats, &keys);
        if let Some(equal) = EqualGroups::collect(values, size, keys, 1) {
            scored.affine = equal.affine(&self.options, &targets.blended); // to the bit what the call did
        }
        let scalars = self.scalars(&scored, &stats, batch.max_distance(targets.before.rewards().mean()));
        Ok((vectors(py, &scored, &stats, given.map(|keys| &keys.of_group[..])), scalars))
    }

    /// The diagnostics of the whole batch; `farthest` is the largest distance of a counted reward from the mean before.
    fn scalars(&self, scored: &Scored, stats: &GroupStats, farthest: f64) -> Scalars {
        let (options, before, prior) = (&self.options, scored.targets.before.rewards(), &scored.targets.prior);
        let spread = before.variance(0).sqrt();
        let or_nan = |value: f64| if prior.is_empty() { f64::NAN } else { value };
        let (fail, pass) = stats.saturated(if prior.is_empty() { 0.0 } else { prior.rewards().mean() });
        (
            or_nan(prior.rewards().mean()),
            or_nan(prior.sigma2(options.sigma2, options.ddof)),
            or_nan(prior.tau2(options.tau2, options.ddof)),
            fail,
            pass,
            if spread > 0.0 { farthest / spread } else { f64::NAN },
            scored.dead_advantage(stats),
        )
    }
}

#[pymethods]
impl PyCall {
    /// Groups with a counted row.
    fn prompts(&self, py: Python<'_>) -> usize {
        match &self.kept {
            Kept::Groups { stats, .. } => stats.counts().iter().filter(|&&n| n > 0.0).count(),
            Kept::Matrix { rewards: Values::F32(rewards), .. } => rewards.bind(py).dims()[0],
            Kept::Matrix { rewards: Values::F64(rewards), .. } => rewards.bind(py).dims()[0],
        }
    }

    /// S, V, n of each group and the blended priors with keys; then `mu_glob`, sigma2, tau2, the shares of saturated groups
    /// that failed and passed, the outlier, and the size of the saturated groups' advantages.
    fn diagnostics<'py>(&self, py: Python<'py>) -> Result<(Vectors<'py>, Scalars)> {
        match &self.kept {
            Kept::Groups { scored, stats, farthest, key_of_group } => {
                let scalars = self.scalars(scored, stats, *farthest);
                Ok((vectors(py, scored, stats, key_of_group.as_deref()), scalars))
            }
            Kept::Matrix { rewards, keys, targets } => match rewards {
                Values::F32(rewards) => self.of_matrix(rewards.bind(py), keys.as_ref(), targets),
                Values::F64(rewards) => self.of_matrix(rewards.bind(py), keys.as_ref(), targets),
            },
        }
    }
}

/// The diagnostics of each group.
fn vectors<'py>(py: Python<'py>, scored: &Scored, stats: &GroupStats, key_of_group: Option<&[u32]>) -> Vectors<'py> {
    let vector = |values: Vec<f64>| values.into_pyarray(py);
    let blended = key_of_group.map(|keys| {
        let blended = &scored.targets.blended;
        let of_group =
            |field: fn(&Shrinkage) -> f64| vector(keys.iter().map(|&key| field(&blended[key as usize])).collect());
        (of_group(|b| b.mu), of_group(|b| b.sigma2), of_group(|b| b.tau2))
    });
    (vector(scored.shrinkage.clone()), vector(scored.baseline.clone()), vector(stats.counts()), blended)
}
