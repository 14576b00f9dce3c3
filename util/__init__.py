"""Everything around the model: flags, processes, data, caches, checkpoints, logs, metrics."""
