"""Several processes that train one model: communicators, what starts them, and what ends them together."""
