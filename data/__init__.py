"""Text and conversations to tokens: tokenizer, chat format, loaders, real data sets."""
