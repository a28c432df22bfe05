//! The keys of a batch: a path for each group, and the groups under every prefix of these paths.

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use crate::{Error, GroupStats, Prior};

/// The parts of a key, from the root down.
pub type Path = Vec<String>;

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

    /// The index of a group's path.
    #[inline]
    pub fn of_group(&self, group: usize) -> usize {
        self.of_group.map_or(0, |of_group| of_group[group] as usize)
    }

    /// Number of paths; several may be equal.
    pub(crate) fn len(&self) -> usize {
        self.paths.len()
    }

    /// The index of each group's path; None for [`Keys::ROOT`].
    pub fn indices(&self) -> Option<&'a [u32]> {
        self.of_group
    }

    /// See [`Visits`].
    pub(crate) fn visits(&self, groups: &GroupStats) -> Visits<'a> {
        let mut visits = self.visits_without_groups();
        if !visits.prefixes.is_empty() {
            visits.find_groups(self, groups);
        }
        visits
    }

    /// See [`Visits`]; the lists of groups are left empty.
    pub(crate) fn visits_without_groups(&self) -> Visits<'a> {
        let mut visits = Visits::default();
        // Otherwise everything is the root's.
        if !self.paths.iter().all(Vec::is_empty) {
            visits.find_prefixes(self.paths);
        }
        visits
    }
}

/// The priors that a batch makes up: of everything, and of what is under each prefix of its keys.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) all: Prior,
    pub(crate) by_prefix: Vec<Prior>,
}

/// The distinct prefixes of a batch's keys, the root left out, parents first, and the non-empty groups under each.
#[derive(Debug, Default)]
pub(crate) struct Visits<'a> {
    prefixes: Vec<Prefix<'a>>,
    /// The prefixes of each path, shortest first, one path after another; `chain_ends` says where each ends.
    chains: Vec<usize>,
    chain_ends: Vec<usize>,
    groups: Vec<usize>,
}

/// One prefix: its last part under its parent, and its place in [`Visits::groups`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefix<'a> {
    /// None where the parent is the root.
    pub(crate) parent: Option<usize>,
    pub(crate) part: &'a str,
    start: usize,
    end: usize,
    /// Number of paths under it.
    paths: usize,
}

impl<'a> Visits<'a> {
    fn find_prefixes(&mut self, paths: &'a [Path]) {
        let mut known: HashMap<(Option<usize>, &str), usize> = HashMap::with_capacity(paths.len());
        self.chain_ends.reserve(paths.len());
        for path in paths {
            let mut parent = None;
            for part in path {
                let next = self.prefixes.len();
                let prefix = match known.entry((parent, part)) {
                    Entry::Occupied(entry) => *entry.get(),
                    Entry::Vacant(entry) => {
                        self.prefixes.push(Prefix { parent, part, start: 0, end: 0, paths: 0 });
                        *entry.insert(next)
                    }
                };
                self.chains.push(prefix);
                parent = Some(prefix);
            }
            self.chain_ends.push(self.chains.len());
        }
    }

    /// The groups sorted by path, within a path in their order; then, sorted anew, those of the prefixes of several paths.
    fn find_groups(&mut self, keys: &Keys<'_>, groups: &GroupStats) {
        let mut ends = vec![0; keys.len() + 1]; // counts first, then the start of each path, then its end
        for (group, g) in groups.iter().enumerate() {
            ends[keys.of_group(group) + 1] += usize::from(g.n > 0.0);
        }
        for path in 0..keys.len() {
            ends[path + 1] += ends[path];
        }
        self.groups = vec![0; ends[keys.len()]];
        for (group, _) in groups.iter().enumerate().filter(|(_, g)| g.n > 0.0) {
            let end = &mut ends[keys.of_group(group)];
            self.groups[*end] = group;
            *end += 1;
        }
        let of_path = |path: usize| if path == 0 { 0..ends[0] } else { ends[path - 1]..ends[path] };
        let mut shared = Vec::new();
        for path in 0..keys.len() {
            for &prefix in &self.chains[chain(&self.chain_ends, path)] {
                let found = &mut self.prefixes[prefix];
                found.paths += 1;
                if found.paths == 1 {
                    (found.start, found.end) = (of_path(path).start, of_path(path).end);
                } else {
                    shared.push((prefix, path));
                }
            }
        }
        shared.sort_by_key(|&(prefix, _)| prefix);
        for paths in shared.chunk_by(|a, b| a.0 == b.0) {
            let prefix = paths[0].0;
            let start = self.groups.len();
            self.groups.extend_from_within(self.prefixes[prefix].start..self.prefixes[prefix].end);
            for &(_, path) in paths {
                self.groups.extend_from_within(of_path(path));
            }
            self.groups[start..].sort_unstable();
            (self.prefixes[prefix].start, self.prefixes[prefix].end) = (start, self.groups.len());
        }
    }

    /// The prefixes, parents first.
    pub(crate) fn prefixes(&self) -> &[Prefix<'a>] {
        &self.prefixes
    }

    /// The non-empty groups under a prefix, in the order of the batch.
    pub(crate) fn groups(&self, prefix: &Prefix<'_>) -> &[usize] {
        &self.groups[prefix.start..prefix.end]
    }

    /// What the listed groups make up.
    pub(crate) fn seen(&self, groups: &GroupStats) -> Seen {
        let under = |prefix| Prior::of_groups(self.groups(prefix).iter().map(|&group| groups.get(group)));
        Seen { all: Prior::of(groups), by_prefix: self.prefixes.iter().map(under).collect() }
    }

    /// The same, from the prior of everything and that of each path's own groups.
    pub(crate) fn seen_by_path(&self, all: Prior, by_path: &[Prior]) -> Seen {
        let mut by_prefix = vec![Prior::default(); self.prefixes.len()];
        for (path, prior) in (0..self.chain_ends.len()).zip(by_path) {
            for &prefix in &self.chains[chain(&self.chain_ends, path)] {
                by_prefix[prefix].merge(prior);
            }
        }
        Seen { all, by_prefix }
    }

    /// The longest prefix of a path; None for the root's.
    pub(crate) fn of_path(&self, path: usize) -> Option<usize> {
        if self.prefixes.is_empty() { None } else { self.chains[chain(&self.chain_ends, path)].last().copied() }
    }
}

fn chain(ends: &[usize], path: usize) -> core::ops::Range<usize> {
    let start = if path == 0 { 0 } else { ends[path - 1] };
    start..ends[path]
}
