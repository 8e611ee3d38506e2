"""From raw files to packed batches: readers, validation, tokenizer, splits, shards, batches."""
