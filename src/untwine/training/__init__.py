"""Training: one trainer for every objective, with exact resume."""
