//! The estimator's state behind a lock, held for arithmetic over the groups' statistics and never while anything waits.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpo_core::{Float, GroupStats, Keys, Ledger, Options, Path, Prior, Scored, Shrinkage, Sigma2, Tau2, Tree, apply};
use numpy::{Element, IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::arrays::{Groups, Mask, Rewards, batch_of, detached, slice};
use crate::error::{BindingError, Result};
use crate::options::PyOptions;
use crate::parts::{Parts, ShareParts, TreeParts, parts_of, share_of, tree_of, tree_parts};

pub(crate) type Vector<'py> = Bound<'py, PyArray1<f64>>;
/// The distinct keys of a batch, and each group's index into them.
type BatchKeys<'py> = Option<(Vec<Path>, PyReadonlyArray1<'py, u32>)>;
/// `mu_glob`, sigma2, tau2, failed and passed shares of saturated groups, outlier.
type Scalars = (f64, f64, f64, f64, f64, f64);
/// S, V, n of each group, and with keys the blended mean, sigma2 and tau2.
type Vectors<'py> = (Vector<'py>, Vector<'py>, Vector<'py>, Option<(Vector<'py>, Vector<'py>, Vector<'py>)>);
type Advanced<'py> = (Bound<'py, PyAny>, Vectors<'py>, Scalars);

/// The priors, the id of the last update applied, and what other processes do not know of yet.
#[pyclass(name = "State", module = "ebpo_core._core", frozen)]
#[derive(Default)]
pub(crate) struct PyState(Mutex<Ledger>);

impl PyState {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
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
            let of_group = keys.as_ref().map(|(_, of_group)| slice(of_group)).transpose()?;
            let keys = keys.as_ref().zip(of_group);
            let keys = keys.map(|((paths, _), of_group)| Keys::new(paths, of_group, stats.len())).transpose()?;
            let mut ledger = self.lock();
            Ok(match (stream, &keys) {
                (true, Some(keys)) => ledger.stream(&options.0, stats, keys, update, step)?,
                _ => ledger.advance(&options.0, stats, keys.as_ref(), update, step)?,
            })
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
        let ledger = self.lock();
        (parts_of(&ledger.tree().root), ledger.step())
    }

    /// The root's prior, every key's, and the step.
    fn tree(&self) -> (TreeParts, Option<i64>) {
        let ledger = self.lock();
        (tree_parts(ledger.tree()), ledger.step())
    }

    /// Replace everything by parts of that form, which are checked first, and count them as known to every process.
    fn load(&self, root: Parts, keys: Vec<(Path, Parts)>, step: Option<i64>, max_keys: usize) -> Result<()> {
        let tree = tree_of((root, keys))?;
        Tree::default().check_room(&tree, max_keys)?;
        *self.lock() = Ledger::new(tree, step);
        Ok(())
    }

    /// What every process knows, what the others are to be told, and the number of changes so far.
    fn share(&self) -> (TreeParts, ShareParts, u64) {
        let ledger = self.lock();
        let share = ledger.share();
        (tree_parts(ledger.shared()), (tree_parts(&share.pending), share.ticks, share.step), ledger.changes())
    }

    /// Put every process's share, this one's among them, into what all of them know; `changes` is `share`'s.
    fn exchange(&self, options: &PyOptions, shares: Vec<ShareParts>, changes: u64) -> Result<()> {
        let shares = shares.into_iter().map(share_of).collect::<Result<Vec<_>>>()?;
        let mut ledger = self.lock();
        check_unchanged(&ledger, changes)?;
        Ok(ledger.exchange(&shares, options.0.max_keys)?)
    }

    /// `exchange`, then score the groups of all processes as one batch; both or, on an error, neither.
    ///
    /// Gives an offset and a scale for each group, and what `advance` gives beside the advantages.
    #[pyo3(signature = (options, shares, changes, statistics, extremes, update, step, keys))]
    #[allow(clippy::too_many_arguments)] // see `advance`
    fn together<'py>(
        &self,
        py: Python<'py>,
        options: &PyOptions,
        shares: Vec<ShareParts>,
        changes: u64,
        statistics: (Vec<f64>, Vec<f64>, Vec<f64>),
        extremes: (f64, f64),
        update: bool,
        step: Option<i64>,
        keys: BatchKeys<'py>,
    ) -> Result<(Vector<'py>, Vector<'py>, Vectors<'py>, Scalars)> {
        let shares = shares.into_iter().map(share_of).collect::<Result<Vec<_>>>()?;
        let stats = GroupStats::from_parts(&statistics.0, &statistics.1, &statistics.2)?;
        let of_group = keys.as_ref().map(|(_, of_group)| slice(of_group)).transpose()?;
        let keys = keys.as_ref().zip(of_group);
        let keys = keys.map(|((paths, _), of_group)| Keys::new(paths, of_group, stats.len())).transpose()?;
        let mut ledger = self.lock();
        check_unchanged(&ledger, changes)?;
        let mut next = ledger.clone();
        next.exchange(&shares, options.0.max_keys)?;
        let scored = next.advance_together(&options.0, &stats, keys.as_ref(), update, step)?;
        *ledger = next;
        drop(ledger);

        let farthest = |centre: f64| (extremes.0 - centre).abs().max((extremes.1 - centre).abs());
        let scalars = scalars(&options.0, &scored, &stats, farthest);
        let (offset, scale) = (scored.affine.offset.clone(), scored.affine.scale.clone());
        Ok((offset.into_pyarray(py), scale.into_pyarray(py), vectors(py, scored, &stats), scalars))
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

fn check_unchanged(ledger: &Ledger, changes: u64) -> Result<()> {
    if ledger.changes() == changes {
        return Ok(());
    }
    let message = "the estimator changed while the ranks exchanged their statistics: do not call it from another \
                   thread meanwhile";
    Err(BindingError::Python(PyRuntimeError::new_err(message)))
}

fn advance_as<'py, T: Float + Element>(
    py: Python<'py>,
    options: &Options,
    rewards: &PyReadonlyArray1<'py, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
    score: impl FnOnce(&GroupStats) -> Result<Scored>,
) -> Result<Advanced<'py>> {
    // Whatever can fail comes before the state changes.
    let batch = batch_of(rewards, groups, mask)?;
    let out = PyArray1::<T>::zeros(py, rewards.len(), false);
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    let stats = detached(py, rewards.len(), || GroupStats::collect(&batch))?;
    let scored = score(&stats)?;
    let scalars = detached(py, rewards.len(), || {
        apply(&batch, &scored.affine, slots);
        scalars(options, &scored, &stats, |centre| batch.max_distance(centre))
    });
    drop(writable);
    Ok((out.into_any(), vectors(py, scored, &stats), scalars))
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
    )
}

/// The diagnostics of each group.
fn vectors<'py>(py: Python<'py>, scored: Scored, stats: &GroupStats) -> Vectors<'py> {
    let vector = |values: Vec<f64>| values.into_pyarray(py);
    let of_key = |field: fn(&Shrinkage) -> f64| vector(scored.blended.iter().map(field).collect());
    let blended = (!scored.blended.is_empty()).then(|| (of_key(|b| b.mu), of_key(|b| b.sigma2), of_key(|b| b.tau2)));
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

/// Rows, mean and sum of squares within of each group, as [`PyState::together`] takes them.
#[pyfunction]
#[pyo3(signature = (rewards, groups, mask))]
pub(crate) fn group_statistics<'py>(
    py: Python<'py>,
    rewards: Rewards<'py>,
    groups: Groups<'py>,
    mask: Mask<'py>,
) -> Result<(Vector<'py>, Vector<'py>, Vector<'py>)> {
    let stats = match rewards {
        Rewards::F32(rewards) => collect(py, &rewards, &groups, &mask)?,
        Rewards::F64(rewards) => collect(py, &rewards, &groups, &mask)?,
    };
    let (n, means, ssw) = stats.parts();
    Ok((n.into_pyarray(py), means.into_pyarray(py), ssw.into_pyarray(py)))
}
