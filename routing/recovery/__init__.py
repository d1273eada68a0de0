"""Agreement of both stores: the log of transitions, rebuild, reconcile, lost workers."""
