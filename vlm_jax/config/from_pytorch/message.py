"""Messages about keys of other programs."""

from typing import NamedTuple

SAME, RENAMED, NOT_NEEDED, REFUSED = "same", "renamed", "not needed", "refused"


class Key(NamedTuple):
    """A key of another program. kind: what it is here.

    words: what differs (same), our key (renamed), or why it is not one here.
    """

    kind: str
    words: str = ""
