"""What a language model is trained on: its text, a teacher, or both.

    loss = sum_i  c_i  term_i      term: "ce", a divergence from a teacher ("fkl", "rkl", "jsd", "cakld"), or "hidden"

"hidden" is the mean over blocks of |h_student - h_teacher|^2 / Var h_teacher (`relative_mse`). The student runs on
quantized weights, the teacher on its own, in the same step or earlier: a batch may bring the
teacher's top k (`topk`). Where a model is a `Readout`, logits are held a chunk of the vocabulary at a time (`chunked`).
Terms are written as a config writes them: "fkl", "0.5*ce + 0.5*fkl", "fkl + 0.1*hidden".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.training.grid.qat import float_weights
from qjax.training.losses.chunked import Unread, chunked_cross_entropy, chunked_loss
from qjax.training.losses.distill import Divergence, distill_loss, divergence, relative_mse, token_mean
from qjax.training.losses.topk import top_k_loss
from qjax.typing import Array, Float, Int, Shaped

# (params, constants, batch, key) -> (loss, {name: scalar})
Objective = Callable[[Any, Any, Any, Array], tuple[Array, dict[str, Array]]]
Apply = Callable[[Any, Array], Array]  # (params, tokens i32[b, t]) -> logits f32[b, t, vocab]
Hidden = Callable[[Any, Array], Sequence[Array]]  # -> what leaves each block, [b, t, dim]

DIVERGENCES = ("fkl", "rkl", "jsd", "cakld")


@dataclasses.dataclass(frozen=True)
class Readout:
    """(params, tokens) -> Unread, in place of logits.

    Attributes:
      config: of the decoder.
      apply: the decoder without its readout (`Forward`).
      chunk: tokens of the vocabulary at a time.
    """

    config: DecoderConfig
    apply: Apply
    chunk: int

    def __call__(self, params: Any, tokens: Int[Array, "b t"]) -> Unread:
        x = self.apply(params, tokens)
        head = params["embed"]["embedding"].T if self.config.tied else params["head"]["kernel"]
        return Unread(x.reshape(-1, x.shape[-1]), head, self.chunk, self.config.logit_softcap)


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of a loss: its factor and its name."""

    factor: float
    name: str


def parse_terms(text: str) -> tuple[Term, ...]:
    """A config's sum of terms.

    Raises:
      UserError: an unknown term, or a factor that is no number.

    >>> parse_terms("0.5*ce + fkl")
    (Term(factor=0.5, name='ce'), Term(factor=1.0, name='fkl'))
    """
    terms = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        name = name.strip()
        if name not in ("ce", "hidden", *DIVERGENCES):
            raise UserError(f"loss {text!r}: unknown term {name!r}; known: ce, hidden, {', '.join(DIVERGENCES)}")
        try:
            terms.append(Term(float(factor) if star else 1.0, name))
        except ValueError:
            raise UserError(f"loss {text!r}: {factor!r} is no number") from None
    return tuple(terms)


@dataclasses.dataclass(frozen=True)
class Losses:
    """What is minimized, as a config writes it.

    Attributes:
      terms: see `parse_terms`.
      temperature: T of the divergences, which then count T^2; a cached top k has to be one of the same T.
      vocab_chunk: tokens of the vocabulary whose logits are held at a time; 0: all.
    """

    terms: str = "ce"
    temperature: float = 1.0
    vocab_chunk: int = 0

    def __post_init__(self) -> None:
        parse_terms(self.terms)
        if not self.temperature > 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")
        if self.vocab_chunk < 0:
            raise UserError(f"vocab_chunk must not be negative, got {self.vocab_chunk}")

    @property
    def names(self) -> frozenset[str]:
        """Of the terms."""
        return frozenset(term.name for term in parse_terms(self.terms))

    @property
    def taught(self) -> bool:
        """Whether some term wants a teacher."""
        return self.names != {"ce"}


Mask = Shaped[Array, "b t"]  # True, or a positive weight, where a target counts


def cross_entropy(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], mask: Mask | None = None
) -> Float[Array, ""]:
    """Mean negative log-likelihood, nats per token that counts."""
    return token_mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets), mask)


def likelihood(out: Array | Unread, targets: Int[Array, "b t"], mask: Mask | None = None) -> Float[Array, ""]:
    """`cross_entropy`, of logits or of what would become logits."""
    if isinstance(out, Unread):
        counts = None if mask is None else mask.reshape(-1)
        return chunked_cross_entropy(out, targets.reshape(-1), counts)
    return cross_entropy(out, targets, mask)


def away(
    measure: Divergence, teacher: Array | Unread, student: Array | Unread, mask: Mask | None, temperature: float
) -> Float[Array, ""]:
    """How far a student is from its teacher, of logits or of what would become logits."""
    if isinstance(teacher, Unread) and isinstance(student, Unread):
        return chunked_loss(measure, teacher, student, None if mask is None else mask.reshape(-1), temperature)
    assert not isinstance(teacher, Unread) and not isinstance(student, Unread), "both in chunks or none"
    return distill_loss(teacher, student, measure, mask, temperature)


def language_loss(
    apply: Apply | Readout,
    losses: Losses,
    read: Callable[[Any, Any], Any] = float_weights,
    *,
    teacher: Apply | Readout | None = None,
    hidden: tuple[Hidden, Hidden] | None = None,
    confidence: float | None = None,
) -> Objective:
    """The loss of a decoder's state on a batch.

        {"tokens": i32[b, t + 1]}      windows; each token but the first is a target
        {"mask": [b, t + 1]}           if some targets do not count (prompts, padding): True or a weight where they do;
                                       parts of an accumulated batch count alike, however many targets they have
        {"cached": top k}              of a cached teacher

    Args:
      apply: the student's forward, or its readout in chunks; the teacher's is alike.
      losses: the sum and its temperature.
      read: (params, constants) -> what the student runs on.
      teacher: its forward, run on constants["teacher"] in the same step; None: the batch brings its top k.
      hidden: what leaves the blocks of the teacher and of the student (`Forward.hidden`); for the term "hidden".
      confidence: b of "cakld" (`teacher_confidence`).

    Raises:
      UserError: a term whose teacher or hidden states are missing; chunks of a vocabulary whose top k is cached.
    """
    terms, temperature = parse_terms(losses.terms), losses.temperature
    measures: dict[str, Divergence] = {}
    for term in terms:
        if term.name == "hidden" and (hidden is None or teacher is None):
            raise UserError("the term hidden compares with a teacher that runs in the same step")
        if term.name in DIVERGENCES:
            measures[term.name] = divergence(term.name, confidence if term.name == "cakld" else None)
    if measures and teacher is None and isinstance(apply, Readout):
        raise UserError("vocab_chunk is for a teacher that runs in the same step: a cached top k needs all logits")

    def loss(params: Any, constants: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        del key
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        mask = batch["mask"][:, 1:] if "mask" in batch else None
        w = read(params, constants)
        out = apply(w, tokens)
        ce = likelihood(out, targets, mask)
        total, report = jnp.float32(0.0), {"ce": ce}
        seen = teacher(constants["teacher"], tokens) if measures and teacher is not None else None
        for term in terms:
            if term.name == "ce":
                value = ce
            elif term.name == "hidden":
                assert hidden is not None
                pairs = zip(hidden[0](constants["teacher"], tokens), hidden[1](w, tokens), strict=True)
                value = jnp.stack([relative_mse(t, s, mask) for t, s in pairs]).mean()
            elif seen is not None:
                value = away(measures[term.name], seen, out, mask, temperature)
            else:
                assert not isinstance(out, Unread)
                value = top_k_loss(measures[term.name], batch["cached"], out, mask, temperature)
            report[term.name] = value
            total += jnp.float32(term.factor) * value
        return total, report

    return loss
