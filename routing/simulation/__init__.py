"""Simulation of the policy in virtual time: pure values in, starts out."""
