"""Weight pruning without a Trainer: which weights are pruned, and to which sparsity."""
