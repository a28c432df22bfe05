//! Priors as plain numbers, and the keys of a tree as JSON-safe entries or as arrays: the forms in which they are stored.

use ebpo_core::{Columns, Error};
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::error::{BindingError, Result};
use crate::keys::{KeyPath, check_part, object_of};

/// count, mean and M2 of the rewards; the same of the group means; ssw, dof, `inv_n`.
pub(crate) type Parts = [f64; 9];

/// The keys of a stored state: entries of path, statistics and idle time; or names, lengths, parents, statistics and idle.
#[derive(FromPyObject)]
pub(crate) enum StoredKeys<'py> {
    #[pyo3(transparent)]
    Entries(Vec<(KeyPath, Parts, i64)>),
    #[pyo3(transparent)]
    #[allow(clippy::type_complexity)] // five arrays
    Arrays(
        (
            PyReadonlyArray1<'py, u8>,
            PyReadonlyArray1<'py, usize>,
            PyReadonlyArray1<'py, isize>,
            PyReadonlyArray2<'py, f64>,
            PyReadonlyArray1<'py, i64>,
        ),
    ),
}

/// The columns of stored keys.
pub(crate) fn columns_of(py: Python<'_>, keys: StoredKeys<'_>) -> Result<Columns> {
    match keys {
        StoredKeys::Entries(entries) => {
            let entry = |(KeyPath(path), parts, idle)| (path, parts, idle);
            Ok(Columns::of_entries(entries.into_iter().map(entry)).map_err(readable)?)
        }
        StoredKeys::Arrays((names, lengths, parents, statistics, idle)) => {
            let names = String::from_utf8(names.as_slice().map_err(|_| BindingError::NotContiguous)?.to_vec())
                .map_err(|error| PyValueError::new_err(format!("state field 'keys.names' is no UTF-8: {error}")))?;
            let columns = Columns {
                names,
                lengths: lengths.as_array().to_vec(),
                parents: parents.as_array().to_vec(),
                statistics: statistics.as_array().iter().copied().collect(),
                idle: idle.as_array().to_vec(),
            };
            if statistics.shape()[1] != 9 {
                let message =
                    format!("state field 'keys.statistics' has shape {:?}: expected (n, 9)", statistics.shape());
                return Err(PyValueError::new_err(message).into());
            }
            columns.check_shape()?;
            columns.parts().try_for_each(|part| check_part(py, part))?;
            Ok(columns)
        }
    }
}

/// Paths in an error as a user wrote them.
pub(crate) fn readable(error: Error) -> Error {
    match error {
        Error::InvalidKey { key, problem } => Error::InvalidKey {
            key: key.iter().map(|part| part.get(1..).unwrap_or(part).to_owned()).collect(),
            problem,
        },
        other => other,
    }
}

/// The keys as JSON-safe entries.
pub(crate) fn entries<'py>(py: Python<'py>, columns: &Columns) -> Result<Bound<'py, PyAny>> {
    let list = PyList::empty(py);
    let paths = paths_of(py, columns)?;
    let rows = columns.statistics.as_chunks::<9>().0;
    for ((path, row), &idle) in paths.iter().zip(rows).zip(&columns.idle) {
        let moments = |three: &[f64]| {
            let dict = PyDict::new(py);
            dict.set_item(intern!(py, "count"), three[0])?;
            dict.set_item(intern!(py, "mean"), three[1])?;
            dict.set_item(intern!(py, "m2"), three[2])?;
            PyResult::Ok(dict)
        };
        let entry = PyDict::new(py);
        entry.set_item(intern!(py, "key"), PyList::new(py, path)?)?;
        entry.set_item(intern!(py, "rewards"), moments(&row[..3])?)?;
        entry.set_item(intern!(py, "group_means"), moments(&row[3..6])?)?;
        entry.set_item(intern!(py, "ssw"), row[6])?;
        entry.set_item(intern!(py, "dof"), row[7])?;
        entry.set_item(intern!(py, "inv_n"), row[8])?;
        entry.set_item(intern!(py, "idle"), idle)?;
        list.append(entry)?;
    }
    Ok(list.into_any())
}

/// The keys as a dict of arrays.
pub(crate) fn arrays(py: Python<'_>, columns: Columns) -> Result<Bound<'_, PyAny>> {
    let keys = columns.len();
    let dict = PyDict::new(py);
    dict.set_item("names", columns.names.into_bytes().into_pyarray(py))?;
    dict.set_item("lengths", columns.lengths.into_pyarray(py))?;
    dict.set_item("parents", columns.parents.into_pyarray(py))?;
    let statistics: Bound<'_, PyArray2<f64>> = columns.statistics.into_pyarray(py).reshape([keys, 9])?;
    dict.set_item("statistics", statistics)?;
    let idle: Bound<'_, PyArray1<i64>> = columns.idle.into_pyarray(py);
    dict.set_item("idle", idle)?;
    Ok(dict.into_any())
}

/// The whole key of each entry, as objects.
fn paths_of<'py>(py: Python<'py>, columns: &Columns) -> Result<Vec<Vec<Bound<'py, PyAny>>>> {
    let mut paths: Vec<Vec<Bound<'py, PyAny>>> = Vec::with_capacity(columns.len());
    for (part, &parent) in columns.parts().zip(&columns.parents) {
        let mut path = usize::try_from(parent).map_or_else(|_| Vec::new(), |parent| paths[parent].clone());
        path.push(object_of(py, part)?);
        paths.push(path);
    }
    Ok(paths)
}

/// The key of each entry as a tuple.
pub(crate) fn tuples<'py>(py: Python<'py>, columns: &Columns) -> Result<Vec<Bound<'py, PyTuple>>> {
    paths_of(py, columns)?.into_iter().map(|path| Ok(PyTuple::new(py, path)?)).collect()
}
