"""Ways to break things: processes, stores, clocks, connections."""
