//! Arrays in and out, and the stateless functions over them.

use std::num::NonZero;
use std::sync::OnceLock;

use ebpo_core::{Batch, Float, Layout, Method, Options, equal_advantages as equal_groups};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::IntoPyDict;

use crate::error::{BindingError, Result};

/// Rewards above which a kernel runs with the interpreter released: below, another thread could not use the time.
const DETACH: usize = 1 << 17;

/// Bytes from which a new array is left to NumPy's allocator, which neither clears it nor, if large, uses small pages.
const LARGE: usize = 1 << 16;

/// Flat rewards of either element type.
#[derive(FromPyObject)]
pub(crate) enum Rewards<'py> {
    #[pyo3(transparent)]
    F32(PyReadonlyArray1<'py, f32>),
    #[pyo3(transparent)]
    F64(PyReadonlyArray1<'py, f64>),
}

/// How rows belong to groups: `size` consecutive rows each, or one code per row.
#[derive(FromPyObject)]
pub(crate) enum Groups<'py> {
    #[pyo3(transparent)]
    Equal(usize),
    #[pyo3(transparent)]
    Codes((PyReadonlyArray1<'py, u32>, usize)),
}

pub(crate) type Mask<'py> = Option<PyReadonlyArray1<'py, bool>>;

/// The batch that borrowed arrays hold.
pub(crate) fn batch_of<'a, T: Float + Element>(
    rewards: &'a PyReadonlyArray1<'_, T>,
    groups: &'a Groups<'_>,
    mask: &'a Mask<'_>,
) -> Result<Batch<'a, T>> {
    let layout = match groups {
        Groups::Equal(size) => Layout::Equal { size: *size },
        Groups::Codes((codes, groups)) => Layout::Codes { codes: slice(codes)?, groups: *groups },
    };
    Ok(Batch::new(slice(rewards)?, layout, mask.as_ref().map(slice).transpose()?)?)
}

/// Run a kernel over `rows` rewards, with the interpreter released if they are many.
pub(crate) fn detached<R: Send>(py: Python<'_>, rows: usize, kernel: impl FnOnce() -> R + Send) -> R {
    if rows >= DETACH { py.detach(kernel) } else { kernel() }
}

pub(crate) fn slice<'a, T: Element>(array: &'a PyReadonlyArray1<'_, T>) -> Result<&'a [T]> {
    if !array.data().is_aligned() {
        return Err(BindingError::NotContiguous);
    }
    array.as_slice().map_err(|_| BindingError::NotContiguous)
}

/// Advantages of `method` (any but "ebpo") for flat rewards.
#[pyfunction]
#[pyo3(signature = (method, parameter, rewards, groups, mask))]
pub(crate) fn baseline_advantages<'py>(
    py: Python<'py>,
    method: &str,
    parameter: f64,
    rewards: Rewards<'py>,
    groups: Groups<'py>,
    mask: Mask<'py>,
) -> Result<Bound<'py, PyAny>> {
    let method = Method::parse(method, parameter)?;
    match rewards {
        Rewards::F32(rewards) => baseline(py, method, &rewards, &groups, &mask),
        Rewards::F64(rewards) => baseline(py, method, &rewards, &groups, &mask),
    }
}

fn baseline<'py, T: Float + Element>(
    py: Python<'py>,
    method: Method,
    rewards: &PyReadonlyArray1<'py, T>,
    groups: &Groups<'_>,
    mask: &Mask<'_>,
) -> Result<Bound<'py, PyAny>> {
    let batch = batch_of(rewards, groups, mask)?;
    let out = PyArray1::<T>::zeros(py, rewards.len(), false);
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    detached(py, rewards.len(), || method.advantages(&batch, slots))?;
    drop(writable);
    Ok(out.into_any())
}

/// Default EBPO advantages of an `(M, G)` matrix with the batch as its own prior, in full speed.
///
/// Returns None for whatever the general path must look at: another type, dtype or order, no rows, NaN, infinities.
#[pyfunction]
#[pyo3(signature = (rewards, /))]
pub(crate) fn equal_advantages<'py>(rewards: &Bound<'py, PyAny>) -> Result<Option<Bound<'py, PyAny>>> {
    if let Ok(rewards) = rewards.cast_exact::<PyArray2<f32>>() {
        equal(rewards)
    } else if let Ok(rewards) = rewards.cast_exact::<PyArray2<f64>>() {
        equal(rewards)
    } else {
        Ok(None)
    }
}

fn equal<'py, T: Float + Element>(rewards: &Bound<'py, PyArray2<T>>) -> Result<Option<Bound<'py, PyAny>>> {
    let py = rewards.py();
    if !is_plain(rewards) {
        return Ok(None);
    }
    let readable = rewards.try_readonly()?;
    let values = readable.as_slice().map_err(|_| BindingError::NotContiguous)?;
    let size = rewards.dims()[1];
    let out = new_like(rewards)?;
    let mut writable = out.try_readwrite()?;
    let slots = writable.as_slice_mut().map_err(|_| BindingError::NotContiguous)?;
    let eps = Options::default().eps;
    let done = detached(py, values.len(), || equal_groups(values, size, eps, threads(), slots));
    drop(writable);
    Ok(done.then(|| out.into_any()))
}

/// True for a matrix that the kernels can read as it is.
pub(crate) fn is_plain<T: Element>(matrix: &Bound<'_, PyArray2<T>>) -> bool {
    matrix.is_c_contiguous() && matrix.data().is_aligned()
}

/// Make now what a first call would otherwise make once: NumPy's tables of functions, and the number of threads.
///
/// The making runs Python code, in which another thread may fork; its child would wait for ever for a first call that goes
/// on in the parent alone.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    numpy_empty(py)?;
    threads();
    let matrix = PyArray2::<f32>::zeros(py, [1, 1], false);
    equal_advantages(matrix.as_any())?;
    matrix.reshape([1])?.extract::<Rewards<'_>>()?;
    Ok(())
}

/// `numpy.empty`.
fn numpy_empty(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static EMPTY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let empty = EMPTY.get_or_try_init(py, || PyResult::Ok(py.import("numpy")?.getattr("empty")?.unbind()))?;
    Ok(empty.bind(py))
}

/// A new array of the same shape and dtype, of unspecified content.
pub(crate) fn new_like<'py, T: Element>(array: &Bound<'py, PyArray2<T>>) -> Result<Bound<'py, PyArray2<T>>> {
    let py = array.py();
    if array.len() * size_of::<T>() < LARGE {
        return Ok(PyArray2::zeros(py, array.dims(), false));
    }
    let dtype = [("dtype", array.as_any().cast::<PyUntypedArray>().map_err(PyErr::from)?.dtype())].into_py_dict(py)?;
    let new = numpy_empty(py)?.call(((array.shape()[0], array.shape()[1]),), Some(&dtype))?;
    let wrong = |_| PyTypeError::new_err("numpy.empty returned no array of the dtype asked for");
    Ok(new.cast_into::<PyArray2<T>>().map_err(wrong)?)
}

/// Threads for a large batch; more than a few only compete for memory bandwidth.
pub(crate) fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, NonZero::get).min(8))
}
