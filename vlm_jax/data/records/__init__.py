"""Records: where they come from, and the shapes that they may have."""
