//! `ebpo_core._core`: the crate `ebpo-core` for Python.
//!
//! | Python | Rust |
//! |---|---|
//! | `ndarray[float32 or float64]`, C-contiguous | `&[f32]`, `&[f64]` |
//! | `ndarray[uint32]` group codes, `ndarray[bool]` mask | `&[u32]`, `&[bool]` |
//! | `str` option | enum, by its `parse` |
//! | `ValueError` / `TypeError` | `ebpo_core::Error` / a wrong array |
//!
//! Lists, tensors, other dtypes, strides and shapes are the business of `ebpo_core.inputs`; this module refuses them. The
//! interpreter is released around kernels over many rewards, never while a lock is held, so that neither another thread
//! nor a forked child can find a lock taken. An array must not be written by another thread during a call.

mod advance;
mod arrays;
mod call;
mod codes;
mod error;
mod keys;
mod options;
mod parts;
mod state;

/// Everything Python sees.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::arrays::{baseline_advantages, equal_advantages};
    #[pymodule_export]
    use super::call::PyCall;
    #[pymodule_export]
    use super::codes::{codes_of_bytes, codes_of_ints, codes_of_objects};
    #[pymodule_export]
    use super::keys::codes_of_keys;
    #[pymodule_export]
    use super::options::PyOptions;
    #[pymodule_export]
    use super::state::PyState;

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::arrays::prepare(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("DEBUG_BUILD", cfg!(debug_assertions))
    }
}
