"""What a config's first examples look like to the model: a page, or text in the terminal."""
