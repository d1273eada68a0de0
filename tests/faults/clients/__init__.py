"""Programs and threads that submit jobs while things break."""
