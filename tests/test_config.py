"""Configs: what the files say is what the dataclass holds, and every mistake is named by file and key."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import config
from qjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    name: str = "x"
    kind: Literal["adam", "sgd"] = "adam"
    formats: tuple[str, ...] = ("Q8_0",)
    text: Path | None = None
    verbose: bool = False
    rules: dict[str, int] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_extends_merges_and_the_nearer_file_wins(tmp_path):
    write(tmp_path, "base.toml", 'script = "s.py"\nsteps = 1\nname = "base"\n[optimizer]\nrate = 1\n')
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "mid.toml", 'extends = "../base.toml"\n[optimizer]\nbetas = [0.5, 0.6]\n')
    leaf = write(tmp_path / "sub", "leaf.toml", 'extends = "mid.toml"\nsteps = 3\n')
    source = config.read(leaf)
    made = config.build(Config, source)
    assert made == Config(steps=3, name="base", optimizer=Optimizer(1.0, (0.5, 0.6)))
    assert isinstance(made.optimizer.rate, float)
    assert source.script.resolve() == (tmp_path / "s.py").resolve()  # relative to the file that says it
    assert [f.name for f in source.files] == ["base.toml", "mid.toml", "leaf.toml"]


def test_smoke_is_laid_over_only_when_asked(tmp_path):
    path = write(tmp_path, "a.toml", "steps = 5\n[smoke]\nsteps = 1\noptimizer.rate = 0.5\n")
    assert config.build(Config, config.read(path)).steps == 5
    small = config.build(Config, config.read(path), smoke=True)
    assert (small.steps, small.optimizer.rate, small.optimizer.betas) == (1, 0.5, (0.9, 0.95))
    path = write(tmp_path, "c.toml", "rules = { a = 1, b = 2 }\n[smoke]\nrules = { c = 3 }\n")
    assert config.build(Config, config.read(path), smoke=True).rules == {"c": 3}  # names of one's own: all of them go
    assert config.build(Config, config.read(path)).rules == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="no \\[smoke\\] table"):
        config.build(Config, config.read(write(tmp_path, "b.toml", "steps = 5\n")), smoke=True)


def test_a_files_own_smoke_table_and_script_leave_the_bases_behind(tmp_path):
    write(tmp_path, "base.toml", 'script = "s.py"\nname = "a"\n[smoke]\nsteps = 1\nname = "of the base"\n')
    own = write(tmp_path, "own.toml", 'extends = "base.toml"\nname = "b"\n[smoke]\nsteps = 2\n')
    assert config.build(Config, config.read(own), smoke=True) == Config(steps=2, name="b")
    child = write(tmp_path, "child.toml", 'extends = "base.toml"\nscript = "./s.py"\n')
    assert config.build(Config, config.read(child), smoke=True).name == "of the base"
    other = write(tmp_path, "other.toml", 'extends = "base.toml"\nscript = "t.py"\n')
    assert config.read(other).smoke == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz = 3", r"a\.toml:stepz: unknown key; did you mean steps\?"),
        ("[optimizer]\nrato = 3", r"a\.toml:optimizer\.rato: unknown key; did you mean rate\?"),
        ("zzz = 3", r"a\.toml:zzz: unknown key; the keys here are steps, name"),
        ('steps = "3"', r'a\.toml:steps: must be an integer, got "3"'),
        ("steps = 3.5", r"a\.toml:steps: must be an integer, got 3\.5"),
        ("steps = true", r"a\.toml:steps: must be an integer, got true"),
        ("verbose = 1", r"a\.toml:verbose: must be true or false, got 1"),
        ('optimizer = "adam"', r"a\.toml:optimizer: must be a table"),
        ("optimizer.betas = [1.0]", r"a\.toml:optimizer\.betas: must be a list of float"),
        ('kind = "adamm"', r"a\.toml:kind: must be one of 'adam', 'sgd', got 'adamm'; did you mean adam\?"),
        ("formats = [1]", r"a\.toml:formats: must be a string, got 1"),
        ("[smoke]\nstep = 1", r"a\.toml:smoke\.step: unknown key; did you mean steps\?"),
        ("steps = 1\nname = x", r"a\.toml:2: not valid TOML: Invalid value"),
        ("steps = ", r"a\.toml:(1|end): not valid TOML"),
        ('extends = "gone.toml"', r"gone\.toml: no such config file \(`extends` of .*a\.toml\)"),
        ('extends = "a.toml"', r"a\.toml -> .*a\.toml: `extends` goes in a circle"),
        ("extends = 3", r"a\.toml:extends must be a string"),
        ("smoke = 3", r"a\.toml:smoke must be a table"),
        ("steps = 9223372036854775808", r"a\.toml:steps: 9223372036854775808 does not fit 64 bits"),
        ("steps = " + "9" * 5000, r"a\.toml: not valid TOML"),
        ('extends = "\\u0000.toml"', r"a\.toml: a path cannot hold a NUL"),
        ('script = "\\u0000.py"', r"a\.toml:script must be a string"),
        ("name = '\0'", r"a\.toml:1: not valid TOML"),
        ("name = " + "[" * 500 + "]" * 500, r"a\.toml: tables or lists are nested more than 32 deep"),
        (".".join("a" * 500) + " = 1", r"a\.toml: tables or lists are nested more than 32 deep"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, text, message):
    path = write(tmp_path, "a.toml", text)
    with pytest.raises(UserError, match=message) as caught:
        config.build(Config, config.read(path))
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_base_names_the_base(tmp_path):
    write(tmp_path, "base.toml", "stepz = 3")
    with pytest.raises(UserError, match=r"base\.toml:stepz"):
        config.build(Config, config.read(write(tmp_path, "leaf.toml", 'extends = "base.toml"')))


def test_a_longer_circle_is_found(tmp_path):
    write(tmp_path, "b.toml", 'extends = "a.toml"')
    with pytest.raises(UserError, match="circle"):
        config.read(write(tmp_path, "a.toml", 'extends = "b.toml"'))


def test_unreadable_files_are_user_errors(tmp_path):
    (tmp_path / "bin.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="byte 0 is not UTF-8"):
        config.read(tmp_path / "bin.toml")
    with pytest.raises(UserError, match="cannot be read"):
        config.read(tmp_path)


plain = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Config,
        steps=st.integers(-(2**62), 2**62),
        name=plain,
        formats=st.lists(plain, max_size=3).map(tuple),
        text=st.none() | st.just(Path("a/b c.txt")),
        verbose=st.booleans(),
        rules=st.dictionaries(plain, st.integers(-5, 5), max_size=3),
        optimizer=st.builds(Optimizer, rate=st.floats(allow_nan=False)),
    )
)
def test_toml_round_trip(made):
    table = tomllib.loads(config.to_toml(made))
    source = config.Source("x", table, {}, {}, None, (Path("x.toml"),))
    assert config.build(Config, source) == made
