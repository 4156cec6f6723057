"""The page of a run, written into its folder: what the experiment found, its figures, its config and manifest."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.io.atomic import write_text
from qjax.report.build import build
from qjax.report.page import page
from qjax.rundir import plain


def write_run_page(out: Path, found: Mapping[str, Any], *, title: str, note: str = "") -> Path:
    """Write out/report.html; returns its path.

    Args:
      out: the run's folder; config.toml and manifest.json in it are shown, where they are there.
      found: what the experiment returns: tables by their names.
      title: heading and window title.
      note: what a reader must know.
    """
    manifest = json.loads(path.read_text("utf-8")) if (path := out / "manifest.json").is_file() else {}
    config = path.read_text("utf-8") if (path := out / "config.toml").is_file() else ""
    command = shlex.join(map(str, manifest.get("command") or ["qjax", "run"]))
    result = build(plain(found), title=title, command=command, note=note, manifest=manifest)
    facts = {"Config": config, "Manifest": json.dumps(manifest, indent=2, ensure_ascii=False) if manifest else ""}
    end = "\n".join(
        f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in facts.items()
        if text
    )
    write_text(out / "report.html", page([result], title, end=end))
    return out / "report.html"
