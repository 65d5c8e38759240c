"""Mathematics of diffusion: schedules, the eps/v/x0 hub, reflection, solvers, exact teachers. No network library."""
