//! The estimator's state behind a lock, held for arithmetic over the groups' statistics and never while anything waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpo_core::{
    EqualGroups, Float, GroupStats, Keys, Options, Path, Prior, Scored, Shrinkage, Sigma2, State, Tau2, Tree, apply,
};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{Groups, Mask, Rewards, batch_of, detached, is_plain, new_like, slice, threads};
use crate::call::{Kept, PyCall, Values};
use crate::error::{BindingError, Result};
use crate::options::PyOptions;
use crate::parts::{Parts, TreeParts, parts_of, tree_of, tree_parts};

/// The distinct keys of a batch, and each group's index into them.
type BatchKeys<'py> = Option<(Vec<Path>, PyReadonlyArray1<'py, u32>)>;
type Advanced<'py> = (Bound<'py, PyAny>, PyCall);

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

    /// The same for an `(M, G)` matrix without mask or keys, in full speed.
    ///
    /// Returns None, with nothing changed, for whatever [`PyState::advance`] must look at: another type, dtype or order, no
    /// rows, NaN, infinities, an option of the estimator that needs each group.
    #[pyo3(signature = (options, rewards, update, step, /))]
    fn advance_matrix<'py>(
        &self,
        options: &PyOptions,
        rewards: &Bound<'py, PyAny>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Option<Advanced<'py>>> {
        if let Ok(rewards) = rewards.cast_exact::<PyArray2<f32>>() {
            advance_equal(self, &options.0, rewards, update, step, Values::F32)
        } else if let Ok(rewards) = rewards.cast_exact::<PyArray2<f64>>() {
            advance_equal(self, &options.0, rewards, update, step, Values::F64)
        } else {
            Ok(None)
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
    let farthest = detached(py, rewards.len(), || {
        apply(&batch, &scored.affine, slots);
        batch.max_distance(scored.before.rewards().mean())
    });
    drop(writable);
    let key_of_group = keys.given().then(|| (0..stats.len()).map(|group| keys.of_group(group)).collect());
    let kept = Kept::Groups { scored, stats, farthest, key_of_group };
    Ok((out.into_any(), PyCall::new(options, kept)))
}

fn advance_equal<'py, T: Float + Element>(
    state: &PyState,
    options: &Options,
    rewards: &Bound<'py, PyArray2<T>>,
    update: bool,
    step: Option<i64>,
    keep: fn(Py<PyArray2<T>>) -> Values,
) -> Result<Option<Advanced<'py>>> {
    let py = rewards.py();
    if !is_plain(rewards) || options.needs_each_group() {
        return Ok(None);
    }
    let (size, len) = (rewards.dims()[1], rewards.len());
    let readable = rewards.try_readonly()?;
    let values = readable.as_slice().map_err(|_| BindingError::NotContiguous)?;
    // Whatever can fail comes before the state changes.
    let out = new_like(rewards)?;
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    let Some(batch) = detached(py, len, || EqualGroups::collect(values, size, threads())) else { return Ok(None) };
    let copy = new_like(rewards)?;
    let mut writable_copy = copy.try_readwrite()?;
    let copied = writable_copy.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    detached(py, len, || copied.copy_from_slice(values));
    drop(writable_copy);
    let Some((before, prior)) = state.lock().advance_equal(options, &batch, update, step) else { return Ok(None) };
    detached(py, len, || batch.write(options, &prior, threads(), slots));
    drop(writable);
    let kept = Kept::Matrix { rewards: keep(copy.unbind()), before, prior };
    Ok(Some((out.into_any(), PyCall::new(options, kept))))
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
