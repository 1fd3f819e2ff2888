"""A preview in the terminal: the page's content, in colour where supported."""

from rich.console import Console
from rich.text import Text

from vlm_jax.errors import marked
from vlm_jax.preview.collect import Histogram, Preview, Row, first_messages
from vlm_jax.preview.example import Example, Picture, Piece, Target
from vlm_jax.preview.page import visible, weight

STYLES = {
    "text": "",
    "loss": "black on green",
    "image": "white on blue",
    "video": "white on magenta",
    "padding": "dim",
}
BLOCKS = "▁▂▃▄▅▆▇█"
# Where there is no colour, brackets say what carries loss.
OPEN, CLOSE = "⟦", "⟧"

Line = tuple[str | Text, str]  # and its style
EMPTY: Line = ("", "")


def show(preview: Preview, console: Console | None = None) -> None:
    """Print settings, statistics and examples."""
    console = console or Console(highlight=False)
    for text, style in _lines(preview, colour=console.color_system is not None):
        # Never markup: data may hold "[b]".
        line = Text(marked(text)) if isinstance(text, str) else text
        console.print(line, style=style, soft_wrap=not console.is_terminal)


def _lines(preview: Preview, colour: bool) -> list[Line]:
    legend = Text("read only ")
    for kind, name in (("loss", "carries loss"), ("image", "image"), ("video", "video")):
        legend.append(_marked(name, kind, colour), STYLES[kind] if colour else "")
        legend.append(" ")
    how = "in evaluation order" if preview.split == "eval" else "in training order"
    count = len(preview.examples)
    first = "first example" if count == 1 else f"first {count} examples"
    return [
        (f"{preview.data}, the {first} {how}", "bold"),
        (f"encoded for {preview.model}", ""),
        EMPTY,
        *(
            (f"{key:16} {value}" + (f"  ({note})" if note else ""), "")
            for key, value, note in preview.settings
        ),
        EMPTY,
        *((text, "") for text in statistics(preview)),
        *(
            (f"left out {count} ({reason}): {message}", "red")
            for reason, count, message in first_messages(preview.report)
        ),
        *((f"its place stays empty: {message}", "red") for message in preview.damaged),
        EMPTY,
        *((_bars(one), "") for one in preview.histograms),
        EMPTY,
        (legend, ""),
        *(line for row in preview.rows for line in (EMPTY, *_row(row, colour))),
    ]


def _bars(data: Histogram) -> str:
    """Return a histogram on one line."""
    most = max(count for _, _, count in data.bars)
    bars = "".join(BLOCKS[-(-7 * count // most)] if count else " " for _, _, count in data.bars)
    limit = "" if data.limit is None else f", limit {data.limit:,}"
    return (
        f"{data.name:16} {data.bars[0][0]:,} |{bars}| {data.bars[-1][1]:,}  median "
        f"{data.median:,}, 99 % <= {data.high:,}, largest {data.largest:,}{limit}"
    )


def statistics(preview: Preview) -> list[str]:
    """Return the figures of a preview, as sentences."""
    report = preview.report
    steps = f"{preview.total_steps or '?'} steps"
    if report["steps_per_epoch"] is None:
        steps += " in all, from a stream: training.max_steps"
    elif preview.split == "train":
        about = "" if preview.exact else "about "
        steps += f" in all, {about}{report['steps_per_epoch']:,} an epoch"
    return [
        f"{report['records']:,} records, {report['measured']:,} measured, "
        f"{report['examples']:,} kept, {sum(report['dropped'].values()):,} left out, "
        f"{report['shrunk']:,} with smaller images, {report['turns_dropped']:,} with fewer turns",
        f"{100 * report['answer_tokens'] / report['tokens']:.1f} % of tokens carry loss; "
        f"padding is {100 * report['padding']:.1f} % of tokens and "
        f"{100 * report['patch_padding']:.1f} % of patches",
        steps,
    ]


def _row(row: Row, colour: bool) -> list[Line]:
    shown = f", {len(row.examples)} shown" if len(row.examples) < row.segments else ""
    padding = row.shape[0] - row.tokens
    title = (
        f"── step {row.step}, row {row.number}: {row.tokens:,} of {row.shape[0]:,} tokens, "
        f"{row.patches:,} of {row.shape[1]:,} patches, "
        f"{row.segments} {'example' if row.segments == 1 else 'examples'}{shown}"
    )
    lines = [line for example in row.examples for line in _example(example, colour)]
    if padding and not shown:
        lines.append((f"padding × {padding:,}", STYLES["padding"]))
    return [(title, "bold"), *lines]


def _example(example: Example, colour: bool) -> list[Line]:
    positions = "; ".join(f"{which}: {where}" for which, where in example.runs)
    return [
        (
            f"{example.id}  {example.place}  {example.tokens:,} tokens, "
            f"{example.loss_tokens:,} with loss, {example.patches:,} patches",
            "bold",
        ),
        *((note, "yellow") for note in example.notes),
        *(_picture(number, one) for number, one in enumerate(example.pictures, start=1)),
        (tokens(example.pieces, colour), ""),
        *((_target(target), "") for target in example.targets),
        (f"positions: {positions}", "dim"),
    ]


def _picture(number: int, picture: Picture) -> Line:
    start = "" if picture.original is None else "{1} × {0} → ".format(*picture.original)
    frames = f", {len(picture.frames)} frames" if picture.kind == "video" else ""
    return (
        f"{picture.kind} {number}: {start}{picture.width} × {picture.height} pixels{frames}, "
        f"{picture.tokens:,} tokens of {picture.cell} × {picture.cell}",
        "blue" if picture.kind == "image" else "magenta",
    )


def _target(target: Target) -> str:
    share = "" if target.weight == 1 else f", weight {target.weight:g}"
    return f"target, {target.tokens} tokens{share}: {visible(target.text).strip()}"


def tokens(pieces: list[Piece], colour: bool) -> Text:
    """Return an example's tokens; without colours, loss stands in brackets, run by run."""
    text = Text()
    for i, piece in enumerate(pieces):
        written = visible(piece.text) + (f" × {piece.count:,}" if piece.number else "")
        if colour:
            begins = i == 0 or pieces[i - 1].weight != piece.weight
            text.append((weight(piece) if begins else "") + written, STYLES[piece.kind])
            continue
        before = i > 0 and (pieces[i - 1].kind, pieces[i - 1].weight) == (piece.kind, piece.weight)
        after = i + 1 < len(pieces) and (
            (pieces[i + 1].kind, pieces[i + 1].weight) == (piece.kind, piece.weight)
        )
        if piece.kind == "loss":
            written = ("" if before else OPEN) + written
            if not after:
                body = written.removesuffix("\n")
                written = f"{body}{CLOSE}{weight(piece)}{written[len(body) :]}"
        elif piece.number:
            written = f"[{written}]"
        text.append(written)
    return text


def _marked(name: str, kind: str, colour: bool) -> str:
    if colour:
        return name
    return f"{OPEN}{name}{CLOSE}" if kind == "loss" else f"[{name}]"
