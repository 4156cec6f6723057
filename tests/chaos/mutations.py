"""Seeded damage to bytes, and what may come of it: a result, or UserError in one line."""

from collections import Counter
from pathlib import Path

import numpy as np

from qjax.errors import UserError

HEAD = 2048
"""Half of the damage is done to so many first bytes, where the places and sizes of all others are."""


def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, a tail cut off, or a piece overwritten by another, zeroed, doubled or taken out."""
    end = min(len(raw), HEAD) if rng.random() < 0.5 else len(raw)
    if not end:
        return bytes(rng.integers(0, 256, int(rng.integers(1, 64)), np.uint8))
    at, source = (int(v) for v in rng.integers(0, end, 2))
    size = int(rng.integers(1, 65))
    changed = bytearray(raw)
    match ("flip", "flip", "cut", "splice", "zero", "double", "drop")[int(rng.integers(7))]:
        case "flip":
            for place in rng.integers(0, end, int(rng.integers(1, 9))):
                changed[place] ^= 1 << int(rng.integers(8))
        case "cut":
            del changed[at:]
        case "splice":
            changed[at : at + size] = raw[source : source + size]
        case "zero":
            changed[at : at + size] = bytes(len(raw[at : at + size]))
        case "double":
            changed[at:at] = raw[source : source + size]
        case "drop":
            del changed[at : at + size]
    return bytes(changed)


def campaign(name, cases, files: list[Path], use, read_only: bool = True) -> Counter:
    """Damage one of some files a case, `use` them, and put the file back.

    Args:
      name: of the campaign, and a part of its seed.
      cases: their numbers.
      files: what is damaged.
      use: called without arguments; any exception but UserError, or one of several lines, fails the case.
      read_only: the damaged file must be left as it was.

    Returns: how many cases ended how.
    """
    originals, outcomes = {file: file.read_bytes() for file in files}, Counter()
    use()  # what is whole is read, or no refusal would mean anything
    for case in cases:
        rng = np.random.default_rng([case, *name.encode()])
        file = files[int(rng.integers(len(files)))]
        raw = damaged(originals[file], rng)
        file.write_bytes(raw)
        try:
            use()
            outcomes["read"] += 1
        except UserError as error:
            assert "\n" not in str(error), f"{name}, case {case}: {error}"
            outcomes["refused"] += 1
        except BaseException as error:
            error.add_note(f"{name}, case {case}: {file}")
            raise
        if read_only:
            assert file.read_bytes() == raw, f"{name}, case {case}: {file} was changed"
            file.write_bytes(originals[file])
    print(f"{name}: {sum(outcomes.values())} cases, {dict(outcomes)}")
    return outcomes
