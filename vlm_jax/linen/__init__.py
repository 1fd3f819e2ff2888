"""Adapters for foreign Linen modules, through `nn.intercept_methods`."""
