"""What several commands share: opening a MODEL argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.models.parts import Packed
    from qjax.pipeline.source import Source

MODEL_HELP = 'Hugging Face directory, .gguf, llama2.c .bin, "reference" or "smollm2"'


PACKED_HELP = "compute with the packed weights: less memory and other sums; by default they are decoded to float32"


def open_with_tokenizer(model: str, packed: bool = False) -> Source | Packed:
    """Open a MODEL argument for a command that reads text; its weights are read when they are asked for, or, `packed`,
    all now as they are.

    Raises:
      UserError: the model cannot be read, or came without a tokenizer.
    """
    import qjax
    from qjax.models.parts import Packed
    from qjax.pipeline.source import open_source

    opened = Packed(qjax.load(model)) if packed else open_source(model)
    if opened.tokenizer is None:
        raise UserError(f"{model}: has no tokenizer; put its tokenizer.json (or tokenizer.model) beside the weights")
    return opened
