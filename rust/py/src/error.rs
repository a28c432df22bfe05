//! One error type for the bindings, so that `?` works on both sides of the boundary.

use pyo3::PyErr;
use pyo3::exceptions::PyValueError;

/// An error of the core, of a borrowed array, or of Python itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindingError {
    #[error(transparent)]
    Core(#[from] ebpo_core::Error),
    #[error(transparent)]
    Python(#[from] PyErr),
    #[error("an array passed to this call is being written by another one: {0}")]
    Borrow(#[from] numpy::BorrowError),
    #[error(
        "an array passed to ebpo_core._core is not contiguous; pass it through ebpo_core.advantages or EBPO instead"
    )]
    NotContiguous,
}

pub(crate) type Result<T> = core::result::Result<T, BindingError>;

impl From<BindingError> for PyErr {
    fn from(error: BindingError) -> Self {
        match error {
            BindingError::Python(error) => error,
            other => PyValueError::new_err(other.to_string()),
        }
    }
}
