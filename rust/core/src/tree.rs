//! Priors by key: each key's prior holds what was seen under it, the root's holds everything.
//!
//! ```text
//! theta~_k = (1 - h) theta_k + h theta~_parent      for theta = mean, sigma2, tau2
//! h        = kappa / (kappa + groups seen by k)     1 for a key that has seen none
//! ```
//!
//! A key is a path, its prefixes are its parents, and the empty path is the root, whose `theta~` is its own `theta`.
//!
//! An update touches the keys of its batch and no other. Where every update discounts every key
//! ([`DecayBy::Update`]), a key's statistics stay as its last update left them, with the time of that update, and are
//! discounted when they are read: by `rho^idle`, `idle` the updates since then.

mod before;
mod digest;

use std::hash::{DefaultHasher, Hasher};

use hashbrown::HashTable;

use crate::keys::{Path, Prefix, Seen, Visits};
use crate::{DecayBy, Error, Options, Prior, Shrinkage};

pub(crate) use before::Before;

/// The parent of a key of one part.
pub(crate) const AT_ROOT: usize = usize::MAX;

/// A prior for everything, and one for each key that has seen a group.
#[derive(Clone, Debug)]
pub struct Tree {
    /// The prior that every group enters, whatever its key.
    pub root: Prior,
    /// Parents come before their children.
    nodes: Vec<Node>,
    /// The parts of all keys, one after another.
    names: String,
    index: HashTable<usize>,
    /// Discount of an idle key at each tick of the clock.
    rho: f64,
    clock: i64,
    /// Sum of the nodes' hashes, kept up from the first time that it is asked for.
    digest: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    /// As it was at `touched` on the clock.
    prior: Prior,
    touched: i64,
    /// Of the whole path.
    hash: u64,
    name: usize,
    length: usize,
    parent: usize,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            root: Prior::default(),
            nodes: Vec::new(),
            names: String::new(),
            index: HashTable::new(),
            rho: 1.0,
            clock: 0,
            digest: None,
        }
    }
}

impl Tree {
    /// A tree without keys, in which each tick of the clock, now at `clock`, discounts an idle key by `rho`.
    pub(crate) fn new(root: Prior, rho: f64, clock: i64) -> Self {
        Self { root, rho, clock, ..Self::default() }
    }

    /// Discount of an idle key at each tick of the clock, and the clock.
    pub fn clock(&self) -> (f64, i64) {
        (self.rho, self.clock)
    }

    /// Number of keys, without the root.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True where no key has seen a group.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The prior of a key, or of the root for the empty path; None for a key that has seen nothing.
    pub fn get(&self, path: &[String]) -> Option<Prior> {
        let mut found = AT_ROOT;
        for part in path {
            found = self.find(found, part)?;
        }
        Some(if found == AT_ROOT { self.root } else { self.read(found) })
    }

    /// The prior of every key but the root, discounted up to now.
    pub fn priors(&self) -> impl ExactSizeIterator<Item = Prior> {
        (0..self.nodes.len()).map(|node| self.read(node))
    }

    /// What is stored of every key: part, parent, statistics at the key's last update, ticks of the clock since then.
    pub(crate) fn stored(&self) -> impl ExactSizeIterator<Item = (&str, usize, &Prior, i64)> {
        self.nodes.iter().map(|node| (self.part(node), node.parent, &node.prior, self.clock - node.touched))
    }

    /// The keys of some visits; None for those that have seen nothing.
    pub(crate) fn find_all(&self, visits: &Visits<'_>) -> Vec<Option<usize>> {
        let mut found: Vec<Option<usize>> = Vec::with_capacity(visits.prefixes().len());
        for Prefix { parent, part, .. } in visits.prefixes() {
            let parent = parent.map_or(Some(AT_ROOT), |parent| found[parent]);
            found.push(parent.and_then(|parent| self.find(parent, part)));
        }
        found
    }

    /// Largest magnitude of a mean of rewards among the root and some keys.
    pub(crate) fn farthest_mean(&self, found: &[Option<usize>]) -> f64 {
        let of_keys = found.iter().flatten().map(|&key| &self.nodes[key].prior);
        of_keys.fold(self.root.rewards().mean().abs(), |most, prior| most.max(prior.rewards().mean().abs()))
    }

    /// Refuse an addition that would make more than `max_keys` priors beside the root's.
    pub(crate) fn check_room(&self, new: usize, max_keys: usize) -> Result<(), Error> {
        let count = self.nodes.len() + new;
        if new > 0 && count > max_keys { Err(Error::TooManyKeys { count, max_keys }) } else { Ok(()) }
    }

    /// Forget, as the options say, at an update of these keys, which are then as of now.
    pub(crate) fn forget(&mut self, options: &Options, keys: impl Iterator<Item = usize>) {
        let rho = options.decay;
        self.root.decay(rho);
        let by_update = options.decay_by == DecayBy::Update;
        if self.is_other_rate(options) {
            self.settle();
            self.rho = rho;
        }
        if by_update && rho < 1.0 {
            self.clock += 1;
        }
        for key in keys {
            let now = self.read(key);
            if let Some(digest) = self.digest {
                self.digest = Some(digest.wrapping_sub(self.hash_of(key)));
            }
            let node = &mut self.nodes[key];
            (node.prior, node.touched) = (now, self.clock);
            if !by_update {
                node.prior.decay(rho);
            }
        }
    }

    /// Take a batch into the root and into each of its keys, which [`Tree::forget`] has just passed over.
    pub(crate) fn take(&mut self, batch: &Seen, visits: &Visits<'_>, found: &mut [Option<usize>]) {
        self.root.merge(&batch.all);
        for (index, (prefix, prior)) in visits.prefixes().iter().zip(&batch.by_prefix).enumerate() {
            if prior.is_empty() {
                continue;
            }
            let key = if let Some(key) = found[index] {
                self.nodes[key].prior.merge(prior);
                key
            } else {
                // The groups of a prefix are its parent's too, so the parent has been found or made.
                let parent = prefix.parent.map_or(AT_ROOT, |parent| found[parent].unwrap_or(AT_ROOT));
                self.insert(parent, prefix.part, *prior, 0)
            };
            found[index] = Some(key);
            if let Some(digest) = self.digest {
                self.digest = Some(digest.wrapping_add(self.hash_of(key)));
            }
        }
    }

    /// Statistics of a key as [`Tree::forget`] left them; those of nothing for a key that has seen nothing.
    pub(crate) fn at(&self, key: Option<usize>) -> Prior {
        key.map(|key| self.nodes[key].prior).unwrap_or_default()
    }

    /// Add everything another tree has seen, discounted up to now; its keys come after those that are here.
    pub(crate) fn merge(&mut self, other: &Self, max_keys: usize) -> Result<(), Error> {
        let mut found = Vec::with_capacity(other.nodes.len());
        for node in &other.nodes {
            let parent = if node.parent == AT_ROOT { Some(AT_ROOT) } else { found[node.parent] };
            found.push(parent.and_then(|parent| self.find(parent, other.part(node))));
        }
        self.check_room(found.iter().filter(|key| key.is_none()).count(), max_keys)?;
        if self.is_empty() {
            (self.rho, self.clock) = other.clock();
        }
        let same_rate = self.rho.to_bits() == other.rho.to_bits();
        for (index, node) in (0..).zip(&other.nodes) {
            if let Some(key) = found[index] {
                let mut prior = self.read(key);
                prior.merge(&other.read(index));
                let mine = &mut self.nodes[key];
                (mine.prior, mine.touched) = (prior, self.clock);
                continue;
            }
            let parent = if node.parent == AT_ROOT { AT_ROOT } else { found[node.parent].unwrap_or(AT_ROOT) };
            let (prior, idle) =
                if same_rate { (node.prior, other.clock - node.touched) } else { (other.read(index), 0) };
            found[index] = Some(self.insert(parent, other.part(node), prior, idle));
        }
        self.root.merge(&other.root);
        self.digest = None;
        Ok(())
    }

    /// Multiply every count and sum by `rho`; an idle key thus becomes young again and falls back to its parent.
    pub(crate) fn decay(&mut self, rho: f64) {
        self.root.decay(rho);
        self.settle();
        self.nodes.iter_mut().for_each(|node| node.prior.decay(rho));
    }

    /// `theta~` of a key: its own estimates, blended with its parents' as long as it has seen few groups.
    pub fn shrunken(&self, path: &[String], options: &Options) -> Shrinkage {
        let mut blended = Shrinkage::new(&self.root, options);
        let mut found = AT_ROOT;
        for part in path {
            let Some(key) = self.find(found, part) else { break };
            blended = Shrinkage::blended(&self.read(key), blended, options);
            found = key;
        }
        blended
    }

    /// `theta~` of every prefix of some visits, given their keys.
    pub(crate) fn all_shrunken(
        &self,
        visits: &Visits<'_>,
        found: &[Option<usize>],
        options: &Options,
    ) -> (Shrinkage, Vec<Shrinkage>) {
        let root = Shrinkage::new(&self.root, options);
        let mut blended: Vec<Shrinkage> = Vec::with_capacity(found.len());
        for (prefix, key) in visits.prefixes().iter().zip(found) {
            let parent = prefix.parent.map_or(root, |parent| blended[parent]);
            blended.push(key.map_or(parent, |key| Shrinkage::blended(&self.read(key), parent, options)));
        }
        (root, blended)
    }

    /// A key under a parent that is here already, with statistics as of `idle` ticks ago.
    pub(crate) fn insert(&mut self, parent: usize, part: &str, prior: Prior, idle: i64) -> usize {
        let (node, hash) = (self.nodes.len(), self.hash_under(parent, part));
        let (name, length) = (self.names.len(), part.len());
        self.names.push_str(part);
        self.nodes.push(Node { prior, touched: self.clock - idle, hash, name, length, parent });
        let nodes = &self.nodes;
        self.index.insert_unique(hash, node, |&other| nodes[other].hash);
        node
    }

    /// The child of a key, or of the root.
    pub(crate) fn find(&self, parent: usize, part: &str) -> Option<usize> {
        let hash = self.hash_under(parent, part);
        let same = |&key: &usize| {
            let node = &self.nodes[key];
            node.hash == hash && node.parent == parent && self.part(node) == part
        };
        self.index.find(hash, same).copied()
    }

    /// The whole path of a key.
    pub(crate) fn path(&self, key: usize) -> Path {
        let mut path = Path::new();
        let mut next = key;
        while next != AT_ROOT {
            let node = &self.nodes[next];
            path.push(self.part(node).to_owned());
            next = node.parent;
        }
        path.reverse();
        path
    }

    fn part(&self, node: &Node) -> &str {
        &self.names[node.name..node.name + node.length]
    }

    fn read(&self, key: usize) -> Prior {
        let node = &self.nodes[key];
        let mut prior = node.prior;
        let idle = self.clock - node.touched;
        if idle > 0 {
            prior.decay(self.rho.powf(idle as f64));
        }
        prior
    }

    /// True where an update discounts idle keys, and by another rate than the clock's.
    fn is_other_rate(&self, options: &Options) -> bool {
        options.decay_by == DecayBy::Update && options.decay < 1.0 && options.decay.to_bits() != self.rho.to_bits()
    }

    /// Discount every key up to now, before the rate changes.
    fn settle(&mut self) {
        for node in 0..self.nodes.len() {
            let prior = self.read(node);
            let node = &mut self.nodes[node];
            (node.prior, node.touched) = (prior, self.clock);
        }
        self.digest = None;
    }

    fn hash_under(&self, parent: usize, part: &str) -> u64 {
        let mut hasher = DefaultHasher::new(); // the same in every process, which digests are compared between
        if parent != AT_ROOT {
            hasher.write_u64(self.nodes[parent].hash);
        }
        hasher.write(part.as_bytes());
        hasher.finish()
    }
}

/// Two trees are equal where they hold the same keys with the same statistics, in whatever order.
impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        if self.root != other.root || self.nodes.len() != other.nodes.len() {
            return false;
        }
        let mut found = Vec::with_capacity(self.nodes.len());
        for node in &other.nodes {
            let parent = if node.parent == AT_ROOT { AT_ROOT } else { found[node.parent] };
            let Some(key) = self.find(parent, other.part(node)) else { return false };
            let mine = &self.nodes[key];
            let (idle, others) = (self.clock - mine.touched, other.clock - node.touched);
            if mine.prior != node.prior || idle != others || (idle > 0 && self.rho != other.rho) {
                return false;
            }
            found.push(key);
        }
        true
    }
}
