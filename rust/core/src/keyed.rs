//! Scoring a batch whose groups have keys: each group is shrunk with the blended prior of its key.

use std::collections::BTreeMap;

use crate::estimator::{finish, without_each};
use crate::{GroupStats, Keys, Options, Prior, Score, Scored, Shrinkage, Tree};

/// The batch at hand: its groups, their keys, and who belongs to which key.
pub(crate) struct KeyedBatch<'a> {
    groups: &'a GroupStats,
    keys: &'a Keys<'a>,
    members: BTreeMap<&'a [String], Vec<usize>>,
    /// The batch's own statistics by key.
    pub(crate) tree: Tree,
}

impl<'a> KeyedBatch<'a> {
    pub(crate) fn new(groups: &'a GroupStats, keys: &'a Keys<'a>) -> Self {
        let members = keys.members(groups);
        let tree = Tree::of(groups, &members);
        Self { groups, keys, members, tree }
    }

    /// Score the batch and, if `update`, take it into `tree`, for which there must be room.
    pub(crate) fn advance(&self, tree: &mut Tree, options: &Options, update: bool) -> Scored {
        let before = tree.root;
        let first = !update || options.score == Score::Before;
        let mut blended = if first { self.blended(tree, options) } else { Vec::new() };
        let mut rests = None;
        if update {
            if !self.tree.root.is_empty() {
                tree.decay(options.decay);
            }
            if options.leave_one_out {
                rests = Some(self.without_each(tree, options));
            }
            tree.merge(&self.tree);
        }
        if !first {
            blended = self.blended(tree, options);
        }
        let with = rests.as_ref().unwrap_or(&blended);
        let shrunk: Vec<_> = self.groups.iter().zip(with).map(|(g, prior)| (prior.factor(g.n), prior.mu)).collect();
        let prior = if first { before } else { tree.root };
        let scored = finish(options, self.groups, &shrunk, (before, self.tree.root, prior));
        Scored { blended, ..scored }
    }

    /// The blended prior of each group's key.
    fn blended(&self, tree: &Tree, options: &Options) -> Vec<Shrinkage> {
        let of_path: Vec<_> = self.keys.paths().iter().map(|path| tree.shrunken(path, options)).collect();
        self.keys.of_group().map(|key| of_path[key]).collect()
    }

    /// The same, where every prior on the way from the root lacks that group.
    fn without_each(&self, history: &Tree, options: &Options) -> Vec<Shrinkage> {
        let at_root = without_each(&history.root, self.groups.iter());
        let mut blended: Vec<_> = at_root.map(|rest| Shrinkage::new(&rest, options)).collect();
        // A path comes after its prefixes, so each group passes through its parents first.
        for (path, list) in &self.members {
            let history = history.keys.get(*path).copied().unwrap_or_default();
            let groups = list.iter().map(|&group| self.groups.get(group));
            let rests: Vec<Prior> = without_each(&history, groups).collect();
            for (&group, rest) in list.iter().zip(&rests) {
                blended[group] = Shrinkage::blended(rest, blended[group], options);
            }
        }
        blended
    }
}
