//! Group ids of any kind as dense codes, numbered in order of first appearance.

use core::hash::Hash;

use hashbrown::HashMap;

use crate::Error;

/// Builds the codes of a batch, one id after another.
#[derive(Debug, Default)]
pub struct Codes {
    codes: Vec<u32>,
    groups: u32,
}

impl Codes {
    /// Room for `rows` ids.
    pub fn with_capacity(rows: usize) -> Self {
        Self { codes: Vec::with_capacity(rows), groups: 0 }
    }

    /// The codes of a sequence of ids.
    ///
    /// Rows of a group mostly stand together, so an id equal to the one before it is not looked up.
    pub fn of<K: Hash + Eq + Copy>(ids: impl ExactSizeIterator<Item = K>) -> Result<Self, Error> {
        let mut this = Self::with_capacity(ids.len());
        let mut seen: HashMap<K, u32> = HashMap::new();
        let mut previous: Option<K> = None;
        for id in ids {
            if previous == Some(id) {
                this.repeat();
                continue;
            }
            let next = this.groups;
            let code = *seen.entry(id).or_insert(next);
            this.push(code)?;
            previous = Some(id);
        }
        Ok(this)
    }

    /// Append a code: an earlier one, or [`Codes::groups`] to open a new group.
    pub fn push(&mut self, code: u32) -> Result<(), Error> {
        if code == self.groups {
            self.groups = self.groups.checked_add(1).ok_or(Error::TooManyGroups)?;
        }
        self.codes.push(code);
        Ok(())
    }

    /// Append the code of the row before.
    pub fn repeat(&mut self) {
        if let Some(&code) = self.codes.last() {
            self.codes.push(code);
        }
    }

    /// Number of distinct ids so far.
    pub fn groups(&self) -> u32 {
        self.groups
    }

    /// The codes and the number of groups.
    pub fn into_parts(self) -> (Vec<u32>, u32) {
        (self.codes, self.groups)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_appearance_order() {
        let (codes, groups) = Codes::of(["b", "b", "a", "b", "c"].into_iter()).unwrap().into_parts();
        assert_eq!((codes, groups), (vec![0, 0, 1, 0, 2], 3));
    }
}
