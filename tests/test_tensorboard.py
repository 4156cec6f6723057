"""`qjax runs --tensorboard`: what TensorBoard would read is what the runs measured."""

import json
import struct
import sys

import pytest

from qjax.cli import main

pytest.importorskip("tensorboardX")


def events(folder):
    """The summaries of a folder's event files: records of a length, its checksum, an Event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            yield from ((value, event.step) for value in event.summary.value)


def scalars(folder):
    found = ((v.tag, step, v.simple_value) for v, step in events(folder) if v.WhichOneof("value") == "simple_value")
    return {(tag, step): value for tag, step, value in found}


def hparams(folder):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for value, _ in events(folder):
        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for key, told in data.session_start_info.hparams.items():
            yield key, getattr(told, told.WhichOneof("kind"))


@pytest.fixture
def runs(tmp_path):
    for name, rate in (("a", 0.5), ("b", 0.25)):
        folder = tmp_path / "sweep" / name
        (folder / "arm").mkdir(parents=True)
        (folder / "config.toml").write_text(
            f'steps = 2\noptimizer.rate = {rate}\nshares = [0.0, 1.0]\nname = "{name}"\n'
        )
        (folder / "manifest.json").write_text('{"exit_status": 0}')
        (folder / "results.json").write_text(json.dumps({"losses": {"trained": rate}, "rows": [{"loss": 9.0}]}))
        log = [{"step": 10, "loss": 2 * rate, "name": "x", "done": True}, {"step": 20, "loss": rate}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        (folder / "arm" / "metrics.jsonl").write_text('{"kl": 1.5}\n{"kl": 0.5}\n')
    return tmp_path


def test_logs_become_scalars_and_configs_hparams(runs, capsys):
    out = runs / "tb"
    assert main(["runs", str(runs / "sweep"), "--tensorboard", str(out)]) == 0
    assert "2 runs" in capsys.readouterr().out
    for name, rate in (("a", 0.5), ("b", 0.25)):
        found = scalars(out / name)
        assert {("loss", 10): 2 * rate, ("loss", 20): rate}.items() <= found.items()
        assert [v for (tag, _), v in found.items() if tag == "final/losses.trained"] == [rate]
        assert {tag for tag, _ in found} == {"loss", "final/losses.trained"}
        assert scalars(out / name / "arm") == {("kl", 1): 1.5, ("kl", 2): 0.5}
        told = dict(hparams(out / name))
        assert told == {"steps": 2, "optimizer.rate": rate, "shares": "[0.0, 1.0]", "name": name}


def test_an_export_is_not_added_to_another(runs, capsys):
    (runs / "tb").mkdir()
    (runs / "tb" / "old").write_text("")
    assert main(["runs", str(runs / "sweep"), "--tensorboard", str(runs / "tb")]) == 2
    assert "is no empty folder" in capsys.readouterr().err


def test_without_the_package_the_error_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["runs", str(runs / "sweep"), "--tensorboard", str(runs / "tb")]) == 2
    assert "pip install 'qjax[tensorboard]'" in capsys.readouterr().err and not (runs / "tb").exists()
