"""The library of a node: the tree, its streams, the canonical sums, and what a task is."""
