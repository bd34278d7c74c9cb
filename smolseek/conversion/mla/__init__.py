"""Grouped-query attention to multi-head latent attention in closed form: pure functions on float64 tensors.

docs/method.md derives every step. Rope slots first, then the latent, then the heads; `layout` names the tensors.
"""
