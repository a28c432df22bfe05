//! Keys as Python has them, tuples of strings and integers, and as the core does, paths of text.
//!
//! A part of a path begins with its kind: `s` and a string, `i` and an integer's decimal digits, or `j` and the JSON of a
//! string with lone surrogates, which UTF-8 cannot write.

use ebpo_core::{Codes, Keys, Path};
use hashbrown::HashMap;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyInt, PySequence, PyString, PyTuple};

use crate::arrays::slice;
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
    keys: &Bound<'py, PySequence>,
) -> Result<(Vec<usize>, Bound<'py, PyArray1<u32>>)> {
    let (rows_of_first, codes) = code(&keys.to_tuple()?)?;
    Ok((rows_of_first, codes.into_pyarray(py)))
}

/// The distinct keys of a batch, each group's index into them, and the prompt of each group where several are of one.
pub(crate) type BatchKeys<'py> = (Vec<KeyPath>, PyReadonlyArray1<'py, u32>, Option<PyReadonlyArray1<'py, u32>>);

/// The keys of a batch: the distinct ones, and each group's index into them.
pub(crate) struct GroupKeys {
    pub(crate) paths: Vec<Path>,
    pub(crate) of_group: Vec<u32>,
}

impl GroupKeys {
    /// Those of a tuple with a string for each group, or of [`BatchKeys`].
    ///
    /// None for another number of groups, for any other key in a tuple, and for prompts.
    pub(crate) fn read(keys: &Bound<'_, PyAny>, groups: usize) -> Result<Option<Self>> {
        let keys = if let Ok(keys) = keys.cast_exact::<PyTuple>() {
            if keys.len() == groups { Self::of_strings(keys)? } else { None }
        } else {
            let (paths, of_group, prompts): BatchKeys<'_> = keys.extract()?;
            let of_group = slice(&of_group)?.to_vec();
            let paths = paths.into_iter().map(|KeyPath(path)| path).collect();
            prompts.is_none().then_some(Self { paths, of_group })
        };
        Ok(keys.filter(|keys| keys.of_group.len() == groups))
    }

    fn of_strings(keys: &Bound<'_, PyTuple>) -> Result<Option<Self>> {
        let (rows_of_first, of_group) = code(keys)?;
        let path = |&row: &usize| {
            let key = keys.get_borrowed_item(row).ok()?.cast_exact::<PyString>().ok()?.to_owned();
            Some(part_of(key.as_any()).map(|part| vec![part]))
        };
        let paths: Option<PyResult<_>> = rows_of_first.iter().map(path).collect();
        Ok(paths.transpose()?.map(|paths| Self { paths, of_group }))
    }

    /// The same as the core reads them.
    pub(crate) fn keys(&self) -> Result<Keys<'_>> {
        Ok(Keys::new(&self.paths, &self.of_group, self.of_group.len())?)
    }
}

/// A tuple, which nothing can change meanwhile, and whose items need not be owned one by one.
fn code(keys: &Bound<'_, PyTuple>) -> Result<(Vec<usize>, Vec<u32>)> {
    let (mut codes, mut rows_of_first) = (Codes::with_capacity(keys.len()), Vec::new());
    // The rows of a prompt, and often those of a topic, hold one and the same object.
    let mut objects = Objects::for_rows(keys.len());
    let mut strings: HashMap<PyBackedStr, u32> = HashMap::new();
    let others = PyDict::new(keys.py());
    for (row, key) in keys.iter_borrowed().enumerate() {
        let address = key.as_ptr() as usize;
        let object = objects.place(address);
        if object.address == address {
            codes.push(object.code)?;
            continue;
        }
        let next = codes.groups();
        let text = key.cast::<PyString>().ok().and_then(|key| PyBackedStr::try_from(key.to_owned()).ok());
        let code = match text {
            Some(text) => *strings.entry(text).or_insert(next),
            None => code_of_object(&others, row, &key, next)?,
        };
        if code == next {
            rows_of_first.push(row);
        }
        *object = Object { address, code };
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
    fn place(&mut self, address: usize) -> &mut Object {
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
