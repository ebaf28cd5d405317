"""Encoder sharing: which steps recompute the encoder state, and what its decoder is given on the others.

Measure a model (:mod:`.probe`), decide (:mod:`.plan`), and see what it saves and costs (:mod:`.report`). The sharing
itself is a setting of the sampling core: :class:`untwine.diffusion.sampling.Sampling`.
"""
