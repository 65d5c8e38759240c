"""What a run leaves: its folder, checkpoints, curves, the exported pipeline, the report."""
