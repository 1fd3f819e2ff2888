"""Previews of a config's first examples: a page, or text in the terminal."""
