"""Workers that die, stop, or come twice."""
