"""Who runs where: pure decisions over plain values."""
