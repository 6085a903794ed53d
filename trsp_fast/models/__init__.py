"""What knows transformers: where the layers are, gates on them, taking them out, and proving it."""
