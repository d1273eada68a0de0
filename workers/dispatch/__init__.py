"""What a sender asks of the ledger, and what it does while the ledger does not answer."""
