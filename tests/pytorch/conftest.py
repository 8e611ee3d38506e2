"""PyTorch on one thread: its own would spin between calls and take the cores away from ours."""

import contextlib

with contextlib.suppress(ImportError, AttributeError):
    import torch

    torch.set_num_threads(1)
