"""`qjax eval MODEL --text FILE`: perplexity, and what a quantized model lost against its baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.cli import output
from qjax.cli.model import MODEL_HELP, PACKED_HELP, open_with_tokenizer
from qjax.cli.progress import count_bar
from qjax.cli.targets import check_json
from qjax.errors import UserError
from qjax.terminal import bar


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity of a model on a text and, with --baseline, its divergence from the model it was made from.

        qjax eval small.gguf --text book.txt
        qjax eval small.gguf --text book.txt --baseline reference --json small.json
        qjax eval MODEL --text wiki.test.raw --protocol gptq        # the papers' 2048-token windows
        qjax eval small.gguf --packed --tasks arc_easy wikitext     # of the lm-evaluation-harness

    Protocol llama.cpp: windows of 512 tokens, the second half scored. gptq: windows of 2048, all scored. A model whose
    context is shorter uses its own. Numbers found with different windows do not compare.

    Tasks are lm-eval's (pip install lm_eval), which fetches their documents; --include names a folder of task files of
    your own, and --limit then counts documents.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="UTF-8 text to judge on")] = None
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME", help="lm-eval's tasks, in place of a text")] = ()
    shots: Annotated[int | None, tyro.conf.arg(metavar="N", help="examples in front of each question of a task")] = None
    include: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help="task files of your own")] = None
    baseline: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help="the float model to compare with")] = None
    ctx: Annotated[int | None, tyro.conf.arg(metavar="N", help="tokens a window")] = None
    protocol: Annotated[Literal["llama.cpp", "gptq"], tyro.conf.arg(help="how the text is cut and scored")] = (
        "llama.cpp"
    )
    packed: Annotated[bool, tyro.conf.arg(help=PACKED_HELP)] = False
    limit: Annotated[int | None, tyro.conf.arg(metavar="N", help="only the first N windows")] = None
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.io.text import read_text

        if (self.text is None) == (not self.tasks):
            raise UserError("eval needs either --text FILE or --tasks NAME")
        check_json(self.json, (self.model, self.text, self.baseline))
        if self.text is None:
            self._tasks()
            return
        text = read_text(self.text)
        model = open_with_tokenizer(self.model, self.packed)
        from qjax.evaluate.judge import baseline_of, judge

        cut: dict[str, Any] = {"protocol": self.protocol, "context": self.ctx, "limit": self.limit}
        if self.baseline is None:
            with count_bar(self.model, "windows") as progress:
                found = judge(model, text, **cut, name=self.model, progress=progress)
        else:
            base = open_with_tokenizer(self.baseline)
            with count_bar(f"baseline {self.baseline}", "windows") as progress:
                ran = baseline_of(base, text, **cut, progress=progress)
            with count_bar(self.model, "windows") as progress:
                found = judge(model, baseline=ran, name=self.model, progress=progress)
        numbers = {"text": str(self.text), "baseline": self.baseline, **found.to_json()}
        if not output.write_json(self.json, numbers):
            output.pairs(_lines(found))

    def _tasks(self) -> None:
        if self.baseline is not None:
            raise UserError("--baseline: tasks are of one model; run them on the other as well")
        from qjax.evaluate.tasks import run_tasks

        model = open_with_tokenizer(self.model, self.packed)

        def progress(what: str) -> Callable[[int, int], object]:
            def tell(done: int, total: int) -> None:
                update(done, total, what)

            return tell

        with bar(self.model) as update:
            include = None if self.include is None else str(self.include)
            found = run_tasks(model, self.tasks, shots=self.shots, limit=self.limit, include=include, progress=progress)
        if not output.write_json(self.json, {"model": self.model, "tasks": found}):
            rows = [(task, key, f"{value:.4f}") for task, row in found.items() for key, value in row.items()]
            output.table(["task", "metric", "value"], rows, (2,))


def _lines(found) -> list[tuple[str, str]]:
    p, s, d = found.perplexity, found.sizes, found.divergence
    lines = [
        ("size", output.size(s.bytes)),
        ("bits per weight, whole model", f"{s.whole_bits:.3f}"),
        ("bits per weight, quantized tensors", "-" if s.block_bits is None else f"{s.block_bits:.3f}"),
        (f"tokens scored ({p.windows} windows of {p.context}, {p.protocol})", f"{p.tokens_scored}"),
        ("perplexity", f"{p.perplexity:.4f} ± {p.perplexity_se:.4f}"),
    ]
    if d is None:
        return lines
    return [
        *lines,
        ("baseline's perplexity", f"{d.base_perplexity:.4f} ± {d.base_perplexity_se:.4f}"),
        ("ln(perplexity ratio)", f"{d.log_ratio:.4g} ± {d.log_ratio_se:.2g}"),
        ("KL divergence, mean", f"{d.kl_mean:.4g} ± {d.kl_mean_se:.2g}"),
        ("KL divergence, median", f"{d.kl_median:.4g}"),
        ("KL divergence, 99 %", f"{d.kl_p99:.4g}"),
        ("KL divergence, 99.9 %", f"{d.kl_p999:.4g}"),
        ("KL divergence, max", f"{d.kl_max:.4g}"),
        ("same top token", f"{d.same_top_percent:.2f} ± {d.same_top_percent_se:.2f} %"),
        ("RMS change of the true token's probability", f"{d.rms_dp_percent:.3f} ± {d.rms_dp_percent_se:.3f} %"),
    ]
