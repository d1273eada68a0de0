"""What the end of an attempt says, and who brings it: results, chord parts, events, rows."""
