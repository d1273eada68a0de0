"""Views for people: the cluster, one job, the invariants."""
