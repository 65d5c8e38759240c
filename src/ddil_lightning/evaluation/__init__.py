"""Metrics, the suite that computes them, rows and tables of results."""
