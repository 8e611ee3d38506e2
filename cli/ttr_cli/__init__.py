"""Command-line interface of ttr-gpu: parse, call ttr_gpu, print."""
