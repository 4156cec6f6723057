"""The text that a recipe looks at: --calib and its options, for the commands that round."""

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
"""The option."""


def texts_of(calib: tuple[str, ...]) -> list[Path]:
    """The files and folders of --calib. Raises UserError where the model's own text is to go with another."""
    if OWN in calib and len(calib) > 1:
        raise UserError(f"--calib {OWN}: the model's own text goes with no other; a file of that name is ./{OWN}")
    return [Path(text) for text in calib if text != OWN]


def check_windows(windows: int | None) -> None:
    """Raise UserError where there would be none to hold out."""
    if windows is not None and windows < 2:
        raise UserError(f"--calib-windows {windows}: two are the least, one to calibrate on and one held out")


def windows_of(
    model: Any, name: str, calib: tuple[str, ...], *, context: int | None, windows: int | None, seed: int
) -> Any:
    """Windows of the texts, or of the model's own where none is given.

    Args:
      model: opened; its tokenizer cuts the text.
      name: what the command line calls it.
      calib, context, windows, seed: the options.
    """
    from qjax.config import check_seed
    from qjax.io.text import texts_at
    from qjax.pipeline import calibration_text
    from qjax.pipeline.windows import LIMIT

    check_seed("--seed", seed)
    if calib in ((), (OWN,)):
        return _own_text(name, calib, context, windows, seed)
    made = calibration_text(model, texts_at(calib), context=context, limit=windows or LIMIT, seed=seed)
    say(f"calibration: {made.tokens.size:,} tokens in {len(made.tokens)} windows")
    return made


def _own_text(name: str, calib: tuple[str, ...], context: int | None, windows: int | None, seed: int) -> Any:
    """Windows that the model writes."""
    from qjax.io.checkpoint import load_float
    from qjax.models.own_text import TOKENS, own_tokens
    from qjax.pipeline import calibration_of

    model = load_float(name)
    context = context or min(512, model.config.context)
    windows = windows or max(2, TOKENS // context)
    say(f"no text was given: the model writes {windows * context:,} tokens to be calibrated on" if not calib
        else f"the model writes {windows * context:,} tokens")  # fmt: skip
    with count_bar(f"text of {name}", "tokens") as progress:
        tokens = own_tokens(model, windows, context, seed, progress=progress)
    return calibration_of(model.config.context, tokens, context=context, seed=seed)
