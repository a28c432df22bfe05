//! The estimator's whole memory, the priors and the last step, and what changes it.

use crate::estimator::{inverse_scale, leave_one_out_by_key};
use crate::keys::{Seen, Visits};
use crate::tree::Before;
use crate::{
    EqualGroups, Error, Float, GroupStats, Keys, LeaveOneOut, Normalize, Options, Prior, Score, Scored, Targets, Tree,
};

/// The estimator's memory between batches. [`State::default`] has seen nothing.
#[derive(Clone, Debug, Default)]
pub struct State {
    tree: Tree,
    step: Option<i64>,
    /// What the last update overwrote, and the step before it.
    before: Option<(Before, Option<i64>)>,
}

/// A batch that is to enter the priors.
struct Update {
    seen: Seen,
    step: Option<i64>,
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
        let found = self.tree.find_all(&visits);
        let mut without = None;
        let leave_out = |history: &Tree, found: &[Option<usize>]| {
            if options.leave_one_out != LeaveOneOut::Nothing && options.score == Score::After {
                without = Some(leave_one_out_by_key(history, options, groups, &visits, found, keys));
            }
        };
        let batch = update.then(|| Update { seen: visits.seen(groups), step });
        let targets = self.take(options, keys, &visits, found, batch, leave_out)?;
        Ok(match without {
            Some(without) => targets.score_without(options, groups, &without),
            None => targets.score(options, groups, keys),
        })
    }

    /// The same for a batch of equal groups: what to score it with, by [`EqualGroups::write`].
    ///
    /// None, with nothing changed, where [`State::advance`] must look at the batch: a group is to be left out of its prior,
    /// or an advantage may leave the range of `T`.
    pub fn advance_equal<T: Float>(
        &mut self,
        options: &Options,
        batch: &EqualGroups<'_, T>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Option<Targets>, Error> {
        let keys = batch.keys();
        let visits = keys.visits_without_groups();
        let found = self.tree.find_all(&visits);
        if options.needs_each_group() || !batch.has_room(self.tree.farthest_mean(&found)) {
            return Ok(None);
        }
        let seen = || visits.seen_by_path(*batch.prior(), batch.by_path());
        let batch = (update && self.is_newer(step)).then(|| Update { seen: seen(), step });
        self.take(options, keys, &visits, found, batch, |_, _| ()).map(Some)
    }

    /// Step 1: the batch, if it is an update, enters the prior of each of its keys, and the root's.
    ///
    /// `found` are the keys of the visits, `history` is called with what is remembered of them when the batch enters.
    fn take(
        &mut self,
        options: &Options,
        keys: &Keys<'_>,
        visits: &Visits<'_>,
        mut found: Vec<Option<usize>>,
        batch: Option<Update>,
        history: impl FnOnce(&Tree, &[Option<usize>]),
    ) -> Result<Targets, Error> {
        let before = self.tree.root;
        let blended = |tree: &Tree, found: &[Option<usize>]| {
            let (root, of_prefix) = tree.all_shrunken(visits, found, options);
            let of_path = |path| visits.of_path(path).map_or(root, |prefix| of_prefix[prefix]);
            (0..keys.len()).map(of_path).collect::<Vec<_>>()
        };
        let Some(Update { seen, step }) = batch else {
            return Ok(Targets { prior: before, before, blended: blended(&self.tree, &found) });
        };
        let visited = found.iter().zip(&seen.by_prefix).filter(|(_, prior)| !prior.is_empty());
        let old = visited.clone().filter_map(|(key, _)| *key);
        self.tree.check_room(visited.filter(|(key, _)| key.is_none()).count(), options.max_keys)?;
        let first = (options.score == Score::Before).then(|| blended(&self.tree, &found));
        self.before = Some((self.tree.before(options, old.clone()), self.step));
        if !seen.all.is_empty() {
            self.tree.forget(options, old); // rows that do not count never touch a prior, hence neither does time
        }
        history(&self.tree, &found);
        self.tree.take(&seen, visits, &mut found);
        self.step = step.or(self.step);
        Ok(match first {
            Some(blended) => Targets { prior: before, before, blended },
            None => Targets { prior: self.tree.root, before, blended: blended(&self.tree, &found) },
        })
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
                let sigma2 = scored.targets.blended[keys.of_group(index)].sigma2;
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
