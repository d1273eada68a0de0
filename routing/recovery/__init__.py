"""Making both stores agree: the log of transitions, rebuild, reconcile, lost workers."""
