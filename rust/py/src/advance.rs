//! Algorithm 1 over arrays: whatever can fail comes before the state changes.

use ebpo_core::{Batch, EqualGroups, Float, GroupStats, Keys, Layout, Options, Scored, apply};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::arrays::{Groups, Mask, batch_of, detached, is_plain, new_like, threads};
use crate::call::{Kept, PyCall, Values};
use crate::error::{BindingError, Result};
use crate::keys::GroupKeys;
use crate::state::PyState;

/// The advantages, and what is kept for the diagnostics.
pub(crate) type Advanced<'py> = (Bound<'py, PyAny>, PyCall);

/// Flat rewards, in the general way.
pub(crate) fn advance_flat<'py, 'k, T: Float + Element>(
    py: Python<'py>,
    options: &Options,
    rewards: &PyReadonlyArray1<'py, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
    score: impl FnOnce(&GroupStats) -> Result<(Scored, Keys<'k>)>,
) -> Result<Advanced<'py>> {
    let batch = batch_of(rewards, groups, mask)?;
    let out = PyArray1::<T>::zeros(py, rewards.len(), false);
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    let stats = detached(py, slots.len(), || GroupStats::collect(&batch))?;
    let call = finish(py, options, &batch, stats, slots, score)?;
    drop(writable);
    Ok((out.into_any(), call))
}

/// A plain matrix, see [`PyState::advance_matrix`](crate::state::PyState).
pub(crate) fn advance_matrix<'py, T: Float + Element>(
    state: &PyState,
    options: &Options,
    rewards: &Bound<'py, PyArray2<T>>,
    keys: &Bound<'py, PyAny>,
    (update, step): (bool, Option<i64>),
    keep: fn(Py<PyArray2<T>>) -> Values,
) -> Result<Option<Advanced<'py>>> {
    let py = rewards.py();
    let (groups, size, len) = (rewards.dims()[0], rewards.dims()[1], rewards.len());
    if !is_plain(rewards) || len == 0 {
        return Ok(None);
    }
    let given = if keys.is_none() {
        None
    } else {
        let Some(given) = GroupKeys::read(keys, groups)? else { return Ok(None) };
        Some(given)
    };
    let keys = given.as_ref().map_or(Ok(Keys::ROOT), GroupKeys::keys)?;
    let readable = rewards.try_readonly()?;
    let values = readable.as_slice().map_err(|_| BindingError::NotContiguous)?;
    let out = new_like(rewards)?;
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;

    let by_group = options.needs_each_group();
    let equal = || detached(py, len, || EqualGroups::collect(values, size, keys, threads()));
    if let Some(batch) = if by_group { None } else { equal() } {
        let copy = new_like(rewards)?;
        let mut writable_copy = copy.try_readwrite()?;
        let copied = writable_copy.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
        detached(py, len, || copied.copy_from_slice(values));
        drop(writable_copy);
        let targets = state.lock().advance_equal(options, &batch, update, step)?;
        if let Some(targets) = targets {
            detached(py, len, || batch.write(options, &targets.blended, threads(), slots));
            drop((writable, batch));
            let kept = Kept::Matrix { rewards: keep(copy.unbind()), keys: given, targets };
            return Ok(Some((out.into_any(), PyCall::new(options, kept))));
        }
    }

    let batch = Batch::new(values, Layout::Equal { size }, None)?;
    let Ok(collected) = detached(py, len, || GroupStats::collect(&batch)) else { return Ok(None) };
    let call = finish(py, options, &batch, collected, slots, |groups| {
        Ok((state.lock().advance(options, groups, &keys, update, step)?, keys))
    })?;
    drop(writable);
    Ok(Some((out.into_any(), call)))
}

/// Score a batch, and write its advantages.
fn finish<'k, T: Float>(
    py: Python<'_>,
    options: &Options,
    batch: &Batch<'_, T>,
    stats: GroupStats,
    slots: &mut [T],
    score: impl FnOnce(&GroupStats) -> Result<(Scored, Keys<'k>)>,
) -> Result<PyCall> {
    let (scored, keys) = score(&stats)?;
    let farthest = detached(py, slots.len(), || {
        apply(batch, &scored.affine, slots);
        batch.max_distance(scored.targets.before.rewards().mean())
    });
    let key_of_group = keys.indices().map(<[u32]>::to_vec);
    Ok(PyCall::new(options, Kept::Groups { scored, stats, farthest, key_of_group }))
}
