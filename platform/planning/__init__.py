"""Commands that plan: the policy on a copy of the cluster."""
