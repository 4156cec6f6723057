"""Calibration text as commands take it: files and folders, or windows that the model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli.progress import count_bar
from qjax.errors import UserError
from qjax.terminal import say

OWN = "self"
"""In place of a file: the model writes the text."""

Texts = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        metavar="TEXT", help="calibration text: a file, a folder of .txt, .md and .json, or self; may be repeated"
    ),
]


def check_texts(given: tuple[str, ...]) -> list[Path]:
    """The files and folders among the texts. Raises UserError where the model's own stands beside them."""
    if OWN in given and len(given) > 1:
        raise UserError(f"--calib {OWN}: the model's own text goes with no other; a file of that name is ./{OWN}")
    return [Path(text) for text in given if text != OWN]


def calibration_of_texts(
    given: tuple[str, ...], name: str, model: Any, context: int | None, windows: int | None, seed: int
) -> Any:
    """Windows of the texts; of the model's own where none is given.

    Args:
      given: what --calib said.
      name: MODEL, to load it where it writes the text.
      model: a Model or a Source, for its tokenizer.
      context: tokens a window; None: 512 or the model's.
      windows: at most; None: 128, or 32,768 tokens of the model's own.
      seed: of a text, and labels, drawn from the model.
    """
    from qjax.config import check_seed
    from qjax.io.text import texts_at
    from qjax.pipeline import calibration_text
    from qjax.pipeline.windows import LIMIT

    check_seed("--seed", seed)
    if given in ((), (OWN,)):
        return _own_text(name, bool(given), context, windows, seed)
    made = calibration_text(model, texts_at(given), context=context, limit=windows or LIMIT, seed=seed)
    say(f"calibration: {made.tokens.size:,} tokens in {len(made.tokens)} windows")
    return made


def _own_text(name: str, asked: bool, context: int | None, windows: int | None, seed: int) -> Any:
    """Windows that the model writes."""
    from qjax.io.checkpoint import load_float
    from qjax.models.own_text import TOKENS, own_tokens
    from qjax.pipeline import calibration_of

    model = load_float(name)
    context = context or min(512, model.config.context)
    windows = windows or max(2, TOKENS // context)
    say(f"the model writes {windows * context:,} tokens" if asked
        else f"no text was given: the model writes {windows * context:,} tokens to be calibrated on")  # fmt: skip
    with count_bar(f"text of {name}", "tokens") as progress:
        tokens = own_tokens(model, windows, context, seed, progress=progress)
    return calibration_of(model.config.context, tokens, context=context, seed=seed)
