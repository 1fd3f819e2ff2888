"""Records: sources and formats."""
