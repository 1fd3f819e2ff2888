"""Text: chat templates within limits, tokens, spans of answers."""
