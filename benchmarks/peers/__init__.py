"""FastVLM run by us, by transformers and by mlx-vlm: one checkpoint, one image, one question."""
