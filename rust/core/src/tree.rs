//! Priors by key: each key's prior holds what was seen under it, the root's holds everything.
//!
//! ```text
//! theta~_k = (1 - h) theta_k + h theta~_parent      for theta = mean, sigma2, tau2
//! h        = kappa / (kappa + groups seen by k)     1 for a key that has seen none
//! ```
//!
//! A key is a path, its prefixes are its parents, and the empty path is the root, whose `theta~` is its own `theta`.

use std::collections::BTreeMap;

use crate::{Error, GroupStats, Options, Prior, Shrinkage};

/// The parts of a key, from the root down.
pub type Path = Vec<String>;

/// The non-empty groups under each key and under each of its parents, the root left out; parents come first.
pub(crate) type Members<'a> = BTreeMap<&'a [String], Vec<usize>>;

static ROOT: [Path; 1] = [Vec::new()];

/// The keys of a batch: one path per group.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    paths: &'a [Path],
    /// None where every group has the first path.
    of_group: Option<&'a [u32]>,
    /// The prompt of each group, where several groups are of one (its turns); None where each is of its own.
    prompts: Option<&'a [u32]>,
}

impl Keys<'static> {
    /// The root for every group of any batch.
    pub const ROOT: Self = Self { paths: &ROOT, of_group: None, prompts: None };
}

impl<'a> Keys<'a> {
    /// Group `m` has the key `paths[of_group[m]]`; lengths and indices are checked here once.
    pub fn new(paths: &'a [Path], of_group: &'a [u32], groups: usize) -> Result<Self, Error> {
        if of_group.len() != groups {
            return Err(Error::LengthMismatch { name: "keys", got: of_group.len(), expected: groups });
        }
        if let Some(index) = of_group.iter().position(|&key| key as usize >= paths.len()) {
            return Err(Error::GroupOutOfRange { index, code: of_group[index], groups: paths.len() });
        }
        Ok(Self { paths, of_group: Some(of_group), prompts: None })
    }

    /// The same, where group `m` is one of prompt `prompts[m]`: what leaves a group out leaves its whole prompt out.
    pub fn with_prompts(self, prompts: &'a [u32], groups: usize) -> Result<Self, Error> {
        if prompts.len() != groups {
            return Err(Error::LengthMismatch { name: "prompts", got: prompts.len(), expected: groups });
        }
        Ok(Self { prompts: Some(prompts), ..self })
    }

    /// The prompt of each group; None where each group is a prompt of its own.
    pub(crate) fn prompts(&self) -> Option<&'a [u32]> {
        self.prompts
    }

    /// The distinct paths; several may be equal.
    pub(crate) fn paths(&self) -> &'a [Path] {
        self.paths
    }

    /// True where groups have keys of their own; false for [`Keys::ROOT`].
    pub fn given(&self) -> bool {
        self.of_group.is_some()
    }

    /// The index of a group's path.
    #[inline]
    pub fn of_group(&self, group: usize) -> usize {
        self.of_group.map_or(0, |of_group| of_group[group] as usize)
    }

    /// See [`Members`].
    pub(crate) fn members(&self, groups: &GroupStats) -> Members<'a> {
        let mut members = Members::new();
        if self.paths.iter().all(Vec::is_empty) {
            return members; // everything is the root's
        }
        for (group, g) in groups.iter().enumerate() {
            if g.n > 0.0 {
                let path = &self.paths[self.of_group(group)];
                for depth in 1..=path.len() {
                    members.entry(&path[..depth]).or_default().push(group);
                }
            }
        }
        members
    }
}

/// A prior for everything, and one for each key that has seen a group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tree {
    /// The prior that every group enters, whatever its key.
    pub root: Prior,
    keys: BTreeMap<Path, Prior>,
}

impl Tree {
    /// A tree from its parts; refuses what no updates can produce.
    pub fn from_parts(root: Prior, keys: impl IntoIterator<Item = (Path, Prior)>) -> Result<Self, Error> {
        let mut tree = Self { root, keys: BTreeMap::new() };
        for (key, prior) in keys {
            if key.is_empty() {
                return Err(Error::InvalidKey { key, problem: "which has no parts and so is the root's" });
            }
            if tree.keys.contains_key(&key) {
                return Err(Error::InvalidKey { key, problem: "twice" });
            }
            tree.keys.insert(key, prior);
        }
        for (key, prior) in &tree.keys {
            let refuse = |problem| Err(Error::InvalidKey { key: key.clone(), problem });
            let Some(parent) = tree.get(&key[..key.len() - 1]) else {
                return refuse("but not its parent");
            };
            let holds = |mine: f64, whole: f64| mine <= whole * (1.0 + 1e-6);
            if !holds(prior.rewards().count(), parent.rewards().count())
                || !holds(prior.means().count(), parent.means().count())
            {
                return refuse("which has seen more than its parent");
            }
        }
        Ok(tree)
    }

    /// Statistics of a batch, given the members of each key.
    pub(crate) fn of(groups: &GroupStats, members: &Members<'_>) -> Self {
        let prior = |list: &Vec<usize>| Prior::of_groups(list.iter().map(|&group| groups.get(group)));
        Self {
            root: Prior::of(groups),
            keys: members.iter().map(|(path, list)| (path.to_vec(), prior(list))).collect(),
        }
    }

    /// The prior of a key, or of the root for the empty path; None for a key that has seen nothing.
    pub fn get(&self, path: &[String]) -> Option<&Prior> {
        if path.is_empty() { Some(&self.root) } else { self.keys.get(path) }
    }

    /// Every key but the root, parents first, with its prior.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = (&Path, &Prior)> {
        self.keys.iter()
    }

    /// Refuse an addition that would make more than `max_keys` priors beside the root's.
    pub fn check_room(&self, other: &Self, max_keys: usize) -> Result<(), Error> {
        let new = other.keys.keys().filter(|path| !self.keys.contains_key(*path)).count();
        let count = self.keys.len() + new;
        if new > 0 && count > max_keys { Err(Error::TooManyKeys { count, max_keys }) } else { Ok(()) }
    }

    /// Add everything another tree has seen.
    pub fn merge(&mut self, other: &Self) {
        self.root.merge(&other.root);
        for (path, prior) in &other.keys {
            if let Some(mine) = self.keys.get_mut(path) {
                mine.merge(prior);
            } else {
                self.keys.insert(path.clone(), *prior);
            }
        }
    }

    /// Multiply every count and sum by `rho`; an idle key thus becomes young again and falls back to its parent.
    pub fn decay(&mut self, rho: f64) {
        self.root.decay(rho);
        self.keys.values_mut().for_each(|prior| prior.decay(rho));
    }

    /// `theta~` of a key: its own estimates, blended with its parents' as long as it has seen few groups.
    pub fn shrunken(&self, path: &[String], options: &Options) -> Shrinkage {
        let root = Shrinkage::new(&self.root, options);
        (1..=path.len())
            .filter_map(|depth| self.keys.get(&path[..depth]))
            .fold(root, |parent, prior| Shrinkage::blended(prior, parent, options))
    }
}
