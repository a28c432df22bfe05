"""One step of decoding: which expert each row selects, the caches of lazy experts, and the sum of logits."""
