//! The estimator's state behind a lock, held for arithmetic over the groups' statistics and never while anything waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpo_core::{Float, GroupStats, Keys, Options, Path, Prior, Scored, Shrinkage, Sigma2, State, Tau2, Tree, apply};
use numpy::{Element, IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{Groups, Mask, Rewards, batch_of, detached, slice};
use crate::error::{BindingError, Result};
use crate::options::PyOptions;
use crate::parts::{Parts, TreeParts, parts_of, tree_of, tree_parts};

pub(crate) type Vector<'py> = Bound<'py, PyArray1<f64>>;
/// The distinct keys of a batch, and each group's index into them.
type BatchKeys<'py> = Option<(Vec<Path>, PyReadonlyArray1<'py, u32>)>;
/// `mu_glob`, sigma2, tau2, failed and passed shares of saturated groups, outlier, size of their advantages.
type Scalars = (f64, f64, f64, f64, f64, f64, f64);
/// S, V, n of each group, and with keys the blended mean, sigma2 and tau2.
type Vectors<'py> = (Vector<'py>, Vector<'py>, Vector<'py>, Option<(Vector<'py>, Vector<'py>, Vector<'py>)>);
type Advanced<'py> = (Bound<'py, PyAny>, Vectors<'py>, Scalars);

/// The priors and the id of the last update applied.
#[pyclass(name = "State", module = "ebpo_core._core", frozen)]
#[derive(Default)]
pub(crate) struct PyState(Mutex<State>);

impl PyState {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that runs under the lock can panic half-way through a change of it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn root(&self) -> Prior {
        self.lock().tree().root
    }
}

#[pymethods]
impl PyState {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Score flat rewards and, if `update`, take them into the prior. `stream` scores one group as it comes.
    #[pyo3(signature = (options, rewards, groups, mask, update, step, keys, stream))]
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
        keys: BatchKeys<'py>,
        stream: bool,
    ) -> Result<Advanced<'py>> {
        let score = |stats: &GroupStats| {
            let keys = match &keys {
                None => Keys::ROOT,
                Some((paths, of_group)) => Keys::new(paths, slice(of_group)?, stats.len())?,
            };
            let mut state = self.lock();
            let scored = if stream {
                state.stream(&options.0, stats, &keys, update, step)
            } else {
                state.advance(&options.0, stats, &keys, update, step)
            };
            Ok((scored?, keys))
        };
        match rewards {
            Rewards::F32(rewards) => advance_as(py, &options.0, &rewards, &groups, &mask, score),
            Rewards::F64(rewards) => advance_as(py, &options.0, &rewards, &groups, &mask, score),
        }
    }

    /// Take flat rewards into the prior.
    fn observe<'py>(&self, py: Python<'py>, rewards: Rewards<'py>, groups: Groups<'py>, mask: Mask<'py>) -> Result<()> {
        let stats = match rewards {
            Rewards::F32(rewards) => collect(py, &rewards, &groups, &mask)?,
            Rewards::F64(rewards) => collect(py, &rewards, &groups, &mask)?,
        };
        let batch = Prior::of(&stats);
        self.lock().observe(&batch);
        Ok(())
    }

    /// Add what another state has seen; the newer step id stays.
    fn merge(&self, other: &Self, max_keys: usize) -> Result<()> {
        let other = other.lock().clone(); // copied out first: the two may be one and the same
        Ok(self.lock().merge(&other, max_keys)?)
    }

    /// Multiply every count and sum by `rho`.
    fn decay(&self, rho: f64) -> Result<()> {
        let options = Options { decay: rho, ..Options::default() };
        options.validate()?;
        self.lock().decay(rho);
        Ok(())
    }

    /// The root's prior as nine numbers, and the step.
    fn parts(&self) -> (Parts, Option<i64>) {
        let state = self.lock();
        (parts_of(&state.tree().root), state.step())
    }

    /// The root's prior, every key's, and the step.
    fn tree(&self) -> (TreeParts, Option<i64>) {
        let state = self.lock();
        (tree_parts(state.tree()), state.step())
    }

    /// Replace everything by parts of that form, which are checked first.
    fn load(&self, root: Parts, keys: Vec<(Path, Parts)>, step: Option<i64>, max_keys: usize) -> Result<()> {
        let tree = tree_of((root, keys))?;
        Tree::default().check_room(&tree, max_keys)?;
        *self.lock() = State::new(tree, step);
        Ok(())
    }

    /// Mean, sigma2 and tau2 of a key, blended with its parents'.
    fn shrunken(&self, options: &PyOptions, path: Path) -> (f64, f64, f64) {
        let Shrinkage { mu, sigma2, tau2 } = self.lock().tree().shrunken(&path, &options.0);
        (mu, sigma2, tau2)
    }

    fn sigma2(&self, kind: &str, ddof: u8) -> Result<f64> {
        let kind = Sigma2::parse(kind)?;
        Options { ddof, ..Options::default() }.validate()?;
        Ok(self.root().sigma2(kind, ddof))
    }

    fn tau2(&self, kind: &str, ddof: u8) -> Result<f64> {
        let kind = Tau2::parse(kind)?;
        Options { ddof, ..Options::default() }.validate()?;
        Ok(self.root().tau2(kind, ddof))
    }
}

fn advance_as<'py, 'k, T: Float + Element>(
    py: Python<'py>,
    options: &Options,
    rewards: &PyReadonlyArray1<'py, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
    score: impl FnOnce(&GroupStats) -> Result<(Scored, Keys<'k>)>,
) -> Result<Advanced<'py>> {
    // Whatever can fail comes before the state changes.
    let batch = batch_of(rewards, groups, mask)?;
    let out = PyArray1::<T>::zeros(py, rewards.len(), false);
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    let stats = detached(py, rewards.len(), || GroupStats::collect(&batch))?;
    let (scored, keys) = score(&stats)?;
    let scalars = detached(py, rewards.len(), || {
        apply(&batch, &scored.affine, slots);
        scalars(options, &scored, &stats, |centre| batch.max_distance(centre))
    });
    drop(writable);
    Ok((out.into_any(), vectors(py, scored, &keys, &stats), scalars))
}

/// The diagnostics of the whole batch; `farthest` is the largest distance of a counted reward from a centre.
fn scalars(options: &Options, scored: &Scored, stats: &GroupStats, farthest: impl FnOnce(f64) -> f64) -> Scalars {
    let (before, prior) = (scored.before.rewards(), &scored.prior);
    let spread = before.variance(0).sqrt();
    let or_nan = |value: f64| if prior.is_empty() { f64::NAN } else { value };
    let (fail, pass) = stats.saturated(if prior.is_empty() { 0.0 } else { prior.rewards().mean() });
    (
        or_nan(prior.rewards().mean()),
        or_nan(prior.sigma2(options.sigma2, options.ddof)),
        or_nan(prior.tau2(options.tau2, options.ddof)),
        fail,
        pass,
        if spread > 0.0 { farthest(before.mean()) / spread } else { f64::NAN },
        scored.dead_advantage(stats),
    )
}

/// The diagnostics of each group.
fn vectors<'py>(py: Python<'py>, scored: Scored, keys: &Keys<'_>, stats: &GroupStats) -> Vectors<'py> {
    let vector = |values: Vec<f64>| values.into_pyarray(py);
    let blended = keys.given().then(|| {
        let of_group = |field: fn(&Shrinkage) -> f64| {
            vector((0..stats.len()).map(|group| field(&scored.blended[keys.of_group(group)])).collect())
        };
        (of_group(|b| b.mu), of_group(|b| b.sigma2), of_group(|b| b.tau2))
    });
    (vector(scored.shrinkage), vector(scored.baseline), vector(stats.counts()), blended)
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
