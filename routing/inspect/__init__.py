"""The platform as people see it: the cluster, one job, the invariants."""
