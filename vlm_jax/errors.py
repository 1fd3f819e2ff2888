"""The one exception a stranger may see: a paragraph saying what, where, expected, remedy."""


class UserError(Exception):
    """Bad input from outside: the command line prints its text alone and exits with code 2.

    Raised for anything the user can mend (a missing file, an unknown key, a checkpoint that
    does not fit its config). Its message says what was wrong, where, what was expected, and
    what to do. Anything else that is raised is a bug and keeps its traceback.
    """


def nearest(name: str, known) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
