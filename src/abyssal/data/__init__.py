"""From files of text to batches of tokens: corpus, shards on disk, the order they are trained in, batches."""
