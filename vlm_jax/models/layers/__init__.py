"""Layers that the families share: linear with LoRA, norms, rotary, attention, scan."""
