//! The estimator's state behind a lock, held for arithmetic over the groups' statistics and never while anything waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpo_core::{Float, GroupStats, Moments, Options, Prior, Sigma2, State, Tau2, apply};
use numpy::{Element, IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{Groups, Mask, Rewards, batch_of, detached};
use crate::error::{BindingError, Result};
use crate::options::PyOptions;

/// count, mean and M2 of the rewards; the same of the group means; ssw, dof, `inv_n`.
type Parts = (f64, f64, f64, f64, f64, f64, f64, f64, f64);
type Vector<'py> = Bound<'py, PyArray1<f64>>;
/// `mu_glob`, sigma2, tau2, failed and passed shares of saturated groups, outlier.
type Scalars = (f64, f64, f64, f64, f64, f64);
type Advanced<'py> = (Bound<'py, PyAny>, (Vector<'py>, Vector<'py>, Vector<'py>), Scalars);

/// A prior and the id of the last update applied to it.
#[pyclass(name = "State", module = "ebpo_core._core", frozen)]
#[derive(Default)]
pub(crate) struct PyState(Mutex<State>);

impl PyState {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under the lock can panic half-way through a change of this plain value.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prior(&self) -> Prior {
        self.lock().prior
    }
}

#[pymethods]
impl PyState {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Score flat rewards and, if `update`, take them into the prior.
    #[pyo3(signature = (options, rewards, groups, mask, update, step))]
    #[allow(clippy::too_many_arguments)] // the interpreter and the batch; a struct would only be taken apart again
    fn advance<'py>(
        &self,
        py: Python<'py>,
        options: &PyOptions,
        rewards: Rewards<'py>,
        groups: Groups<'py>,
        mask: Mask<'py>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Advanced<'py>> {
        match rewards {
            Rewards::F32(rewards) => self.advance_as(py, &options.0, &rewards, &groups, &mask, update, step),
            Rewards::F64(rewards) => self.advance_as(py, &options.0, &rewards, &groups, &mask, update, step),
        }
    }

    /// Take flat rewards into the prior.
    fn observe<'py>(&self, py: Python<'py>, rewards: Rewards<'py>, groups: Groups<'py>, mask: Mask<'py>) -> Result<()> {
        let stats = match rewards {
            Rewards::F32(rewards) => collect(py, &rewards, &groups, &mask)?,
            Rewards::F64(rewards) => collect(py, &rewards, &groups, &mask)?,
        };
        let batch = Prior::of(&stats);
        self.lock().prior.merge(&batch);
        Ok(())
    }

    /// Add what another state has seen; the newer step id stays.
    fn merge(&self, other: &Self) {
        let other = *other.lock(); // copied out first: the two may be one and the same
        let mut state = self.lock();
        state.prior.merge(&other.prior);
        state.step = state.step.max(other.step);
    }

    /// Multiply every count and sum by `rho`.
    fn decay(&self, rho: f64) -> Result<()> {
        let options = Options { decay: rho, ..Options::default() };
        options.validate()?;
        self.lock().prior.decay(rho);
        Ok(())
    }

    /// The prior as nine numbers, and the step.
    fn parts(&self) -> (Parts, Option<i64>) {
        let State { prior, step } = *self.lock();
        let (rewards, means) = (prior.rewards(), prior.means());
        let parts = (
            rewards.count(),
            rewards.mean(),
            rewards.m2(),
            means.count(),
            means.mean(),
            means.m2(),
            prior.ssw(),
            prior.dof(),
            prior.inv_n(),
        );
        (parts, step)
    }

    /// Replace everything by parts of that form, which are checked first.
    fn load(&self, parts: Parts, step: Option<i64>) -> Result<()> {
        let rewards = Moments::from_parts(parts.0, parts.1, parts.2)?;
        let means = Moments::from_parts(parts.3, parts.4, parts.5)?;
        let prior = Prior::from_parts(rewards, means, parts.6, parts.7, parts.8)?;
        *self.lock() = State { prior, step };
        Ok(())
    }

    fn sigma2(&self, kind: &str, ddof: u8) -> Result<f64> {
        let kind = Sigma2::parse(kind)?;
        Options { ddof, ..Options::default() }.validate()?;
        Ok(self.prior().sigma2(kind, ddof))
    }

    fn tau2(&self, kind: &str, ddof: u8) -> Result<f64> {
        let kind = Tau2::parse(kind)?;
        Options { ddof, ..Options::default() }.validate()?;
        Ok(self.prior().tau2(kind, ddof))
    }
}

impl PyState {
    #[allow(clippy::too_many_arguments)] // see `advance`
    fn advance_as<'py, T: Float + Element>(
        &self,
        py: Python<'py>,
        options: &Options,
        rewards: &PyReadonlyArray1<'py, T>,
        groups: &Groups<'_>,
        mask: &Mask<'_>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Advanced<'py>> {
        // Whatever can fail comes before the state changes.
        let batch = batch_of(rewards, groups, mask)?;
        let out = PyArray1::<T>::zeros(py, rewards.len(), false);
        let mut writable = out.try_readwrite()?;
        let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
        let stats = detached(py, rewards.len(), || GroupStats::collect(&batch))?;
        let scored = self.lock().advance(options, &stats, update, step);

        let before = scored.before.rewards();
        let spread = before.variance(0).sqrt();
        let outlier = detached(py, rewards.len(), || {
            apply(&batch, &scored.affine, slots);
            if spread > 0.0 { batch.max_distance(before.mean()) / spread } else { f64::NAN }
        });
        drop(writable);
        let prior = scored.prior;
        let or_nan = |value: f64| if prior.is_empty() { f64::NAN } else { value };
        let (fail, pass) = stats.saturated(if prior.is_empty() { 0.0 } else { prior.rewards().mean() });
        let scalars = (
            or_nan(prior.rewards().mean()),
            or_nan(prior.sigma2(options.sigma2, options.ddof)),
            or_nan(prior.tau2(options.tau2, options.ddof)),
            fail,
            pass,
            outlier,
        );
        let vector = |values: Vec<f64>| values.into_pyarray(py);
        let vectors = (vector(scored.shrinkage), vector(scored.baseline), vector(stats.counts()));
        Ok((out.into_any(), vectors, scalars))
    }
}

fn collect<T: Float + Element>(
    py: Python<'_>,
    rewards: &PyReadonlyArray1<'_, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
) -> Result<GroupStats> {
    let batch = batch_of(rewards, groups, mask)?;
    Ok(detached(py, rewards.len(), || GroupStats::collect(&batch))?)
}
