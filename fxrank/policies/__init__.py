"""Who decides E, K and R, and from what: policies, rank curves, rank rules."""
