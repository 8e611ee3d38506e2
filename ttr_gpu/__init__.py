"""Time-aware Transformer models: layers, data, training, inference."""
