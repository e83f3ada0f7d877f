"""Plain checkpoints → quantized ones, on disk, in layouts that others read, too."""
