//! The estimator's options as a frozen Python object.

use ebpo_core::{DecayBy, LeaveOneOut, Normalize, Options, Score, Sigma2, Tau2};
use pyo3::prelude::*;

use crate::error::Result;

/// `leave_one_out` as Python has it.
#[derive(FromPyObject)]
enum LeftOut {
    #[pyo3(transparent)]
    Flag(bool),
    #[pyo3(transparent)]
    Name(String),
}

/// Validated options of the estimator; see `ebpo_core.EBPO`.
#[pyclass(name = "Options", module = "ebpo_core._core", frozen)]
pub(crate) struct PyOptions(pub(crate) Options);

#[pymethods]
impl PyOptions {
    #[new]
    #[pyo3(signature = (*, normalize, sigma2, tau2, score, leave_one_out, shrinkage, decay, decay_by, eps, ddof, norm_ddof, kappa, max_keys))]
    #[allow(clippy::too_many_arguments)] // one per option of the estimator, all by keyword
    fn new(
        normalize: &str,
        sigma2: &str,
        tau2: &str,
        score: &str,
        leave_one_out: LeftOut,
        shrinkage: Option<f64>,
        decay: f64,
        decay_by: &str,
        eps: f64,
        ddof: u8,
        norm_ddof: u8,
        kappa: f64,
        max_keys: usize,
    ) -> Result<Self> {
        let options = Options {
            normalize: Normalize::parse(normalize)?,
            sigma2: Sigma2::parse(sigma2)?,
            tau2: Tau2::parse(tau2)?,
            score: Score::parse(score)?,
            leave_one_out: match leave_one_out {
                LeftOut::Flag(false) => LeaveOneOut::Nothing,
                LeftOut::Flag(true) => LeaveOneOut::Group,
                LeftOut::Name(name) => LeaveOneOut::parse(&name)?,
            },
            shrinkage,
            decay,
            decay_by: DecayBy::parse(decay_by)?,
            eps,
            ddof,
            norm_ddof,
            kappa,
            max_keys,
        };
        options.validate()?;
        Ok(Self(options))
    }
}
