"""HTTP itself: who may ask, how often, what a browser may do with an answer, and how the server runs."""
