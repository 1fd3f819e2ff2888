"""A checkpoint's chat template, rendered within limits of time and size."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from vlm_jax.data.text.sandbox import END, START, TooLarge, compile_template
from vlm_jax.data.text.watchdog import within
from vlm_jax.errors import UserError, explained
from vlm_jax.files.limits import TEMPLATE_SECONDS, TEMPLATE_SOURCE

Span = tuple[int, int]
Messages = Sequence[dict[str, Any]]


class BadTemplate(UserError):
    """A template that no conversation can be rendered by: no record's fault."""


class Template:
    """A template as transformers compiles it, with `{% generation %}` marks. Thread-safe.

    directory: for errors. Raises `UserError` for invalid Jinja, or too large.
    """

    def __init__(self, source: str, directory: str):
        self.source, self.directory = source, directory
        self._refused: str | None = None
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        if len(source) > TEMPLATE_SOURCE:
            raise UserError(
                f"The chat template of '{directory}' has {len(source)} characters, and more than "
                f"{TEMPLATE_SOURCE} are not read. Copy the checkpoint's own."
            )
        with explained(
            Exception,  # Python compiles what Jinja writes, and has limits of its own
            lambda error: (
                f"The chat template of '{directory}' is not valid Jinja: {_reason(error)}. Correct "
                f"chat_template.jinja, or copy the checkpoint's own."
            ),
        ):
            self._compiled = within(TEMPLATE_SECONDS, compile_template, source)

    def render(self, messages: Messages, prompt: bool, **values: Any) -> tuple[str, list[Span]]:
        """Return the text and what its generation marks hold.

        prompt: with what asks the assistant to write. Raises `UserError` where the template
        refuses the conversation, `BadTemplate` where it takes too long or asks for too much.
        """
        if self._refused is not None:  # or each record would take as long again
            raise BadTemplate(self._refused)
        try:
            text = within(
                TEMPLATE_SECONDS,
                self._compiled.render,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **values,
            )
        except (TimeoutError, TooLarge) as error:
            self._refused = (
                f"The chat template of '{self.directory}' {error}, for one conversation, which "
                f"needs nothing of the kind: it is damaged, or meant to stop whoever uses it. Copy "
                f"the checkpoint's own chat_template.jinja."
            )
            raise BadTemplate(self._refused) from error
        except Exception as error:  # a template is the checkpoint's own code
            roles = [message["role"] for message in messages]
            few = ", ".join(roles[:6]) + (f", ... {len(roles)} in all" if len(roles) > 6 else "")
            raise UserError(
                f"The chat template of '{self.directory}' refuses the conversation ({few}): "
                f"{_reason(error)}. Check the roles and their order."
            ) from error
        return _take_marks(text) if self.has_marks else (text, [])


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def _take_marks(text: str) -> tuple[str, list[Span]]:
    """Return the text without its marks, and what each pair of them held."""
    pieces = re.split(f"[{START}{END}]", text)
    places = list(itertools.accumulate(map(len, pieces)))[:-1]  # of the marks between them
    return "".join(pieces), list(zip(places[::2], places[1::2], strict=False))
