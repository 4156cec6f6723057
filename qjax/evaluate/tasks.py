"""Tasks of the lm-evaluation-harness on a model of ours, packed or not (`pip install lm_eval`).

    results = run_tasks(model, ["arc_easy", "wikitext"])

Requests mean what they mean there: a context and its continuation are encoded together and cut where the context alone
ends, an empty context is the BOS (or, without one, the EOS), and a text longer than the context is scored in windows
that do not overlap. lm-eval and its datasets are imported when a task is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.evaluate.continuations import Progress, continuation_scores
from qjax.models.generate import generate
from qjax.models.parts import Parts
from qjax.tokenizer import Tokenizer

NEW_TOKENS = 256
"""Made where a task does not say how many."""


def run_tasks(
    model: Parts,
    tasks: Sequence[str | dict[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    include: str | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: number}} of lm-eval's tasks.

    Args:
      model: a Model, `Packed(model)`, or an opened file.
      tasks: their names, or configs as lm-eval has them.
      shots: examples in front of each question; None: the task's own.
      limit: documents of each task.
      include: a folder of task files of one's own.
      progress: kind of request -> what is told (done, of all).

    Raises:
      UserError: lm-eval is not installed, an unknown task, a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer to read tasks with")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise UserError(f"tasks need the lm-evaluation-harness: pip install lm_eval ({e})") from None
    manager = TaskManager(include_path=include)
    known = set(manager.all_tasks)
    for task in tasks:
        if isinstance(task, str) and task not in known:
            from qjax.formats import unknown

            raise UserError(unknown("task", task, sorted(known)))
    found = simple_evaluate(
        adapter(model, progress), tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager,
        log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip
    assert found is not None
    return {
        name: {key.removesuffix(",none"): value for key, value in row.items() if isinstance(value, int | float)}
        for name, row in found["results"].items()
    }


def adapter(model: Parts, progress: Callable[[str], Progress] | None = None) -> Any:
    """A model as lm-eval's `simple_evaluate` takes it: loglikelihood, loglikelihood_rolling, generate_until."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    assert model.tokenizer is not None
    tokenizer: Tokenizer = model.tokenizer
    told = progress or (lambda what: lambda done, total: None)
    end = tokenizer.eos if tokenizer.eos is not None else 0

    class Adapter(TemplateLM):
        """Ours."""

        @property
        def eot_token_id(self) -> int:
            return end

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos if tokenizer.bos is not None else end

        @property
        def max_length(self) -> int:
            """Tokens a text may have."""
            return model.config.context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, bos=add_special_tokens is not False and tokenizer.add_bos, special=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return continuation_scores(model, [(x, y) for _, x, y in requests], told("continuations"))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(r.args[0]) for r in requests]
            pairs, owner = [], []
            for n, ids in enumerate(texts):
                for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                    pairs.append(make_disjoint_window(window))
                    owner.append(n)
            scores = [score for score, _ in continuation_scores(model, pairs, told("windows"))]
            return np.bincount(owner, scores, len(texts)).tolist()

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            made, tell = [], told("texts")
            for n, request in enumerate(requests, 1):
                made.append(_until(model, self.tok_encode(request.args[0]), dict(request.args[1]), end))
                tell(n, len(requests))
            return made

    return Adapter()


def _until(model: Parts, ids: list[int], asked: dict[str, Any], end: int) -> str:
    """What the model writes, greedily, up to the first text that stops it."""
    if asked.get("do_sample") or asked.get("temperature", 0.0) > 0.0:
        raise UserError("this task samples; qjax continues greedily in tasks")
    until = asked.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    count = min(asked.get("max_gen_toks", NEW_TOKENS), model.config.context - 1)
    ids, text, made = ids[-(model.config.context - count) :], "", []
    for token in generate(model, ids, count, stop=(end,)):
        made.append(token)
        text = model.tokenizer.decode(made)  # type: ignore[union-attr]
        if any(stop in text for stop in stops):
            break
    for stop in stops:
        text = text.split(stop)[0]
    return text
