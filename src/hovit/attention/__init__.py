"""Attention forms: the algorithms of the seeds, pure functions on q, k and v.

`similarity` has those that end in a softmax, `linear` those that do not; `modules` holds the
parameters that some of them learn, and is what a model's blocks call by name.
"""
