"""Limits on what a file may ask for (size, depth, time, finiteness, place), and why each is so.

What is read from a file that somebody else wrote is held against these before it is used. Each is
far above what real files need and far below what stops a machine.
"""
