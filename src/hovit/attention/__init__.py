"""Attention forms: pure functions on q, k and v, and modules that models create by name.

`forms` is the table of names and properties, `similarity` and `linear` hold the functions, `flex`
the fused kernel of some of them, and `modules` the learned parameters.
"""
