"""Tests: unit, contract, integration, faults and acceptance; what they share is in `fixtures`."""
