"""What is added to a frozen base: LoRA, bottleneck adapters, modules in full, tokens."""
