"""Distances between sets of pictures, by named protocols that travel with their results."""
