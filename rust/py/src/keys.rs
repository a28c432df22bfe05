//! Keys as Python has them, tuples of strings and integers, and as the core does, paths of text.
//!
//! A part of a path begins with its kind: `s` and a string, `i` and an integer's decimal digits, or `j` and the JSON of a
//! string with lone surrogates, which UTF-8 cannot write.

use ebpo_core::{Codes, Path};
use hashbrown::HashMap;
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList, PyString, PyTuple};

use crate::error::Result;

/// A key as the core sees it, from a tuple of strings and integers.
pub(crate) struct KeyPath(pub(crate) Path);

impl<'a, 'py> FromPyObject<'a, 'py> for KeyPath {
    type Error = PyErr;

    fn extract(key: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(key.cast::<PyTuple>()?.iter().map(|part| part_of(&part)).collect::<PyResult<_>>()?))
    }
}

fn part_of(part: &Bound<'_, PyAny>) -> PyResult<String> {
    if let Ok(text) = part.cast::<PyString>() {
        return Ok(match text.to_str() {
            Ok(text) => ["s", text].concat(),
            Err(_) => ["j", part.py().import("json")?.call_method1("dumps", (text,))?.extract()?].concat(),
        });
    }
    if part.cast::<PyInt>().is_err() {
        let kind = part.get_type();
        return Err(PyTypeError::new_err(format!("a key holds a {kind}: expected strings and ints")));
    }
    Ok(match part.extract::<i64>() {
        Ok(number) => format!("i{number}"),
        Err(_) => ["i", part.str()?.to_str()?].concat(), // beyond 64 bits
    })
}

/// The string or integer that a part stands for.
pub(crate) fn object_of<'py>(py: Python<'py>, part: &str) -> PyResult<Bound<'py, PyAny>> {
    let wrong = || PyValueError::new_err(format!("state has a key with the part {part:?}, which is of no known kind"));
    let (kind, rest) = part.split_at_checked(1).ok_or_else(wrong)?;
    match kind {
        "s" => Ok(PyString::new(py, rest).into_any()),
        "i" => match rest.parse::<i64>() {
            Ok(number) => Ok(number.into_pyobject(py)?.into_any()),
            Err(_) => py.get_type::<PyInt>().call1((rest,)),
        },
        "j" => py.import("json")?.call_method1("loads", (rest,)),
        _ => Err(wrong()),
    }
}

/// Refuse a part that no key has: each has one form.
pub(crate) fn check_part(py: Python<'_>, part: &str) -> PyResult<()> {
    if part.starts_with('s') || object_of(py, part).and_then(|object| part_of(&object)).is_ok_and(|same| same == part) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "state has a key with the part {part:?}, which stands for no string or int: pass what state_dict() returned"
    )))
}

/// The rows at which the distinct keys of a list appear first, in order, and each row's index into these.
#[pyfunction]
#[pyo3(signature = (keys, /))]
pub(crate) fn codes_of_keys<'py>(
    py: Python<'py>,
    keys: Vec<Bound<'py, PyAny>>,
) -> Result<(Vec<usize>, Bound<'py, PyArray1<u32>>)> {
    let (rows_of_first, codes) = code(py, &keys)?;
    Ok((rows_of_first, codes.into_pyarray(py)))
}

/// One path per distinct string of a list of strings, and each row's index into them; None where there is anything else.
pub(crate) fn paths_of_strings(py: Python<'_>, keys: &Bound<'_, PyList>) -> Result<Option<(Vec<Path>, Vec<u32>)>> {
    let keys: Vec<_> = keys.iter().collect();
    let (rows_of_first, codes) = code(py, &keys)?;
    let path = |&row: &usize| keys[row].cast_exact::<PyString>().ok().map(|key| part_of(key).map(|part| vec![part]));
    let paths: Option<PyResult<_>> = rows_of_first.iter().map(path).collect();
    Ok(paths.transpose()?.map(|paths| (paths, codes)))
}

fn code(py: Python<'_>, keys: &[Bound<'_, PyAny>]) -> Result<(Vec<usize>, Vec<u32>)> {
    let (mut codes, mut rows_of_first) = (Codes::with_capacity(keys.len()), Vec::new());
    // The rows of a prompt, and often those of a topic, hold one and the same object.
    let mut objects = Objects::for_rows(keys.len());
    let mut strings: HashMap<&str, u32> = HashMap::new();
    let others = PyDict::new(py);
    for (row, key) in keys.iter().enumerate() {
        let object = objects.place(key);
        if object.address == key.as_ptr() as usize {
            codes.push(object.code)?;
            continue;
        }
        let next = codes.groups();
        let code = match key.cast::<PyString>().map(|key| key.to_str()) {
            Ok(Ok(text)) => *strings.entry(text).or_insert(next),
            _ => code_of_object(&others, row, key, next)?,
        };
        if code == next {
            rows_of_first.push(row);
        }
        *object = Object { address: key.as_ptr() as usize, code };
        codes.push(code)?;
    }
    Ok((rows_of_first, codes.into_parts().0))
}

/// The codes of objects by address: a table in which the last object at a place stands, and no other.
struct Objects(Vec<Object>);

#[derive(Clone, Default)]
struct Object {
    address: usize,
    code: u32,
}

impl Objects {
    fn for_rows(rows: usize) -> Self {
        Self(vec![Object::default(); rows.next_power_of_two().clamp(16, 1024)])
    }

    #[inline]
    fn place(&mut self, key: &Bound<'_, PyAny>) -> &mut Object {
        let address = key.as_ptr() as usize;
        let mask = self.0.len() - 1;
        &mut self.0[(address >> 4 ^ address >> 12) & mask]
    }
}

fn code_of_object(seen: &Bound<'_, PyDict>, row: usize, key: &Bound<'_, PyAny>, next: u32) -> Result<u32> {
    let unhashable = |_| {
        let kind = key.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
        PyTypeError::new_err(format!(
            "keys[{row}] is {key:?}, of type {kind}, which is not hashable: pass a string, an int or a tuple"
        ))
    };
    if let Some(code) = seen.get_item(key).map_err(unhashable)? {
        return Ok(code.extract()?);
    }
    seen.set_item(key, next)?;
    Ok(next)
}
