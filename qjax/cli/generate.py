"""`qjax generate MODEL --prompt TEXT`: continue a text."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qjax.cli.model import MODEL_HELP, PACKED_HELP, open_with_tokenizer
from qjax.config import check_seed
from qjax.errors import UserError
from qjax.tables import size
from qjax.terminal import shown

if TYPE_CHECKING:
    from qjax.models.parts import Parts


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text streams to standard output.

        qjax generate reference --prompt "def main("
        qjax generate small.gguf --prompt "import os" --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
        qjax generate small.gguf --prompt "import os" --packed --cache Q8_0

    Temperature 0, the default, takes the most likely token each time. Tokens a second are those behind the second, with
    which the last program is compiled.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", help="the text to continue")]
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N", help="new tokens at most")] = 128
    temperature: Annotated[float, tyro.conf.arg(metavar="T", help="0: greedy; 1: the model's own distribution")] = 0.0
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help="draw from the K most likely tokens")] = None
    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help="draw from the likeliest, up to probability P")] = (
        None
    )
    packed: Annotated[bool, tyro.conf.arg(help=PACKED_HELP)] = False
    cache: Annotated[
        str | None, tyro.conf.arg(metavar="FORMAT", help="keep keys and values in a format, such as Q8_0")
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(help="of the arithmetic in blocks")] = "float32"
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="same seed, same text")] = 0

    def execute(self) -> None:
        from qjax.models.generate import Sampling

        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        check_seed("--seed", self.seed)
        model = open_with_tokenizer(self.model, self.packed)

        import jax
        import jax.numpy as jnp

        from qjax.models.generate import generate
        from qjax.models.parts import Packed

        if isinstance(model, Packed):
            model = model.prepacked(dtype=jnp.dtype(self.dtype))
        tokenizer = model.tokenizer
        assert tokenizer is not None
        prompt = tokenizer.encode(self.prompt)
        if tokenizer.add_bos and tokenizer.bos is not None and prompt[:1] != [tokenizer.bos]:
            prompt = [tokenizer.bos, *prompt]
        if not prompt:
            raise UserError(
                '--prompt is empty, and this model has no BOS to begin with; give it text, as in "def main("'
            )
        stop = set(model.stops)
        made: list[int] = []
        said = tokenizer.decode(prompt)
        print(shown(said), end="", flush=True)
        clocks = [time.perf_counter()]
        for token in generate(
            model,
            prompt,
            self.max_tokens,
            sampling,
            jax.random.key(self.seed),
            stop,
            cache=self.cache,
            dtype=jnp.dtype(self.dtype),
        ):
            clocks.append(time.perf_counter())
            made.append(token)
            text = tokenizer.decode([*prompt, *made])
            if not text.endswith("\ufffd"):  # half of a character: its other bytes are in the next token
                print(shown(text[len(said) :]), end="", flush=True)
                said = text
        print(shown(tokenizer.decode([*prompt, *made])[len(said) :]))
        said_of = [f"{len(made)} tokens", *_times(clocks), *_memory(model)]
        print(f"[{', '.join(said_of)}]", file=sys.stderr)


def _times(clocks: list[float]) -> Iterator[str]:
    """How long the first token took, and how many came in a second behind the second."""
    if len(clocks) > 1:
        yield f"the first after {clocks[1] - clocks[0]:.1f} s"
    if len(clocks) > 3:
        yield f"then {(len(clocks) - 3) / (clocks[-1] - clocks[2]):.1f} tokens/s"


def _memory(model: Parts) -> Iterator[str]:
    """What the weights take as they are computed with, and what they would take packed."""
    from qjax.evaluate.judge import sizes_of
    from qjax.models.parts import Packed

    found = sizes_of(model)
    if isinstance(model, Packed):
        yield f"packed weights: {size(found.bytes)}"
    elif found.quantized_parameters:
        yield f"weights decoded to float32: {size(4 * found.parameters)}; with --packed {size(found.bytes)}"
