"""Records of how jobs went: their run times, and how wrong estimated starts were. Each file is one duty."""
