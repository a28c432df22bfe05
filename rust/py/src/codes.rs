//! Group ids to dense codes: integers and fixed-width bytes by value, any other object by Python's own equality.

use ebpo_core::Codes;
use hashbrown::HashMap;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::error::{BindingError, Result};

type Coded<'py> = (Bound<'py, PyArray1<u32>>, u32);

fn coded(py: Python<'_>, codes: Codes) -> Coded<'_> {
    let (codes, groups) = codes.into_parts();
    (codes.into_pyarray(py), groups)
}

/// Codes of int64 ids.
#[pyfunction]
#[pyo3(signature = (ids, /))]
pub(crate) fn codes_of_ints<'py>(py: Python<'py>, ids: PyReadonlyArray1<'py, i64>) -> Result<Coded<'py>> {
    let ids = ids.as_slice().map_err(|_| BindingError::NotContiguous)?;
    Ok(coded(py, Codes::of(ids.iter().copied())?))
}

/// Codes of ids that are rows of bytes, as NumPy stores fixed-width strings.
#[pyfunction]
#[pyo3(signature = (ids, /))]
pub(crate) fn codes_of_bytes<'py>(py: Python<'py>, ids: PyReadonlyArray2<'py, u8>) -> Result<Coded<'py>> {
    let width = ids.shape()[1];
    let bytes = ids.as_slice().map_err(|_| BindingError::NotContiguous)?;
    if width == 0 {
        return Ok(coded(py, Codes::of(std::iter::repeat_n((), ids.shape()[0]))?));
    }
    Ok(coded(py, Codes::of(bytes.chunks_exact(width))?))
}

/// Codes of a list of hashable objects, passed as the argument `name`.
#[pyfunction]
#[pyo3(signature = (ids, name, /))]
pub(crate) fn codes_of_objects<'py>(py: Python<'py>, ids: Vec<Bound<'py, PyAny>>, name: &str) -> Result<Coded<'py>> {
    let mut codes = Codes::with_capacity(ids.len());
    // Strings are what frameworks pass (uuids); they are hashed here, without a call into the interpreter.
    let mut strings: HashMap<&str, u32> = HashMap::with_capacity(ids.len() / 4);
    let others = PyDict::new(py);
    for (row, id) in ids.iter().enumerate() {
        if row > 0 && id.is(&ids[row - 1]) {
            codes.repeat();
            continue;
        }
        let next = codes.groups();
        let code = match id.cast::<PyString>().map(|id| id.to_str()) {
            Ok(Ok(text)) => *strings.entry(text).or_insert(next),
            _ => code_of_object(&others, name, row, id, next)?,
        };
        codes.push(code)?;
    }
    Ok(coded(py, codes))
}

fn code_of_object(seen: &Bound<'_, PyDict>, name: &str, row: usize, id: &Bound<'_, PyAny>, next: u32) -> Result<u32> {
    // NaN, NaT and the like are not equal to themselves; NA refuses to say.
    let missing = id.is_none() || id.ne(id).unwrap_or(true);
    if missing {
        let message = format!("{name}[{row}] is {id}, which names none: give every reward the id of one of the {name}");
        return Err(PyValueError::new_err(message).into());
    }
    let unhashable = |_| {
        let kind = id.get_type();
        PyTypeError::new_err(format!(
            "{name}[{row}] is of type {kind}, which is not hashable: pass ints, strings or uuids"
        ))
    };
    if let Some(code) = seen.get_item(id).map_err(unhashable)? {
        return Ok(code.extract()?);
    }
    seen.set_item(id, next)?;
    Ok(next)
}
