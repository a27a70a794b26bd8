"""The command line: finds the command, says errors of the user's in one line."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import kvpo
from kvpo.common.files import first_line, in_words
from kvpo.common.unfailing import silence, tolerate_encodings
from kvpo.common.wording import nearest
from kvpo.distributed.process_end import end_by

if TYPE_CHECKING:
    from kvpo.config import RunConfig

COMMANDS: Mapping[str, str] = {
    "align": "align a generator to rewards by KVPO",
    "generate": "generate videos from prompts",
    "explore": "show the branches of one story side by side, and what each of them reads",
    "studio": "watch a stream in the browser, fork it, choose how it goes on",
    "preference": "fit a reward to choices made in the studio, and show what it is worth",
    "evaluate": "measure a generator on fixed scripts; against another one, with intervals",
    "rewards": "list rewards, score a video, calibrate a recipe's",
    "reward-env": "make an environment for a reward that needs other packages",
    "ab": "make a blind A/B page of two generators",
    "unblind": "win rates from the answers of an A/B page",
    "vbench": "videos as VBench wants them, its scores and totals",
    "prompts": "write a public prompt set as a prompt file",
    "report": "write a run's report.html anew",
    "compare": "several runs side by side: gains, cost, settings and videos",
    "config": "show a recipe's settings, with defaults and a line of what each is",
    "doctor": "check the method's invariants on a generator and a recipe",
    "plan": "memory, work and time of a recipe, before anything is loaded",
    "bench": "time, work and memory of a generator's shape on this machine, by phase",
    "import": "turn a released checkpoint into a pipeline folder",
    "export": "write a run's weights in another format",
    "pretrain": "make the miniature's start weights, from nothing",
    "env": "versions, device and cache folders, for bug reports",
}
HELP, HELP_ALL = {"-h", "--help"}, "--help-all"
USER_ERRORS = (ValueError, OSError, FloatingPointError)

SHARED_MEMORY = "/dev/shm"
RUNS = ("align", "explore", "doctor")
OUT_OF_MEMORY = {
    True: "`kvpo plan` with the same recipe and options says what takes it and which settings lower it; what was saved is whole, go on with --resume",
    False: "generate fewer or smaller videos at a time (evaluate.batch of the recipe), take --dtype bfloat16 where there is that option, or a card with more",
}


def _out_of_memory(error: Exception) -> bool:
    """Whether memory of a device or of the machine ran out.

    torch has a class for the first and a sentence for the second.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def program() -> NoReturn:
    """Run the program: `kvpo` and `python -m kvpo`."""
    end_by(main)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 an error said in one line, 2 wrong usage, 130 interrupted, 141 nobody reads the output
    any more (`| head`).
    """
    tolerate_encodings()
    _find_temporary_folder()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        silence(sys.stdout)
        return 141


def _find_temporary_folder() -> None:
    """Choose shared memory as temporary folder where Python finds none.

    In a container whose root is read-only there is none where Python looks; shared memory is nearly
    always writable, and libraries need little.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if os.access(SHARED_MEMORY, os.W_OK):
            os.environ["TMPDIR"] = tempfile.tempdir = SHARED_MEMORY


def _run(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"kvpo {kvpo.__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(
            _usage() if asked or not argv else _unknown(argv[0]),
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    name, rest = argv[0], argv[1:]
    try:
        _parse(name, rest)()
    except BrokenPipeError:
        raise
    except USER_ERRORS as error:
        print(f"kvpo {name}: {in_words(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(
            f"kvpo {name}: out of memory ({first_line(error)}); {OUT_OF_MEMORY[name in RUNS]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"kvpo {name}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # how the parser ends --help (0) and wrong usage (2)
        return int(stop.code or 0)
    return 0


def find(name: str) -> type:
    """A command's dataclass: `reward-env` is `kvpo.commands.reward_env.RewardEnv`."""
    module = {"import": "import_"}.get(name, name.replace("-", "_"))
    return getattr(
        importlib.import_module(f"kvpo.commands.{module}"),
        "".join(part.capitalize() for part in name.split("-")),
    )


def _parse(name: str, args: list[str]) -> Callable[[], None]:
    """Parse the command with its options.

    The recipe named first is where the settings' defaults come from.
    """
    import tyro  # a part of a second, which --help and a mistyped command need not wait for

    # seconds of imports, which --help and a mistyped command need not wait for
    command: Any = find(name)
    whole, args = HELP_ALL in args, ["--help" if arg == HELP_ALL else arg for arg in args]
    if "settings" not in command.__dataclass_fields__:
        return tyro.cli(
            command, args=_together(args) if name == "import" else args, prog=f"kvpo {name}"
        )
    from kvpo.config import load_config, recipe_path

    recipe = args[0] if args and not args[0].startswith("-") else "mini"
    rest = args[1:] if args and not args[0].startswith("-") else args
    default = command(recipe, _with_objective(load_config(recipe_path(recipe)), rest))
    if HELP & set(rest) and not whole:
        from kvpo.commands.brief_help import print_brief_help

        print_brief_help(name, default)
        raise SystemExit(0)
    # an argument that is there already would be missing from the help
    given = [] if whole else [recipe]
    return tyro.cli(command, args=[*given, *rest], prog=f"kvpo {name}", default=default)


def _with_objective(config: RunConfig, args: Sequence[str]) -> RunConfig:
    """Defaults of the options: the recipe's, with another objective where one is asked for.

    Whether it fits the rest is known when all options are.
    """
    from kvpo.method.objectives.kinds import objective_kind

    option = "--objective.kind"
    given = [b for a, b in itertools.pairwise(args) if a == option]
    given += [a.partition("=")[2] for a in args if a.startswith(f"{option}=")]
    if not given or given[-1] == config.objective.kind:
        return config
    config = copy.copy(config)
    object.__setattr__(config, "objective", objective_kind(given[-1])())
    return config


def _together(args: list[str]) -> list[str]:
    """Put options first, and positional arguments side by side behind them.

    The parser wants it so, and people write FILES --base BASE OUT. Every option here has a value.
    """
    if HELP & set(args):
        return args
    options, positional, rest = [], [], iter(args)
    for arg in rest:
        if not arg.startswith("--"):
            positional.append(arg)
        else:
            options += [arg] if "=" in arg else [arg, *itertools.islice(rest, 1)]
    return [*options, *positional]


def _unknown(name: str) -> str:
    near = nearest(name, COMMANDS)
    return (
        f"kvpo: there is no command {name!r}"
        + (f"; did you mean {near}? Commands" if near else "; commands")
        + f" are {', '.join(COMMANDS)}; kvpo --help says more"
    )


def _usage() -> str:
    lines = [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: kvpo COMMAND [OPTIONS]",
            "",
            "Align a streaming video generator to human preferences.",
            "",
            *lines,
            "",
            "kvpo COMMAND --help lists a command's options, --help-all also a recipe's settings as options;",
            "kvpo --version says which version this is.",
        ]
    )
