//! Streaming prior statistics and empirical-Bayes advantages for RL post-training.
//!
//! The estimator is EBPO (arXiv 2602.05165): a group's mean reward is shrunk toward a running prior, so that small groups
//! are less noisy and a group in which every completion failed still carries a signal. This crate is the mathematics
//! alone: slices in, slices out, no Python. The crate `ebpo-py` binds it as `ebpo_core._core`.
//!
//! ```
//! use ebpo_core::{Batch, GroupStats, Keys, Layout, Options, State, apply};
//!
//! let rewards = [1.0_f64, 0.0, 0.0, 0.0];
//! let batch = Batch::new(&rewards, Layout::Equal { size: 2 }, None).unwrap();
//! let stats = GroupStats::collect(&batch).unwrap();
//! let mut state = State::default();
//! let scored = state.advance(&Options::default(), &stats, &Keys::ROOT, true, None).unwrap();
//! let mut advantages = [0.0; 4];
//! apply(&batch, &scored.affine, &mut advantages);
//! assert!(advantages[0] > 0.0 && advantages[2] < 0.0); // the failed group is pushed away from, too
//! ```
#![forbid(unsafe_code)]

mod baselines;
mod batch;
mod codes;
mod columns;
mod equal;
mod error;
mod estimator;
mod float;
mod groups;
mod james_stein;
mod keys;
mod lanes;
mod moments;
mod options;
mod pass_at_k;
mod prior;
mod state;
mod threads;
mod tree;

pub use baselines::Method;
pub use batch::{Affine, Batch, Layout, apply};
pub use codes::Codes;
pub use columns::Columns;
pub use equal::{EqualGroups, equal_advantages};
pub use error::Error;
pub use estimator::{Scored, Shrinkage, Targets};
pub use float::Float;
pub use groups::GroupStats;
pub use keys::{Keys, Path};
pub use moments::Moments;
pub use options::{DecayBy, LeaveOneOut, Normalize, Options, Score, Sigma2, Tau2};
pub use prior::Prior;
pub use state::State;
pub use tree::Tree;

/// Largest magnitude of a reward: its square, summed over any batch, stays finite in `f64`.
pub const MAX_REWARD: f64 = 1e140;
