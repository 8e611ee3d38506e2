"""What the operations share: array checks, dispatch, threads, compilation, vectorisable mathematics, random bits."""
