"""Conversations as tokens: the chat template, in bounds, and where answers stand."""
