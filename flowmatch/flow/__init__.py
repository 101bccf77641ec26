"""The math: paths, couplings, time grids, solvers, samplers, losses."""
