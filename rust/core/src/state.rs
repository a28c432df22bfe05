//! The estimator's whole memory, the priors and the last step, and what changes it.

use core::iter;

use crate::estimator::{finish, inverse_scale, leave_one_out_by_key};
use crate::groups::Group;
use crate::tree::Before;
use crate::{EqualGroups, Error, Float, GroupStats, Keys, LeaveOneOut, Normalize, Options, Prior, Score, Scored, Tree};

/// The estimator's memory between batches. [`State::default`] has seen nothing.
#[derive(Clone, Debug, Default)]
pub struct State {
    tree: Tree,
    step: Option<i64>,
    /// What the last update overwrote, and the step before it.
    before: Option<(Before, Option<i64>)>,
}

/// What has been seen, whether or not the last update can be taken back.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.step == other.step && self.tree == other.tree
    }
}

impl State {
    /// A state from its parts.
    pub fn new(tree: Tree, step: Option<i64>) -> Self {
        Self { tree, step, before: None }
    }

    /// The priors that batches are scored with.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Id of the last update applied.
    pub fn step(&self) -> Option<i64> {
        self.step
    }

    /// Score a batch and, if `update`, take it into the priors: Algorithm 1.
    ///
    /// Without keys ([`Keys::ROOT`]) every group is shrunk toward the root's prior. A `step` that is not newer than the
    /// last one applied marks a retry or a replay: it scores against the stored priors, which already hold that batch,
    /// and updates nothing. An error leaves the state as it was.
    pub fn advance(
        &mut self,
        options: &Options,
        groups: &GroupStats,
        keys: &Keys<'_>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Scored, Error> {
        let update = update && self.is_newer(step);
        let visits = keys.visits(groups);
        let mut found = self.tree.find_all(&visits);
        let before = self.tree.root;
        let score_first = !update || options.score == Score::Before;
        let blended = |tree: &Tree, found: &[Option<usize>]| {
            let (root, of_prefix) = tree.all_shrunken(&visits, found, options);
            let of_path = |path| visits.of_path(path).map_or(root, |prefix| of_prefix[prefix]);
            (0..keys.len()).map(of_path).collect::<Vec<_>>()
        };
        let mut shrunken = if score_first { blended(&self.tree, &found) } else { Vec::new() };
        let mut without = None;
        if update {
            // Step 1: the batch enters the prior of each of its keys, and the root's.
            let visited = visits.prefixes().iter().zip(&found).filter(|(prefix, _)| !visits.groups(prefix).is_empty());
            let old = visited.clone().filter_map(|(_, key)| *key);
            self.tree.check_room(visited.filter(|(_, key)| key.is_none()).count(), options.max_keys)?;
            self.before = Some((self.tree.before(options, old.clone()), self.step));
            let batch = Prior::of(groups);
            if !batch.is_empty() {
                self.tree.forget(options, old); // rows that do not count never touch a prior, hence neither does time
            }
            if options.leave_one_out != LeaveOneOut::Nothing && !score_first {
                without = Some(leave_one_out_by_key(&self.tree, options, groups, &visits, &found, keys));
            }
            self.tree.take(&batch, groups, &visits, &mut found);
            self.step = step.or(self.step);
        }
        if !score_first {
            shrunken = blended(&self.tree, &found);
        }
        let blended = shrunken;
        // Steps 2 and 3: S and mu of each group; those of a key mostly once, for its groups are mostly of one size.
        let shrunk: Vec<_> = if let Some(without) = without {
            without.iter().zip(groups.iter()).map(|(rest, g)| rest.of_row(g.n, options.leave_one_out)).collect()
        } else {
            let mut known = vec![(0.0, (0.0, 0.0)); blended.len()];
            let of_group = |(group, g): (usize, &Group)| {
                let key = keys.of_group(group);
                let (n, shrunk) = &mut known[key];
                if *n != g.n {
                    (*n, *shrunk) = (g.n, blended[key].of_row(g.n, options.leave_one_out));
                }
                *shrunk
            };
            groups.iter().enumerate().map(of_group).collect()
        };
        // Steps 4 to 6.
        let prior = if score_first { before } else { self.tree.root };
        let (affine, shrinkage, baseline) = finish(options, groups, &shrunk);
        Ok(Scored { affine, shrinkage, baseline, prior, before, blended })
    }

    /// Step 1 for a batch of equal groups without keys: the root's prior before it, and the one to score it with.
    ///
    /// None, with nothing changed, where [`State::advance`] must look at the batch: a group is to be left out of its prior,
    /// or an advantage may leave the range of `T`.
    pub fn advance_equal<T: Float>(
        &mut self,
        options: &Options,
        batch: &EqualGroups<'_, T>,
        update: bool,
        step: Option<i64>,
    ) -> Option<(Prior, Prior)> {
        let before = self.tree.root;
        if options.needs_each_group() || !batch.has_room(&before) {
            return None;
        }
        let update = update && self.is_newer(step);
        if update {
            self.before = Some((self.tree.before(options, iter::empty()), self.step));
            self.tree.forget(options, iter::empty());
            self.tree.root.merge(batch.prior());
            self.step = step.or(self.step);
        }
        Some((before, if update && options.score == Score::After { self.tree.root } else { before }))
    }

    /// True for the id of an update that was not applied yet.
    fn is_newer(&self, step: Option<i64>) -> bool {
        !matches!((step, self.step), (Some(new), Some(last)) if new <= last)
    }

    /// Score one group against the prior as it is, `(r - V) / (sqrt(sigma2) + eps)`, then take it in.
    ///
    /// While `sigma2` is 0 (an empty prior, or one that has seen equal rewards only) S is 0 too, and the group's own
    /// standard deviation about its mean, with `norm_ddof`, stands in for `sqrt(sigma2)`.
    pub fn stream(
        &mut self,
        options: &Options,
        group: &GroupStats,
        keys: &Keys<'_>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Scored, Error> {
        // Read before it is updated, the prior holds no group to leave out; a row still leaves its group's mean.
        let left_out = match options.leave_one_out {
            LeaveOneOut::Row => LeaveOneOut::Row,
            LeaveOneOut::Nothing | LeaveOneOut::Group => LeaveOneOut::Nothing,
        };
        let raw = Options { normalize: Normalize::None, score: Score::Before, leave_one_out: left_out, ..*options };
        let mut scored = self.advance(&raw, group, keys, update, step)?;
        if options.normalize != Normalize::None {
            let own = Options { normalize: Normalize::Batch, ..*options };
            for (index, (scale, g)) in scored.affine.scale.iter_mut().zip(group.iter()).enumerate() {
                let sigma2 = scored.blended[keys.of_group(index)].sigma2;
                *scale =
                    if sigma2 > 0.0 { 1.0 / (sigma2.sqrt() + options.eps) } else { inverse_scale(&own, g.n, g.ssw) };
            }
        }
        Ok(scored)
    }

    /// Take a batch into the root, without decay.
    pub fn observe(&mut self, batch: &Prior) {
        self.tree.root.merge(batch);
        self.before = None;
    }

    /// Add what another state holds, discounted up to its own last update; the newer step stays.
    pub fn merge(&mut self, other: &Self, max_keys: usize) -> Result<(), Error> {
        self.tree.merge(&other.tree, max_keys)?;
        self.step = self.step.max(other.step);
        self.before = None;
        Ok(())
    }

    /// Multiply every count and sum by `rho`.
    pub fn decay(&mut self, rho: f64) {
        self.tree.decay(rho);
        self.before = None;
    }

    /// The state as it was before its last update; as it is, where it has had none since it was made, loaded or merged.
    #[must_use]
    pub fn before_update(&self) -> Self {
        let mut state = Self { tree: self.tree.clone(), step: self.step, before: None };
        if let Some((before, step)) = &self.before {
            state.tree.restore(before);
            state.step = *step;
        }
        state
    }

    /// A number that equal states of one history have in common, and other states hardly ever.
    pub fn digest(&mut self) -> u64 {
        self.tree.digest()
    }
}
