"""Adapting a Linen module that knows nothing of this project, through `nn.intercept_methods`."""
