"""What every method shares: the Lightning module, optimisation, averages, the clock, the plan of stages, sharding."""
