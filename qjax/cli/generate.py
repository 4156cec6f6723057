"""`qjax generate MODEL --prompt TEXT`: continue a text."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Annotated

import tyro

from qjax.cli.model import MODEL_HELP, open_with_tokenizer
from qjax.config import check_seed
from qjax.errors import UserError
from qjax.terminal import shown


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text streams to standard output.

        qjax generate reference --prompt "def main("
        qjax generate small.gguf --prompt "import os" --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1

    Temperature 0, the default, takes the most likely token each time.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT", help="the text to continue")]
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N", help="new tokens at most")] = 128
    temperature: Annotated[float, tyro.conf.arg(metavar="T", help="0: greedy; 1: the model's own distribution")] = 0.0
    top_k: Annotated[int | None, tyro.conf.arg(metavar="K", help="draw from the K most likely tokens")] = None
    top_p: Annotated[float | None, tyro.conf.arg(metavar="P", help="draw from the likeliest, up to probability P")] = (
        None
    )
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="same seed, same text")] = 0

    def execute(self) -> None:
        from qjax.models.generate import Sampling

        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        check_seed("--seed", self.seed)
        model = open_with_tokenizer(self.model)

        import jax

        from qjax.models.generate import generate

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
        clock = None
        for token in generate(model, prompt, self.max_tokens, sampling, jax.random.key(self.seed), stop):
            clock = clock or time.perf_counter()
            made.append(token)
            text = tokenizer.decode([*prompt, *made])
            if not text.endswith("\ufffd"):  # half of a character: its other bytes are in the next token
                print(shown(text[len(said) :]), end="", flush=True)
                said = text
        print(shown(tokenizer.decode([*prompt, *made])[len(said) :]))
        if clock is not None and len(made) > 1:
            rate = (len(made) - 1) / (time.perf_counter() - clock)
            print(f"[{len(made)} tokens, {rate:.1f} tokens/s]", file=sys.stderr)
