"""The tables of the README and of the page of results: each function makes one from files of ``benchmarks/results``."""
