//! The keys of a tree as columns, the form in which they are stored: exact, and quick to write and to read.

use hashbrown::HashMap;

use crate::tree::AT_ROOT;
use crate::{Error, Path, Prior, Tree};

/// Most ticks of a clock in a stored state: sums and differences of two such stay in range, however long it then runs.
const MOST_TICKS: i64 = 1 << 62;

/// One entry per key, the root left out; parents come before their children.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Columns {
    /// The last part of each key, one after another.
    pub names: String,
    /// Bytes of each of these parts.
    pub lengths: Vec<usize>,
    /// The entry of each key's parent; -1 for the root.
    pub parents: Vec<isize>,
    /// Nine numbers a key ([`Prior::parts`]) as its last update left them.
    pub statistics: Vec<f64>,
    /// Ticks of the tree's clock since that update, each of which discounts the statistics by the tree's rate.
    pub idle: Vec<i64>,
}

impl Columns {
    /// The keys of a tree.
    pub fn of(tree: &Tree) -> Self {
        let mut columns = Self::default();
        for (part, parent, prior, idle) in tree.stored() {
            columns.names.push_str(part);
            columns.lengths.push(part.len());
            columns.parents.push(if parent == AT_ROOT { -1 } else { parent.cast_signed() });
            columns.statistics.extend(prior.parts());
            columns.idle.push(idle);
        }
        columns
    }

    /// The columns of keys with their statistics and idle times, each key after its parent.
    pub fn of_entries(entries: impl Iterator<Item = (Path, [f64; 9], i64)>) -> Result<Self, Error> {
        let mut columns = Self::default();
        let mut known: HashMap<Path, isize> = HashMap::new();
        for (mut key, statistics, idle) in entries {
            let (index, whole) = (columns.len().cast_signed(), key.clone());
            let Some(part) = key.pop() else {
                return Err(Error::InvalidKey { key, problem: "which has no parts and so is the root's" });
            };
            let parent = if key.is_empty() { Some(-1) } else { known.get(&key).copied() };
            let Some(parent) = parent else {
                return Err(Error::InvalidKey { key: whole, problem: "but not its parent" });
            };
            if known.insert(whole.clone(), index).is_some() {
                return Err(Error::InvalidKey { key: whole, problem: "twice" });
            }
            columns.names.push_str(&part);
            columns.lengths.push(part.len());
            columns.parents.push(parent);
            columns.statistics.extend(statistics);
            columns.idle.push(idle);
        }
        Ok(columns)
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// True where there is no key.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// The parts of the keys, each under its parent.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        let mut start = 0;
        self.lengths.iter().map(move |&length| {
            let part = self.names.get(start..start + length).unwrap_or("");
            start += length;
            part
        })
    }

    /// A tree of these keys, whose clock stands at `clock` and discounts an idle key by `rho` at each tick.
    ///
    /// Refuses what no updates can produce. (A key may have seen more than its parent, where each forgets at its own visits.)
    pub fn into_tree(&self, root: Prior, rho: f64, clock: i64) -> Result<Tree, Error> {
        self.check_shape()?;
        if !(rho > 0.0 && rho <= 1.0) {
            return Err(Error::InvalidState { field: "idle_decay", value: rho, expected: "a number in (0, 1]" });
        }
        if !(0..=MOST_TICKS).contains(&clock) {
            let (value, expected) = (clock as f64, "at least 0 and at most 2**62");
            return Err(Error::InvalidState { field: "updates", value, expected });
        }
        let mut tree = Tree::new(root, rho, clock);
        let statistics = self.statistics.as_chunks::<9>().0;
        for (index, part) in self.parts().enumerate() {
            let (parent, idle) = (self.parents[index], self.idle[index]);
            let parent = if parent == -1 { AT_ROOT } else { parent.cast_unsigned() };
            if parent != AT_ROOT && parent >= index {
                let (value, expected) =
                    (self.parents[index] as f64, "-1 for the root, or the number of an earlier key");
                return Err(Error::InvalidState { field: "keys.parents", value, expected });
            }
            if !(0..=MOST_TICKS).contains(&idle) || (idle > 0 && rho == 1.0) {
                let expected = "at least 0 and at most 2**62, and 0 where idle_decay is 1";
                return Err(Error::InvalidState { field: "keys.idle", value: idle as f64, expected });
            }
            let refuse = |tree: &Tree, problem| {
                let mut key = if parent == AT_ROOT { Vec::new() } else { tree.path(parent) };
                key.push(part.to_owned());
                Err(Error::InvalidKey { key, problem })
            };
            if tree.find(parent, part).is_some() {
                return refuse(&tree, "twice");
            }
            tree.insert(parent, part, Prior::of_parts(&statistics[index])?, idle);
        }
        Ok(tree)
    }

    /// Refuse columns of different lengths, and lengths that do not cut the names up.
    pub fn check_shape(&self) -> Result<(), Error> {
        let keys = self.len();
        for (name, got, expected) in [
            ("keys.parents", self.parents.len(), keys),
            ("keys.statistics", self.statistics.len(), 9 * keys),
            ("keys.idle", self.idle.len(), keys),
        ] {
            if got != expected {
                return Err(Error::LengthMismatch { name, got, expected });
            }
        }
        let mut end = 0;
        for &length in &self.lengths {
            end += length;
            if length == 0 || !self.names.is_char_boundary(end) {
                let (value, expected) = (length as f64, "the bytes of a key's name, at least 1");
                return Err(Error::InvalidState { field: "keys.lengths", value, expected });
            }
        }
        if end != self.names.len() {
            let (value, expected) = (self.names.len() as f64, "as many bytes as keys.lengths add up to");
            return Err(Error::InvalidState { field: "keys.names", value, expected });
        }
        Ok(())
    }
}
