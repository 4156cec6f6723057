"""Which weight gets which format: ordered rules, each weight taken by the first rule whose pattern fits it.

    plan(weight) = format of the first rule r with  r.pattern ~ weight.path  or  r.pattern ~ weight.gguf

A pattern is a shell glob over the whole name (`layers_[0-3]/attn/v/kernel`, `blk.*.attn_v.weight`, `*`), or, after
`re:`, a regular expression over the whole name (`re:layers_(0|1|1[45])/mlp/.*`). Both the path in the params tree and
the GGUF name are tried. Vectors (norms, biases) are no weights in this sense: they are always kept, and routers of
experts, which decide what the others see, by every rule that does not say `router` or `ffn_gate_inp`, and so are the
short convolutions of linear attention, by every rule that does not say `conv`. What is left must be covered, by a
format or by the word `keep`; nothing stays dense silently. `recipe:format` ("gptq:int4_g128") or a recipe's line ("Q4_K
>> nearest() >> descend(2)") says how this weight is rounded as well; where a rule names a format alone, whoever runs
the plan decides.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.formats.tiles import unit_of
from qjax.recipes import RECIPES, Recipe
from qjax.recipes import recipe as get_recipe
from qjax.tables import html_table

KEEP = "keep"
# What is spared, by the ends of its names, and what a rule says that means it too.
_SPARED = {
    "a router": (("router/kernel", "ffn_gate_inp.weight"), ("router", "ffn_gate_inp")),
    "a convolution": (("linear_attn/conv", "ssm_conv1d.weight"), ("conv",)),
}


def fits(pattern: str, name: str, what: str = "the pattern") -> bool:
    """Whether a pattern fits a whole name. Raises UserError, which calls it `what`, for a broken regular expression."""
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as e:
        raise UserError(f"{what} {pattern!r} is no regular expression: {e}") from None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a plan: what the pattern matches gets the format (a name, a Format, a Recipe on one, or `keep`)."""

    pattern: str
    format: str | Format | Recipe

    def matches(self, name: str) -> bool:
        return fits(self.pattern, name, "plan rule")

    def takes(self, w: Weight) -> bool:
        """Whether it says what a weight becomes."""
        passed_by = w.spared and not any(word in self.pattern for word in _SPARED[w.spared][1])
        return not passed_by and any(self.matches(name) for name in w.names)

    @property
    def format_name(self) -> str:
        """What `from_dict` reads back."""
        if isinstance(self.format, Recipe):
            short = f"{self.format.name}:{self.format.format.name if self.format.format else ''}"
            return short if self.format.name in RECIPES and get_recipe(short) == self.format else str(self.format)
        return self.format if isinstance(self.format, str) else self.format.name


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor a plan decides about.

    Attributes:
      path: its path in the params tree, joined with "/".
      shape: its shape with the contracted axis last, as GGUF and Hugging Face store it.
      gguf: its name in a GGUF file, where it has one.
    """

    path: str
    shape: tuple[int, ...]
    gguf: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.path,) if self.gguf is None or self.gguf == self.path else (self.path, self.gguf)

    @property
    def is_vector(self) -> bool:
        """Norms, biases, also of stacks: what has one axis, besides axes of length 1 in front (as ggml counts)."""
        return self.is_stacked_bias or all(n == 1 for n in self.shape[:-1])

    @property
    def is_stacked_bias(self) -> bool:
        """Biases of experts, of gates, of heads: several axes, and no matrix."""
        bias = any(name.endswith(("/bias", ".bias")) for name in self.names)
        return bias and any(n != 1 for n in self.shape[:-1])

    @property
    def spared(self) -> str:
        """What it is, where rules pass it by unless they name it: "a router" of experts, "a convolution"; else ""."""
        return next((kind for kind, (ends, _) in _SPARED.items() if any(n.endswith(ends) for n in self.names)), "")

    def __str__(self) -> str:
        return self.path if self.gguf is None or self.gguf == self.path else f"{self.path} ({self.gguf})"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A weight, its format and, where its rule names one, its recipe; or (format None) why it is kept as it is."""

    weight: Weight
    format: Format | None
    reason: str = ""
    recipe: Recipe | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ordered rules. Equal when the rules are equal; prints one line a rule, runs of layers folded together.

    Attributes:
      rules: the first that fits a weight decides.
      name: for files and tables.
      note: what a reader should know of how they were made; neither compared nor written to files.

    >>> plan = Plan((Rule("embed/embedding", "keep"), Rule("*/kernel", "Q8_0")))
    >>> print(plan)
    embed/embedding -> keep
    */kernel -> Q8_0
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    note: str = dataclasses.field(default="", compare=False)

    def assign(self, weights: Iterable[Weight]) -> tuple[Assignment, ...]:
        """Match every weight exactly once.

        Args:
          weights: all tensors of a model, vectors included.

        Returns: one Assignment a weight, in the same order.

        Raises:
          UserError: a rule that matches no weight, a weight that no rule matches, an unknown format, a row that the
            format's blocks do not divide. Each names the rule or the tensor.
        """
        weights = tuple(weights)
        matrices = [w for w in weights if not w.is_vector]
        exact = {name: w for w in matrices for name in w.names}
        first: dict[str, Rule] = {}
        formats = {rule.format_name: rule.format for rule in self.rules}
        known = {name: _target(f) for name, f in formats.items()}
        for rule in self.rules:
            if rule.pattern in exact:  # a mix has hundreds of rules that name one tensor each
                hits = [exact[rule.pattern]]
            else:
                stays = rule.format_name == KEEP
                hits = [w for w in weights if rule.takes(w) and (not w.is_vector or (stays and w.is_stacked_bias))]
            if not hits:
                near = f"the weights are named like {str(matrices[0])!r}" if matrices else "there is no weight"
                raise UserError(f"plan rule {rule.pattern!r} -> {rule.format_name} matches no weight; {near}")
            for w in hits:
                first.setdefault(w.path, rule)
        return tuple(self._assignment(w, first.get(w.path), known) for w in weights)

    def keeps(self, path: str) -> bool:
        """Whether the first rule that fits a weight's path leaves it as it is."""
        return next((rule.format_name for rule in self.rules if rule.matches(path)), "") == KEEP

    def _assignment(
        self, w: Weight, rule: Rule | None, known: Mapping[str, tuple[Format | None, Recipe | None]]
    ) -> Assignment:
        if w.is_vector and rule is None:
            return Assignment(w, None, "a vector")
        if rule is None and w.spared:
            return Assignment(w, None, w.spared)
        if rule is None:
            raise UserError(
                f"no rule of plan {self.name!r} covers {w}; add a rule for it (-> {KEEP} leaves it as it is)"
            )
        fmt, recipe = known[rule.format_name]
        if fmt is None:
            return Assignment(w, None, f"kept by rule {rule.pattern!r}")
        other = f"give it a format with a smaller block, or {KEEP} (rule {rule.pattern!r})"
        if w.shape[-1] % (unit := unit_of(fmt)):
            raise UserError(
                f"{w}: its rows of {w.shape[-1]} weights are no multiple of {fmt.name}'s block of {unit}; {other}"
            )
        if fmt.rows > 1 and w.shape[-2] % fmt.rows:
            raise UserError(f"{w}: {fmt.name} holds {fmt.rows} rows together, and it has {w.shape[-2]}; {other}")
        return Assignment(w, fmt, recipe=recipe)

    def with_rules(self, rules: Sequence[Rule]) -> Plan:
        """A plan in which these rules are asked before the present ones, and in place of those of the same pattern."""
        asked = {r.pattern for r in rules}
        return dataclasses.replace(self, rules=(*rules, *(r for r in self.rules if r.pattern not in asked)))

    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., "rules": {pattern: format name}}, in order; the inverse of `from_dict`, but for rules that an
        earlier one of the same pattern leaves nothing to decide."""
        rules: dict[str, str] = {}
        for r in self.rules:
            rules.setdefault(r.pattern, r.format_name)
        return {"name": self.name, "rules": rules}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], where: str = "plan") -> Plan:
        """A plan from {"rules": {pattern: format name}, "name": ...}.

        Raises:
          UserError: an unknown key, no rules, a format that is no string or that does not exist.
        """
        for key in d:
            if key not in ("name", "rules"):
                raise UserError(f"{where}: unknown key {key!r}; a plan has `name` and the table `rules`")
        rules = d.get("rules")
        if not isinstance(rules, Mapping) or not rules:
            raise UserError(f'{where}: no rules; write e.g. [rules] and "layers_*/mlp/*/kernel" = "Q4_K"')
        for pattern, spec in rules.items():
            if not isinstance(spec, str):
                raise UserError(f"{where}: rules.{pattern!r} must be a format's name, got {spec!r}")
            if spec != KEEP:
                try:
                    _target(spec)
                except UserError as e:
                    raise UserError(f"{where}: rules.{pattern!r}: {e}") from None
        return cls(tuple(Rule(p, f) for p, f in rules.items()), str(d.get("name", "custom")))

    def to_toml(self) -> str:
        """The plan as the text of a TOML file; the inverse of `from_toml`."""
        lines = [f"{json.dumps(p)} = {json.dumps(f)}" for p, f in self.to_dict()["rules"].items()]
        return f"name = {json.dumps(self.name)}\n\n[rules]\n" + "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: str | Path) -> Plan:
        """Read a plan file. Raises UserError with the file's name where it is no TOML or no plan."""
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            return cls.from_dict(tomllib.loads(text), str(path))
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read the plan {path}: {e}") from None
        except (tomllib.TOMLDecodeError, RecursionError) as e:
            raise UserError(f"{path} is no TOML: {e}") from None

    def __str__(self) -> str:
        return "\n".join(f"{pattern} -> {fmt}" for pattern, fmt in _folded(self.rules))

    def __repr__(self) -> str:
        rules = Counter(r.format_name for r in self.rules).most_common()
        return f"Plan({self.name!r}, {len(self.rules)} rules: {', '.join(f'{n} -> {fmt}' for fmt, n in rules)})"

    def _repr_html_(self) -> str:
        title = f"Plan {self.name!r}, {len(self.rules)} rules; the first that fits a weight decides. {self.note}"
        return html_table(title, ("pattern", "format"), _folded(self.rules))


def _target(spec: str | Format | Recipe) -> tuple[Format | None, Recipe | None]:
    """What a rule's right-hand side means."""
    if isinstance(spec, str):
        if spec == KEEP:
            return None, None
        if spec not in RECIPES and not any(mark in spec for mark in (":", ">>", "(")):
            return get_format(spec), None
        spec = get_recipe(spec)
    if not isinstance(spec, Recipe):
        return spec, None
    if spec.format is None:
        raise UserError(f"the recipe {spec.name or spec} in a rule needs a format, as in {spec.name or 'gptq'}:Q4_K")
    return spec.format, spec


def _folded(rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """(pattern, format) lines; rules that differ in the layer number only become one: `layers_{0-3,7}/...`."""
    lines: dict[tuple[str, str], list[int]] = {}
    for rule in rules:
        layer = re.match(r"(layers_|blk\.)(\d+)(?=[/.])", rule.pattern)
        if layer is None:
            lines[rule.pattern, rule.format_name] = []
        else:
            stem = f"{layer[1]}{{}}{rule.pattern[layer.end() :]}"
            lines.setdefault((stem, rule.format_name), []).append(int(layer[2]))
    return [(stem.replace("{}", _ranges(layers), 1) if layers else stem, fmt) for (stem, fmt), layers in lines.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}", [3] -> "3"."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"
