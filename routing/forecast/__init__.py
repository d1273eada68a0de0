"""Forecasts: a copy of the cluster from the stores, the starts that the policy would make, and how wrong they were."""
