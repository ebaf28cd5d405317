"""Bridges to code and weights that are not ours."""
