"""Parameter-efficient methods on a frozen base: LoRA, bottleneck adapters, modules, tokens."""
