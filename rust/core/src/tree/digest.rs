//! A number that equal trees have in common, kept up by updates.

use std::hash::{DefaultHasher, Hasher};

use super::Tree;
use crate::Prior;

impl Tree {
    /// A number that equal trees have in common, and other trees hardly ever; at an update it costs no walk.
    pub(crate) fn digest(&mut self) -> u64 {
        let of_nodes = self
            .digest
            .unwrap_or_else(|| (0..self.nodes.len()).fold(0_u64, |sum, node| sum.wrapping_add(self.hash_of(node))));
        self.digest = Some(of_nodes);
        let mut hasher = DefaultHasher::new();
        hash_prior(&mut hasher, &self.root);
        for word in [of_nodes, self.nodes.len() as u64, self.rho.to_bits(), self.clock.cast_unsigned()] {
            hasher.write_u64(word);
        }
        hasher.finish()
    }

    pub(super) fn hash_of(&self, key: usize) -> u64 {
        let node = &self.nodes[key];
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(node.hash);
        hasher.write_i64(node.touched);
        hash_prior(&mut hasher, &node.prior);
        hasher.finish()
    }
}

fn hash_prior(hasher: &mut DefaultHasher, prior: &Prior) {
    prior.parts().iter().for_each(|value| hasher.write_u64(value.to_bits()));
}
