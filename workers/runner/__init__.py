"""The elected worker that runs the duties."""
