"""LoRA adapters: which there are, which are loaded, and what they add to a step."""
