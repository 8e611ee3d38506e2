"""Time-aware Transformers over timestamped sequences, without a deep-learning framework."""

__version__ = "0.1.0"
