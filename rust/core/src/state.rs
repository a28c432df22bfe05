//! The estimator's whole memory: the priors, the last step, and what other processes do not know of yet.
//!
//! A process that sees one shard of each batch scores with `tree`, what it knows. Of that, `shared` is what every process
//! knows, and `pending` is what this one has seen since the last exchange. Exchanging `pending` alone, and once, is what
//! keeps anything from being counted twice; merging the cumulative `tree`s again and again would.

use crate::estimator::{inverse_scale, is_new};
use crate::keyed::KeyedBatch;
use crate::{Error, GroupStats, Keys, Normalize, Options, Prior, Score, Scored, Shrinkage, State, Tree};

/// What one process tells the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// Statistics seen since the last exchange, decayed to now.
    pub pending: Tree,
    /// Updates since the last exchange, those of empty shards included.
    pub ticks: u64,
    /// Id of the last update applied.
    pub step: Option<i64>,
}

/// The estimator's memory. [`Ledger::default`] has seen nothing.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    tree: Tree,
    step: Option<i64>,
    shared: Tree,
    pending: Tree,
    ticks: u64,
    /// Changes of any sort; tells an exchange whether another thread came between.
    changes: u64,
}

impl Ledger {
    /// A memory that holds `tree`, as known to every process.
    pub fn new(tree: Tree, step: Option<i64>) -> Self {
        Self { shared: tree.clone(), tree, step, ..Self::default() }
    }

    /// The priors that batches are scored with.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The priors as every process knew them after the last exchange, decayed to now.
    pub fn shared(&self) -> &Tree {
        &self.shared
    }

    /// Id of the last update applied.
    pub fn step(&self) -> Option<i64> {
        self.step
    }

    /// Number of changes so far.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What the other processes have not been told.
    pub fn share(&self) -> Share {
        Share { pending: self.pending.clone(), ticks: self.ticks, step: self.step }
    }

    /// Score a batch and, if `update`, take it in; see [`State::advance`]. Without keys its groups enter the root alone.
    pub fn advance(
        &mut self,
        options: &Options,
        groups: &GroupStats,
        keys: Option<&Keys<'_>>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Scored, Error> {
        let update = update && is_new(step, self.step);
        if keys.is_none() && self.tree.keys.is_empty() {
            let mut state = State { prior: self.tree.root, step: self.step };
            let scored = state.advance(options, groups, update, step);
            if update {
                self.tree.root = state.prior;
                self.tick(options.decay, step);
                self.pending.root.merge(&scored.batch);
            }
            return Ok(scored);
        }
        let (root, all) = ([Vec::new()], vec![0; groups.len()]);
        let unkeyed = Keys::new(&root, &all, groups.len())?;
        let batch = KeyedBatch::new(groups, keys.unwrap_or(&unkeyed));
        if update {
            self.tree.check_room(&batch.tree, options.max_keys)?;
        }
        let scored = batch.advance(&mut self.tree, options, update);
        if update {
            self.tick(options.decay, step);
            self.pending.merge(&batch.tree);
        }
        Ok(scored)
    }

    /// Time passes for what the processes exchange, also where this one's shard was empty: the others' need not be.
    fn tick(&mut self, rho: f64, step: Option<i64>) {
        if rho < 1.0 {
            self.shared.decay(rho);
            self.pending.decay(rho);
        }
        self.step = step.or(self.step);
        self.ticks += 1;
        self.changes += 1;
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
        let path = keys.of_group().next().map_or(&[][..], |key| &keys.paths()[key]);
        let prior = self.tree.shrunken(path, options);
        let raw = Options { normalize: Normalize::None, score: Score::Before, leave_one_out: false, ..*options };
        let keys = (!path.is_empty()).then_some(keys);
        let mut scored = self.advance(&raw, group, keys, update, step)?;
        if options.normalize != Normalize::None {
            let batch = Options { normalize: Normalize::Batch, ..*options };
            for (scale, g) in scored.affine.scale.iter_mut().zip(group.iter()) {
                *scale = if prior.sigma2 > 0.0 {
                    1.0 / (prior.sigma2.sqrt() + options.eps)
                } else {
                    inverse_scale(&batch, g.n, g.ssw)
                };
            }
        }
        scored.blended = vec![prior; group.len()];
        Ok(scored)
    }

    /// Take a batch into the root, without decay.
    pub fn observe(&mut self, batch: &Prior) {
        self.tree.root.merge(batch);
        self.pending.root.merge(batch);
        self.changes += 1;
    }

    /// Add what another memory holds; it then counts as known to every process. The newer step stays.
    pub fn merge(&mut self, other: &Self, max_keys: usize) -> Result<(), Error> {
        self.tree.check_room(&other.tree, max_keys)?;
        self.shared.check_room(&other.tree, max_keys)?;
        self.tree.merge(&other.tree);
        self.shared.merge(&other.tree);
        self.step = self.step.max(other.step);
        self.changes += 1;
        Ok(())
    }

    /// Multiply every count and sum by `rho`.
    pub fn decay(&mut self, rho: f64) {
        self.tree.decay(rho);
        self.shared.decay(rho);
        self.pending.decay(rho);
        self.changes += 1;
    }

    /// Replace what was known by `shared` and every process's pending statistics, this one's among them, in that order.
    pub fn exchange(&mut self, shares: &[Share], max_keys: usize) -> Result<(), Error> {
        let mut total = self.shared.clone();
        for share in shares {
            total.check_room(&share.pending, max_keys)?;
            total.merge(&share.pending);
        }
        let step = shares.iter().map(|share| share.step).max().flatten().max(self.step);
        *self = Self { changes: self.changes + 1, ..Self::new(total, step) };
        Ok(())
    }

    /// Score a batch that every process passes whole, so that there is nothing to tell of it afterwards.
    pub fn advance_together(
        &mut self,
        options: &Options,
        groups: &GroupStats,
        keys: Option<&Keys<'_>>,
        update: bool,
        step: Option<i64>,
    ) -> Result<Scored, Error> {
        let scored = self.advance(options, groups, keys, update, step)?;
        *self = Self { changes: self.changes, ..Self::new(self.tree.clone(), self.step) };
        Ok(scored)
    }

    /// `theta~` of a key, see [`Tree::shrunken`].
    pub fn shrunken(&self, path: &[String], options: &Options) -> Shrinkage {
        self.tree.shrunken(path, options)
    }
}
