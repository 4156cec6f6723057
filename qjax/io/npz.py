"""Arrays from .npz files, whatever has happened to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qjax.errors import UserError


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, in memory. No code in it is run.

    Raises:
      UserError: no such file, or one that is no .npz file, damaged or too large for the memory.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            if not isinstance(z, np.lib.npyio.NpzFile):
                raise UserError("a single array")
            return {name: z[name] for name in z.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # what zipfile, zlib and numpy raise at damaged bytes has no common base
        raise UserError(f"{path}: not a readable .npz file: {' '.join(str(e).split()) or type(e).__name__}") from None
