//! The estimator's state behind a lock, held for arithmetic over the groups' statistics and never while anything waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpo_core::{Columns, Error, Float, GroupStats, Keys, Options, Path, Prior, Shrinkage, Sigma2, State, Tau2};
use numpy::{Element, PyArray2, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::advance::{Advanced, advance_flat, advance_matrix};
use crate::arrays::{Groups, Mask, Rewards, batch_of, detached, slice};
use crate::call::Values;
use crate::error::Result;
use crate::keys::{BatchKeys, KeyPath};
use crate::options::PyOptions;
use crate::parts::{Parts, StoredKeys, arrays, columns_of, entries, readable, tuples};

/// The root's prior, the keys, their discount at each update and the updates so far, and the step.
type Stored<'py> = (Parts, Bound<'py, PyAny>, (f64, i64), Option<i64>);

/// The priors and the id of the last update applied.
#[pyclass(name = "State", module = "ebpo_core._core", frozen)]
#[derive(Default)]
pub(crate) struct PyState(Mutex<State>);

impl PyState {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
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
        keys: Option<BatchKeys<'py>>,
        stream: bool,
    ) -> Result<Advanced<'py>> {
        let keys = keys.map(|(paths, of_group, prompts)| {
            let paths: Vec<Path> = paths.into_iter().map(|KeyPath(path)| path).collect();
            (paths, of_group, prompts)
        });
        let score = |stats: &GroupStats| {
            let keys = match &keys {
                None => Keys::ROOT,
                Some((paths, of_group, None)) => Keys::new(paths, slice(of_group)?, stats.len())?,
                Some((paths, of_group, Some(prompts))) => {
                    Keys::new(paths, slice(of_group)?, stats.len())?.with_prompts(slice(prompts)?, stats.len())?
                }
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
            Rewards::F32(rewards) => advance_flat(py, &options.0, &rewards, &groups, &mask, score),
            Rewards::F64(rewards) => advance_flat(py, &options.0, &rewards, &groups, &mask, score),
        }
    }

    /// The same for an `(M, G)` matrix without mask, in full speed where no option of the estimator needs each group.
    ///
    /// `keys` is None, a tuple with a string for each row, or what [`PyState::advance`] takes. Returns None, with nothing
    /// changed, for whatever that one must look at: another type, dtype or order of `rewards`, no rows, another number of
    /// keys, any other key, rewards out of range.
    #[pyo3(signature = (options, rewards, keys, update, step, /))]
    fn advance_matrix<'py>(
        &self,
        options: &PyOptions,
        rewards: &Bound<'py, PyAny>,
        keys: &Bound<'py, PyAny>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Option<Advanced<'py>>> {
        if let Ok(rewards) = rewards.cast_exact::<PyArray2<f32>>() {
            advance_matrix(self, &options.0, rewards, keys, (update, step), Values::F32)
        } else if let Ok(rewards) = rewards.cast_exact::<PyArray2<f64>>() {
            advance_matrix(self, &options.0, rewards, keys, (update, step), Values::F64)
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
        (state.tree().root.parts(), state.step())
    }

    /// The whole state as it is stored, the keys as a list of JSON-safe entries or as a dict of arrays.
    fn stored<'py>(&self, py: Python<'py>, as_arrays: bool) -> Result<Stored<'py>> {
        let (root, columns, clock, step) = {
            let state = self.lock(); // at once: a step newer than its prior would lose a batch on resume
            let tree = state.tree();
            (tree.root.parts(), Columns::of(tree), tree.clock(), state.step())
        };
        let keys = if as_arrays { arrays(py, columns)? } else { entries(py, &columns)? };
        Ok((root, keys, clock, step))
    }

    /// The number of keys, the root left out.
    fn key_count(&self) -> usize {
        self.lock().tree().len()
    }

    /// Every key with its prior, discounted up to now.
    fn priors<'py>(&self, py: Python<'py>) -> Result<Vec<(Bound<'py, PyTuple>, Parts)>> {
        let (columns, priors) = {
            let state = self.lock();
            (Columns::of(state.tree()), state.tree().priors().collect::<Vec<_>>())
        };
        Ok(tuples(py, &columns)?.into_iter().zip(priors.iter().map(Prior::parts)).collect())
    }

    /// Replace everything by what [`PyState::stored`] returned, which is checked first.
    #[allow(clippy::too_many_arguments)] // the fields of a stored state
    fn load(
        &self,
        py: Python<'_>,
        root: Parts,
        keys: StoredKeys<'_>,
        clock: (f64, i64),
        step: Option<i64>,
        max_keys: usize,
    ) -> Result<()> {
        let columns = columns_of(py, keys)?;
        if columns.len() > max_keys {
            return Err(Error::TooManyKeys { count: columns.len(), max_keys }.into());
        }
        let tree = columns.into_tree(Prior::of_parts(&root)?, clock.0, clock.1).map_err(readable)?;
        *self.lock() = State::new(tree, step);
        Ok(())
    }

    /// The state as it was before its last update.
    fn before_update(&self) -> Self {
        Self(Mutex::new(self.lock().before_update()))
    }

    /// True where both hold the same priors and the same step.
    fn same(&self, other: &Self) -> bool {
        if std::ptr::eq(self, other) {
            return true;
        }
        let other = other.lock().clone(); // copied out first: no thread holds two locks
        *self.lock() == other
    }

    /// A number that equal states have in common.
    fn digest(&self) -> u64 {
        self.lock().digest()
    }

    /// Mean, sigma2 and tau2 of a key, blended with its parents'.
    fn shrunken(&self, options: &PyOptions, path: KeyPath) -> (f64, f64, f64) {
        let Shrinkage { mu, sigma2, tau2, .. } = self.lock().tree().shrunken(&path.0, &options.0);
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

fn collect<T: Float + Element>(
    py: Python<'_>,
    rewards: &PyReadonlyArray1<'_, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
) -> Result<GroupStats> {
    let batch = batch_of(rewards, groups, mask)?;
    Ok(detached(py, rewards.len(), || GroupStats::collect(&batch))?)
}
