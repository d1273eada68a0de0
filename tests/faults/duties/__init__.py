"""Duties, beat and clients that die, and messages that are lost or doubled."""
