"""Files in and out, within limits."""
