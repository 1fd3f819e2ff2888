"""Several processes as one: barriers, failures and signals."""
