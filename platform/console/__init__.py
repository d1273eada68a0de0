"""What commands share: their class, how they end, and how they print."""
