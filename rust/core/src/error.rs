//! Mistakes of a caller; every message names the argument, the value and the remedy.

use crate::MAX_REWARD;

/// Errors of this crate. Nothing is modified by a call that returns one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A counted reward is infinite or too large to be squared.
    #[error(
        "rewards[{index}] (flat index) is {value}: a counted reward must be finite and of magnitude at most {MAX_REWARD:e}; \
         clip it, or mark a completion that could not be scored with NaN or mask=False"
    )]
    RewardOutOfRange {
        /// Position in the flattened rewards.
        index: usize,
        /// The reward found there.
        value: f64,
    },
    /// A counted reward that a method has no meaning for.
    #[error(
        "rewards holds {value}, and method={method:?} needs rewards of {expected}: shift them, or take another method"
    )]
    InvalidReward {
        /// The reward.
        value: f64,
        /// The method.
        method: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// Two arguments that must have one length do not.
    #[error("{name} has length {got}, expected {expected}: pass one entry per reward")]
    LengthMismatch {
        /// Name of the argument.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length of the rewards.
        expected: usize,
    },
    /// Equal groups were asked for, but the rewards do not divide into them.
    #[error("rewards has length {len}, not a multiple of the group size {size}")]
    NotDivisible {
        /// Number of rewards.
        len: usize,
        /// The group size asked for.
        size: usize,
    },
    /// A group code is not below the number of groups.
    #[error("group code {code} at row {index} is out of range for {groups} groups")]
    GroupOutOfRange {
        /// The row.
        index: usize,
        /// Its code.
        code: u32,
        /// Number of groups.
        groups: usize,
    },
    /// More distinct groups than a 32-bit code can name.
    #[error("more than {} distinct groups in one batch; split the batch", u32::MAX)]
    TooManyGroups,
    /// An update would need more priors than the estimator may keep.
    #[error(
        "keys would make {count} priors, parents included, more than max_keys={max_keys}: use coarser keys (topics or \
         levels), or build the estimator with a larger max_keys"
    )]
    TooManyKeys {
        /// Priors that there would be, without the root's.
        count: usize,
        /// The bound.
        max_keys: usize,
    },
    /// An option outside its domain.
    #[error("{name}={value}: expected {expected}")]
    InvalidOption {
        /// Name of the option.
        name: &'static str,
        /// The value passed, as text.
        value: String,
        /// The values that are accepted.
        expected: &'static str,
    },
    /// A stored key that does not fit the keys around it.
    #[error("state has the key {key:?}, {problem}: pass what state_dict() returned")]
    InvalidKey {
        /// The key's parts, as the core sees them.
        key: Vec<String>,
        /// The reason why it is refused.
        problem: &'static str,
    },
    /// A stored statistic that no sequence of updates can produce.
    #[error("state field {field}={value} is not a valid statistic: expected {expected}")]
    InvalidState {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: f64,
        /// The values that are accepted.
        expected: &'static str,
    },
}
