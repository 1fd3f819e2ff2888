"""Messages about keys of other programs."""

from typing import NamedTuple

SAME, RENAMED, NOT_NEEDED, REFUSED = "same", "renamed", "not needed", "refused"


class Said(NamedTuple):
    """What a key is here. words: what differs (same), our key (renamed), or why not."""

    kind: str
    words: str = ""
