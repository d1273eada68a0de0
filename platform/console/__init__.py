"""Parts that commands share: their class, their end, their output."""
