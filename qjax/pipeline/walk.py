"""Calibrated quantization, block by block: each weight is rounded to what its input has become.

    x_0 = embed_q(tokens)
    block i:  for q k v | o | gate up | down:   H = E[x x^T] behind what is rounded already  ->  round  ->  put in place
              x_{i+1} = block_i(x_i) with the rounded weights, tuned where that is asked for (tuned.py)

One block's weights are in memory, and the residual stream of the calibration windows, which may lie on disk. A folder
makes the walk resumable: what a block leaves there is all that the next one needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax.errors import UserError
from qjax.models.parts import Parts
from qjax.models.stages import Stages
from qjax.pipeline.activations import Streams
from qjax.pipeline.few_tokens import NOTE, saw_few
from qjax.pipeline.heap import hand_back
from qjax.pipeline.inputs import observe_inputs
from qjax.pipeline.passes import Checked, Here, advanced, embedded, head_weights, run_piece
from qjax.pipeline.piece import EMBEDDING, Formats, How, Seen, for_embedding, rounded_embedding, rounded_piece
from qjax.pipeline.report import CalibrationReport
from qjax.pipeline.rounded import LOOKED_UP, plain, round_leaf
from qjax.pipeline.survey import Survey, survey
from qjax.pipeline.tuned import Emit, Pending, Tuner, whole
from qjax.pipeline.walk_state import commit, resumed, save_survey, saved_survey
from qjax.pipeline.windows import Calibration
from qjax.stats import Stats
from qjax.tensor import QTensor, dequantize
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class WeightDone:
    """What a walk reports after each weight.

    Attributes:
      path: the weight.
      done, total: weights.
      report: its losses.
    """

    path: str
    done: int
    total: int
    report: CalibrationReport | None = None


def walk(
    stages: Stages,
    model: Parts,
    formats: Formats,
    calibration: Calibration,
    emit: Emit,
    *,
    folder: Path | None = None,
    earlier: Mapping[str, QTensor] = MappingProxyType({}),
    seen: Survey | None = None,
    tune: Tuner | None = None,
    progress: Callable[[WeightDone], None] = lambda step: None,
    notify: Callable[[str], None] = lambda message: None,
) -> tuple[str, ...]:
    """Round all weights of a decoder that `formats` names.

    Args:
      stages: the model's pieces.
      model: its float32 weights, asked for a part at a time.
      formats: {path: (format, recipe)}.
      calibration: the text; a quarter of its windows at least is held out where a recipe shrinks.
      emit: takes each weight, as it was and rounded.
      folder: where to keep the state; a second call with the same arguments continues there.
      earlier: what another run with these arguments has emitted: not rounded again. Where one behind the state is
        missing, the walk begins at the first block.
      seen: the survey of this calibration, where one has been made already.
      tune: what each block goes through behind its rounding; its weights are emitted then.
      progress: called after each weight.
      notify: told in one line what the walk is doing before it reaches the blocks.

    Returns: what a reader should know of the model: its massive activations, where the survey saw some.

    Raises:
      UserError: as `round_leaf`; NaN or Inf in any weight or activation, or nothing but zeros; it names the weight.
    """
    if all(path in earlier for path in formats):
        return ()
    parts = Checked(model)
    recipes = [recipe for _, recipe in formats.values()]
    calibration = calibration.to_shrink() if any(r.shrink for r in recipes) else calibration
    kinds = tuple(sorted(frozenset().union(*(r.requires for r in recipes))))
    sequential = any(r.sequential for r in recipes if r.requires)
    both = "cross" in kinds or tune is not None
    if tune is not None and tune.within and not (sequential and "cross" not in kinds):
        raise UserError(
            "tuning within blocks makes up for what is rounded already, as a recipe's cross term does: take a recipe "
            "that has none and follows rounded inputs, as gptq, quip_sharp and qtip; or tune blocks without it"
        )
    shape = (*calibration.tokens.shape, stages.dim)
    start, streams = resumed(folder, shape, both, notify)
    order = ["embed", *stages.names]
    behind = [p for p in formats if p.startswith(tuple(f"{name}/" for name in order[: 1 + start]))] if streams else []
    if not all(path in earlier for path in behind):
        notify("earlier weights are gone; starting over")
        start, streams, behind = 0, None, []
    done, known, pending = len(behind), earlier, Pending()
    if start:
        notify(f"continuing behind block {start} of {len(stages.blocks)}")

    def round_one(path: str, leaf: Any, axis: int, seen: Seen) -> Array:
        nonlocal done
        done += 1
        if path in known:
            progress(WeightDone(path, done, len(formats)))
            return dequantize(known[path])
        format, recipe = formats[path]
        blind = seen.stats is None and bool(recipe.requires)  # an embedding under a recipe that knows inputs only
        note = LOOKED_UP if path == EMBEDDING and recipe.reparams else ""
        note = "has no input: nearest, without importance" if blind else note
        recipe = plain(recipe) if blind else recipe
        recipe = for_embedding(recipe) if path == EMBEDDING else recipe
        q, line = round_leaf(path, leaf, axis, format, recipe, seen.stats or Stats(), seen.heldout, seen.shared)
        if seen.sent is not None:
            used, held = seen.sent
            own = (used + held if recipe.shrink else used).astype(int)
            line = dataclasses.replace(line, tokens=int(own.min()), by_matrix=tuple(own.tolist()))
            few = saw_few(used, leaf.shape[axis]) or "some matrices saw few held-out tokens"
            note = "; ".join(filter(None, (line.note, few, NOTE)))
        tokens, windows = seen.effective or (None, None)
        line = dataclasses.replace(line, note=note or line.note, effective_tokens=tokens, effective_windows=windows)
        if tune is not None and path.startswith(tuple(f"{name}/" for name in stages.names)):
            pending.weights[path] = q, line
        else:
            emit(path, leaf, q, line)
        progress(WeightDone(path, done, len(formats), line))
        hand_back()
        return dequantize(q)

    if seen is None:
        seen = _surveyed(stages, model, formats, calibration, shape, folder, notify)
    told = () if seen is None else tuple(map(str, seen.massive))
    for line in told:
        notify(line)
    if streams is None:
        tokens, steps = calibration.tokens, calibration.steps
        floats = parts.embedding()
        rounded = rounded_embedding(stages, parts, formats, seen, round_one)
        table = floats if rounded is None or not sequential else rounded.__getitem__
        x = embedded(stages, table, tokens, steps, folder, "x_0")
        del table, rounded
        x_float = embedded(stages, floats, tokens, steps, folder, "float_x_0") if both else None
        streams = Streams(x, x_float)
        commit(folder, 0, streams)

    observe = partial(observe_inputs, calibration, kinds)
    makes_codes = len(calibration.tokens) if any(r.shrink for r in recipes) else calibration.used
    at_once = not sequential and not {"H", "cross"} & {*kinds}
    advance = partial(advanced, calibration.steps, folder)
    how = How(formats, earlier, calibration.used, makes_codes, sequential, at_once, observe, advance, round_one)
    for i in range(start, len(stages.blocks)):
        apply, block = stages.blocks[i], parts.part(stages.names[i])
        weights = None
        if seen is not None:
            weights = seen.sensitivity[i], seen.alike[i], seen.outputs.of(i), seen.by_rows.of(i)
        name, before, steps = stages.names[i], streams, calibration.steps
        known = earlier if tune is None else whole(earlier, (p for p in formats if p.startswith(f"{name}/")))
        begin = Here(apply, (before.x.array,), None if before.x_float is None else (before.x_float.array,))
        float_run = partial(run_piece, shape=shape, steps=steps, folder=folder, name=f"float_x_{i + 1}")
        x_float, settle = None, None
        if tune is not None and tune.within and begin.x_float is not None:
            x_float = float_run(apply, block, begin.x_float)
            settle = partial(pending.settled, tune, name, apply, before.x.array, x_float.array, calibration.used)
        own = dataclasses.replace(how, earlier=known, settle=settle)
        now, end = rounded_piece(name, (apply, stages.to_all[i]), block, streams, weights, own)
        # Tuned: from the beginning, for what stands behind the first inputs is not tuned.
        end = end if tune is None else begin
        if x_float is None and end.x_float is not None:
            x_float = float_run(end.apply, block, end.x_float)
        if tune is not None and x_float is not None and pending.weights:
            made = pending.tuned(
                tune, name, apply, block, streams.x.array, x_float.array, calibration.used, emit
            )  # fmt: skip
            now = made if sequential else now
        x = run_piece(end.apply, now, end.x, shape, steps, folder, f"x_{i + 1}")
        streams = Streams(x, x_float)
        commit(folder, i + 1, streams, before)
        del block, now, end, own, settle  # before the next one is read
    if not stages.tied:
        weights = None if seen is None else (seen.head_sensitivity[None], None, {}, {})
        known = earlier
        rounded_piece("", (stages.head, stages.head), head_weights(stages, parts), streams, weights, how)
    streams.drop()
    return told


def _surveyed(
    stages: Stages,
    model: Parts,
    formats: Formats,
    calibration: Calibration,
    shape: tuple[int, ...],
    folder: Path | None,
    notify: Callable[[str], None],
) -> Survey | None:
    """The survey, where a recipe looks at curvature; read back if an earlier run has made it."""
    curved = EMBEDDING in formats and "H" in formats[EMBEDDING][1].requires
    two_sided = any(r.two_sided for _, r in formats.values())
    guided = {path: r.guided for path, (_, r) in formats.items() if r.guided}
    if not (curved or two_sided or guided or any(r.sensitive and r.requires for _, r in formats.values())):
        return None
    made = saved_survey(folder, len(stages.blocks), shape, notify, two_sided, bool(guided))
    if made is None:
        made = survey(stages, model, calibration, folder, notify, two_sided, guided)
        if folder is not None:
            save_survey(folder, made)
    return made
