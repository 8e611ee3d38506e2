"""Kernels for time-aware Transformers: plain functions on arrays, forward and backward, with nothing of the rest.

    from ttr_kernels.attention import TimeBias, attention_forward, attention_backward

Every operation is a folder with the same few files: `__init__` (contract), `reference` (the formula in float64, which
is what float64 arrays run), `cpu` (what float32, bfloat16 and float16 arrays run). Importing this package costs
nothing; importing an operation imports NumPy, and numba when it is first called on such arrays.
"""
