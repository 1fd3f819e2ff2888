"""Limits on what a file may ask for (size, depth, time, finiteness, place), and why each is so.

What is read from a file that somebody else wrote is held against these before it is used. Each is
far above what real files need and far below what stops a machine.
"""

# Chat templates: a checkpoint's own code, kept from files by its sandbox but not from the clock.
TEMPLATE_SOURCE = 2**20  # characters; the longest in use (tools, thoughts, media) have 30,000
TEMPLATE_SECONDS = 5.0  # for one rendering; a conversation of 10,000 turns takes a tenth of one
TEMPLATE_CHARACTERS = 64 * 2**20  # of a text on its way, a prompt of 64 MB is none
TEMPLATE_NUMBER = 2**20  # an argument (a width, a count), and the bits of a number that is computed

# CSV and TSV: a quote that nothing closes would make one row of all that follows.
CSV_ROW_BYTES = 64 * 2**20  # a row may hold a picture in base64
