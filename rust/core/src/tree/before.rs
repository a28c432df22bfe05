//! What an update overwrites, kept so that the update can be taken back.

use super::Tree;
use crate::{Options, Prior};

/// What an update overwrote, so that it can be taken back.
#[derive(Clone, Debug)]
pub(crate) struct Before {
    root: Prior,
    rho: f64,
    clock: i64,
    nodes: usize,
    names: usize,
    touched: Vec<(usize, Prior, i64)>,
}

impl Tree {
    /// What an update of these keys is going to overwrite: all keys, where it is the first by another rate.
    pub(crate) fn before(&self, options: &Options, keys: impl Iterator<Item = usize>) -> Before {
        let saved = |key: usize| (key, self.nodes[key].prior, self.nodes[key].touched);
        let settled = if self.is_other_rate(options) { 0..self.nodes.len() } else { 0..0 };
        Before {
            root: self.root,
            rho: self.rho,
            clock: self.clock,
            nodes: self.nodes.len(),
            names: self.names.len(),
            touched: settled.chain(keys).map(saved).collect(),
        }
    }

    /// Take an update back.
    pub(crate) fn restore(&mut self, before: &Before) {
        for node in (before.nodes..self.nodes.len()).rev() {
            if let Ok(entry) = self.index.find_entry(self.nodes[node].hash, |&other| other == node) {
                entry.remove();
            }
        }
        self.nodes.truncate(before.nodes);
        self.names.truncate(before.names);
        for &(key, prior, touched) in &before.touched {
            let node = &mut self.nodes[key];
            (node.prior, node.touched) = (prior, touched);
        }
        (self.root, self.rho, self.clock, self.digest) = (before.root, before.rho, before.clock, None);
    }
}
