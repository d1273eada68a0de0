"""Calls of senders to the ledger, and the circuit that leaves it alone while it does not answer."""
