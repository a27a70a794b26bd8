"""docs/errors/: every refusal of the program, by what it says, its reason and the way out.

    python docs/make_errors.py --write

docs/errors.md is their index. It stands beside the pages that it makes and nowhere else: the program does not need it, and it
measures nothing, which is what benchmarks/ is for. It reads the code's syntax trees, imports
nothing of the package, and invents nothing: what a row has is what a message in the code has,
"what is wrong: the reason; the way out" cut at its own signs. A row without a way out is a message
without one. Errors of programmers (KeyError, RuntimeError, TypeError, NotImplementedError) and the
gaps that a report names in place of a curve are left out.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
"""Index of the pages, which lie in a folder of its name."""

REFUSALS = {"ValueError", "OSError", "FloatingPointError", "FileNotFoundError"}
REFUSALS |= {"PermissionError", "ConnectionError"}
"""What the command line says in one line; classes of the package that derive from these follow."""
NOTES = {"Missing"}
"""Classes that never reach a user as an error: a report says them where a curve would stand."""
CARRIERS = {"error", "_broken", "failed"}
"""Functions that put a message into an error of their own: their callers' texts are what counts."""

SAYING = {"in_words", "_unknown"}
"""Functions that return what is said of an error that is not ours."""

OF_PROGRAMS = "Parts used from a program of your own"
SECTIONS = {
    "Recipes and settings": (
        "config.py",
        "api",
        "commands/main.py",
        "commands/settings.py",
        "policy/policy.py",
        "policy/settings.py",
        "method/advantages.py",
        "method/agreement.py",
        "method/best_of.py",
        "method/energies.py",
        "method/explorers.py",
        "method/loss.py",
        "method/objectives",
        "method/pairs.py",
        "method/prompt_explorer.py",
        "method/branches.py",
        "method/forks.py",
        "method/routing.py",
        "method/score.py",
        "method/sde_explorer.py",
        "method/settings.py",
        "method/step_weights.py",
        "method/velocity_penalty.py",
        "evaluation/evaluate.py",
        "evaluation/sentinels.py",
        "evaluation/settings.py",
        "mini/source.py",
        "mini/stories.py",
        "planning",
        "bench",
    ),
    "Prompts and text files": (
        "method/prompts.py",
        "method/prompt_files.py",
        "evaluation/prompt_sets.py",
        "commands/prompts.py",
        "common/text_files.py",
        "common/json_values.py",
        "generators/readable.py",
        "types.py",
    ),
    "Pipelines and weights": (
        "generators/pipeline.py",
        "generators/pipeline_folder.py",
        "generators/geometry.py",
        "generators/backends.py",
        "common/weights.py",
        "planning/missing.py",
        "common/finite.py",
        "convert",
        "commands/import_.py",
        "mini/pretraining",
    ),
    "LoRAs": ("convert/lora.py", "convert/lora_names.py", "convert/lora_scales.py"),
    "Rewards": ("rewards", "commands/rewards.py", "mini/rewards"),
    "Rewards in processes of their own": ("rewards/isolated",),
    "Videos and evaluations": (
        "common/video.py",
        "common/pictures.py",
        "commands",
        "evaluation",
    ),
    "The studio": ("studio", "commands/studio.py"),
    "Preferences": ("preference",),
    "Runs and resuming": (
        "runs",
        "train.py",
        "policy/checkpoint.py",
        "method/update.py",
        "common/metric_log.py",
        "common/metrics.py",
        "common/trackers.py",
        "commands/align.py",
        "commands/report.py",
        "report",
        "doctor/preview_ranks.py",
        "generators/preview.py",
        "generators/streaming.py",
    ),
    "Machines and disks": (
        "common/access.py",
        "common/environment.py",
        "common/extras.py",
        "common/files.py",
        "distributed",
        "generators/embeddings.py",
        "generators/sequence_split.py",
    ),
    OF_PROGRAMS: (
        "generators",
        "rewards/base.py",
        "report/routing_map.py",
        "mini/pretraining/library.py",
    ),
}
"""Section -> where in kvpo/ its messages stand; of two that fit, the longer path counts."""

VERBS = [
    "add",
    "ask",
    "begin",
    "choose",
    "close",
    "compare",
    "convert",
    "copy",
    "correct",
    "create",
    "delete",
    "derive",
    "describe",
    "download",
    "drop",
    "enlarge",
    "explore",
    "export",
    "fetch",
    "fork",
    "free",
    "generate",
    "give",
    "go",
    "have",
    "install",
    "invalidate",
    "leave",
    "lengthen",
    "let",
    "list",
    "look",
    "lower",
    "make",
    "mark",
    "merge",
    "mend",
    "move",
    "open",
    "play",
    "press",
    "name",
    "permute",
    "pip",
    "put",
    "raise",
    "read",
    "reload",
    "remove",
    "repair",
    "replace",
    "resume",
    "run",
    "save",
    "score",
    "see",
    "send",
    "set",
    "shorten",
    "split",
    "start",
    "take",
    "train",
    "turn",
    "use",
    "wait",
    "widen",
    "write",
    "call",
    "change",
    "calibrate",
    "clamp",
    "commit",
    "evaluate",
    "free",
    "keep",
]
WAYS = (
    rf"(?:{'|'.join(VERBS)})\b",
    r"(?:did you mean|known|shipped|(?:eligible|formats|commands) are|it takes|both (?:sides )?need)\b",
    r"`?(?:kvpo |patience`)",
    r"[A-Z_]+ names",
    r".*(?:: |, or |, )(?:add|call|convert|copy|go on|give|hf download|is that up|look|permute|take|use)\b",
)
"""How a clause begins, or goes on, that says what to do."""
MUST = r"(.*?) (must (?:be|begin|have|hold|lie|name|not|read|share)\b.*)"
"""What a value must be is the way out where the message has no other."""
WORDED = {"way_out", "reason", "why_first"}
"""Parameters by which callers give whole clauses of a message."""
REASONS = (", but ", ", because ")


# --- The messages ---


ASKED_FOR = (ast.Call, ast.Return, ast.JoinedStr, ast.FunctionDef, ast.ClassDef)


@dataclass(frozen=True, eq=False)
class Module:
    """A file of the package with what a name in it can stand for."""

    path: Path
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT / "kvpo").as_posix()

    @cached_property
    def nodes(self) -> list[tuple[ast.FunctionDef | None, ast.AST]]:
        """(enclosing function, node) of what is asked for here, in the order of the text; one
        walk, because walks are what this takes its time for."""
        found, stack = [], [(None, self.tree)]
        while stack:
            inside, node = stack.pop()
            if isinstance(node, ASKED_FOR):
                found.append((inside, node))
            within = node if isinstance(node, ast.FunctionDef) else inside
            stack += [(within, child) for child in ast.iter_child_nodes(node)][::-1]
        return found

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {n.name: n for _, n in self.nodes if isinstance(n, ast.FunctionDef)}

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        pairs = [
            (target, node.value)
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
        ]
        return {target.id: value for target, value in pairs if isinstance(target, ast.Name)}


@cache
def modules() -> tuple[Module, ...]:
    paths = sorted((ROOT / "kvpo").rglob("*.py"))
    return tuple(Module(p, ast.parse(p.read_text(encoding="utf-8"))) for p in paths)


@cache
def constants() -> dict[str, ast.expr]:
    """Those of all modules: a name that is imported is written the same everywhere."""
    return {name: value for m in modules() for name, value in m.constants.items()}


@cache
def functions() -> dict[str, ast.FunctionDef]:
    return {name: node for m in modules() for name, node in m.functions.items()}


@cache
def refusals() -> frozenset[str]:
    """Names of the classes that count, those of the package with them."""
    found = set(REFUSALS)
    for node in (n for m in modules() for _, n in m.nodes if isinstance(n, ast.ClassDef)):
        if any(isinstance(base, ast.Name) and base.id in REFUSALS for base in node.bases):
            found.add(node.name)
    return frozenset(found - NOTES)


@cache
def calls() -> dict[str, tuple[tuple[Module, ast.FunctionDef | None, ast.Call], ...]]:
    """Name of what is called -> (file, enclosing function, call) of every call of it."""
    found: dict[str, list] = {}
    for module in modules():
        for function, node in module.nodes:
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
                found.setdefault(name, []).append((module, function, node))
    return {name: tuple(sites) for name, sites in found.items()}


@dataclass
class Message:
    """One message, as parts that can be told apart, with all ways out that go with its text."""

    file: str
    line: int
    text: str
    reason: str
    ways: list[str] = field(default_factory=list)


@cache
def messages() -> list[Message]:
    """All of them, in the order of the files; equal ones of a file once."""
    found: dict[tuple[str, str, str], Message] = {}
    sites = [s for name in sorted(refusals()) for s in calls().get(name, ())]
    sites += [
        (m, f, call)
        for name in CARRIERS
        for m, f, call in calls().get(name, ())
        if name in m.functions and isinstance(call.func, ast.Attribute)
    ]
    # Of a class that words its message itself: super().__init__("...").
    sites += [s for s in calls().get("__init__", ()) if s[2].args and _is_sentence(s[2].args[0])]
    said = [(m, c.lineno, text) for m, f, c in sites for text in _texts(m, f, c)]
    said += [(m, node.lineno, t) for m, f, node in _sayings() for t in render(node, m, f)]
    for module, line, whole in sorted(said, key=lambda s: (s[0].name, s[1])):
        if not _says_something(whole):
            continue
        text, reason, way = split(" ".join(whole.split()))
        kept = found.setdefault(
            (module.name, text, reason), Message(module.name, line, text, reason)
        )
        if way and way not in kept.ways:
            kept.ways.append(way)
    return list(found.values())


def _sayings() -> list[tuple[Module, ast.FunctionDef | None, ast.expr]]:
    """Messages that no exception of ours has: of a system's errors, of memory, of a command that
    does not exist."""
    found = []
    for module in modules():
        for function, node in module.nodes:
            name = function.name if function is not None else ""
            if name in SAYING and isinstance(node, ast.Return) and _is_text(node.value):
                found.append((module, function, node.value))
            if name == "_run" and isinstance(node, ast.JoinedStr) and len(node.values) > 4:
                found.append((module, function, node))
    return found


def _texts(module: Module, function: ast.FunctionDef | None, call: ast.Call) -> list[str]:
    """What a call says: its first argument."""
    if not call.args:
        return []
    return render(call.args[0], module, function)


def _says_something(said: str) -> bool:
    """A wrapper that only puts a place before another error's text has no words of its own."""
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\{[^}]*\}", " ", said))
    return "{message}" not in said and len(words) > ("{error}" in said) + 1


# --- From an expression to what it says ---


def render(node: ast.expr, module: Module, function, depth: int = 0) -> list[str]:
    """The texts that an expression can be, values as {names}."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return _product(render(part, module, function, depth) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
        return _product(render(part, module, function, depth) for part in (node.left, node.right))
    if isinstance(node, ast.FormattedValue):
        return _value(node, module, function, depth)
    if isinstance(node, ast.IfExp) and _is_text(node):
        yes, no = (render(part, module, function, depth) for part in (node.body, node.orelse))
        return _either(yes, no)
    if isinstance(node, ast.BoolOp):
        texts = [part for part in node.values if _is_sentence(part)]
        if not texts:
            return ["{" + readable(node.values[0]) + "}"]
        return [t for part in texts for t in render(part, module, function, depth)]
    if isinstance(node, ast.Name) and depth < 4 and (known := _known(node.id, module, function)):
        return [t for value, m, f in known for t in render(value, m, f, depth + 1)]
    if isinstance(node, ast.Call) and (known := _returned(node)):
        inside = functions()[node.func.id]
        return [t for value in known for t in render(value, module, inside, depth)]
    if function is not None and (known := _looked_up(node, function)):
        return [t for value in known for t in render(value, module, function, depth)]
    return ["{" + readable(node) + "}"]


def _looked_up(node: ast.expr, function: ast.AST) -> list[ast.expr]:
    """Sentences that are taken out of a dictionary or of a tuple."""
    if isinstance(node, ast.Subscript):
        return _of_dictionary(node.value, function) or _of_tuple(node.value, function)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
        return _of_dictionary(node.func.value, function)
    return []


def _product(parts) -> list[str]:
    return ["".join(texts) for texts in itertools.product(*parts)][:8]


def _either(yes: Sequence[str], no: Sequence[str]) -> list[str]:
    """Both, each as a text of its own where one has the way out; else side by side."""
    if any(";" in text for text in (*yes, *no)):
        return [*yes, *(text for text in no if text)]
    if not yes[0] or not no[0]:
        return [f"[{yes[0] or no[0]}]"]
    return [f"{yes[0]} / {no[0]}"]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _value(node: ast.FormattedValue, module: Module, function, depth: int) -> list[str]:
    """A number that the code has under a name is written out; a text too."""
    inner = node.value
    constant = constants().get(inner.id) if isinstance(inner, ast.Name) else None
    constant = module.constants.get(inner.id, constant) if isinstance(inner, ast.Name) else None
    if isinstance(constant, ast.Constant) and isinstance(constant.value, (int, float)):
        form = node.format_spec.values[0].value if node.format_spec else ""
        return [format(constant.value, form)]
    return render(inner, module, function, depth)


def _known(name: str, module: Module, function) -> list[tuple[ast.expr, Module, ast.AST | None]]:
    """Sentences that a name stands for: set in its function, given by the function's callers, or
    a constant."""
    if function is not None:
        here = [(value, module, function) for value in _assigned(function).get(name, ())]
        here += [(value, module, function) for value in _of_loop(name, function)]
        if here:
            return [found for found in here if _is_sentence(found[0])]
        names = [a.arg for a in function.args.args]
        if name in names:
            return _given(function, names.index(name), name)
    constant = module.constants.get(name, constants().get(name))
    return [(constant, module, None)] if constant is not None and _is_text(constant) else []


@cache
def _assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """Name -> what a function sets it to."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.NamedExpr)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return found


@cache
def _looped(function: ast.AST) -> dict[str, ast.expr]:
    """Name of the value in a loop over a dictionary's items -> the dictionary."""
    return {
        node.target.elts[-1].id: node.iter.func.value
        for node in ast.walk(function)
        if isinstance(node, ast.For)
        and isinstance(node.target, ast.Tuple)
        and isinstance(node.target.elts[-1], ast.Name)
        and isinstance(node.iter, ast.Call)
        and getattr(node.iter.func, "attr", "") == "items"
    }


def _of_loop(name: str, function: ast.AST) -> list[ast.expr]:
    """Values of a dictionary of the function that a loop gives that name."""
    dictionary = _looped(function).get(name)
    return [] if dictionary is None else _of_dictionary(dictionary, function)


def _of_dictionary(node: ast.expr, function: ast.AST) -> list[ast.expr]:
    """The values of a dictionary that is set in the function, or a constant."""
    if not isinstance(node, ast.Name):
        return []
    found = [*_assigned(function).get(node.id, ()), constants().get(node.id)]
    return [v for d in found if isinstance(d, ast.Dict) for v in d.values if _is_sentence(v)]


def _of_tuple(node: ast.expr, function: ast.AST) -> list[ast.expr]:
    """Sentences in the tuples of a function, of whose result the name is: `fault[1]`."""
    sources = _assigned(function).get(getattr(node, "id", ""), ())
    names = {getattr(s.func, "id", "") for s in sources if isinstance(s, ast.Call)}
    return [
        element
        for name in sorted(names & functions().keys())
        for value in _returns(functions()[name])
        if isinstance(value, ast.Tuple)
        for element in value.elts
        if _is_sentence(element)
    ]


@cache
def _returns(function: ast.AST) -> list[ast.expr]:
    found = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
    return [value for value in found if value is not None]


def _given(function: ast.FunctionDef, at: int, name: str) -> list:
    """What callers give for a parameter, and its default, where that is a sentence."""
    if name not in WORDED or function.name in CARRIERS:
        return []
    method = function.args.args[0].arg == "self"
    found = []
    for module, caller, call in calls().get(function.name, ()):
        position = at - method
        values = [k.value for k in call.keywords if k.arg == name]
        values += call.args[position : position + 1]
        found += [(value, module, caller) for value in values]
    defaults = dict(
        zip([a.arg for a in function.args.args][::-1], function.args.defaults[::-1], strict=False)
    )
    if name in defaults:
        found.append((defaults[name], found[0][0] if found else modules()[0], None))
    return [f for f in found if _is_sentence(f[0]) or isinstance(f[0], ast.Name)]


def _is_sentence(node: ast.expr) -> bool:
    """Text of several words, not a value that only happens to be one."""
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    if isinstance(node, ast.BoolOp):
        return any(_is_sentence(part) for part in node.values if _is_text(part))
    return _is_text(node) and any(isinstance(t, str) and t.strip().count(" ") > 1 for t in texts)


def _returned(call: ast.Call) -> list[ast.expr]:
    """Sentences that a function of the package returns."""
    name = getattr(call.func, "id", "")
    if name not in functions():
        return []
    return [value for value in _returns(functions()[name]) if _is_sentence(value)]


OF_OTHERS = {"name": "name", "parent": "folder", "shape": "shape", "dtype": "dtype"}
"""Attributes that say little without what they belong to."""
TRANSPARENT = {"list", "tuple", "sorted", "float", "str", "map", "int", "first_line", "dict", "set"}
TRANSPARENT |= {"bytes", "ord", "fsdecode"}
OF_ITSELF = {"tolist", "item", "upper", "values", "keys", "items", "strip", "rstrip", "nonzero"}
OF_ITSELF |= {"flatten", "isfinite", "glob", "replace", "numel", "split"}
"""Methods whose result a reader would call as the thing itself."""


def readable(node: ast.expr) -> str:
    """A value's name in a message: `self.rollout.branches` is "branches"."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return _of_attribute(node)
    if isinstance(node, ast.Subscript):
        key = node.slice
        named = isinstance(key, ast.Constant) and isinstance(key.value, str)
        return key.value if named else readable(node.value)
    if isinstance(node, ast.Call):
        return _of_call(node)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)):
        return readable(node.generators[0].iter)
    if isinstance(node, ast.Starred):
        return readable(node.value)
    if isinstance(node, ast.IfExp):
        return readable(node.body)
    if isinstance(node, ast.List):
        return ", ".join(map(readable, node.elts))
    if isinstance(node, ast.UnaryOp):
        return readable(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        right = node.right
        return f"{readable(node.left)}/{right.value if isinstance(right, ast.Constant) else readable(right)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
        sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "x"}[type(node.op)]
        return f"{readable(node.left)} {sign} {readable(node.right)}"
    return ast.unparse(node).replace("self.", "").replace("{", "").replace("}", "")


def _of_attribute(node: ast.Attribute) -> str:
    name = node.attr.strip("_")
    base = readable(node.value)
    if node.attr == "__name__":
        return base
    if node.attr in OF_OTHERS and base not in ("self", "spec"):
        return f"{OF_OTHERS[node.attr]} of {base}"
    return name


def _of_call(node: ast.Call) -> str:
    name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
    if name == "len":
        return f"number of {readable(node.args[0])}"
    if name == "type":
        return f"type of {readable(node.args[0])}"
    if name == "count_of":
        return f"number of {node.args[1].value}s"
    if name in TRANSPARENT and node.args:
        return readable(node.args[-1])
    if name in ("join", "dumps") and node.args:
        return readable(node.args[0])
    if name in ("get", "removeprefix") and isinstance(node.args[0], ast.Constant):
        return str(node.args[0].value)
    if name in OF_ITSELF:
        return readable(node.func.value)
    return name.removeprefix("get_").strip("_").replace("_", " ")


# --- What is wrong, why, and the way out ---


def split(message: str) -> tuple[str, str, str]:
    """(text, reason, way out) of a message, cut at its own signs; "" for what it does not say."""
    head, *rest = _clauses(message)
    reasons, ways = [], []
    for clause in rest:
        (ways if ways or is_way(clause) else reasons).append(clause)
    head, reason, way = _cut_head(head)
    if way:
        ways.insert(0, way)
    if not ways and (found := re.match(MUST, head)):
        head, must = found.groups()
        ways = [must]
    if not ways and (musts := [c for c in reasons if " must " in f" {c}"]):
        reasons, ways = [c for c in reasons if c not in musts], musts
    reasons = ([reason] if reason else []) + reasons
    return head, "; ".join(reasons), "; ".join(ways)


def is_way(clause: str) -> bool:
    starts = (clause, clause[:1].lower() + clause[1:])
    return any(re.match(way, start) for way in WAYS for start in starts)


def _clauses(message: str) -> list[str]:
    """Cut at semicolons and full stops outside of brackets and quotes."""
    depth, begin, found, quoted = 0, 0, [], False
    for at, sign in enumerate(message):
        quoted ^= sign == "`"
        depth += (sign in "([{") - (sign in ")]}")
        ends = message[at : at + 2] == "; " or re.match(r"\. [A-Z`]", message[at:])
        if depth <= 0 and not quoted and ends:
            found.append(message[begin:at])
            begin = at + 2
    return [clause.strip() for clause in [*found, message[begin:].rstrip(".")] if clause.strip()]


def _cut_head(head: str) -> tuple[str, str, str]:
    """(text, reason, way out) of the first clause."""
    for sign in REASONS:
        before, found, after = head.partition(sign)
        if found:
            return before, sign.strip(", ") + " " + after, ""
    for found in re.finditer(r": (?=[a-z0-9`])", head):
        before, after = head[: found.start()], head[found.end() :]
        if any(before.count(a) > before.count(b) for a, b in ("()", "[]", "{}")):
            continue
        if re.match(WAYS[0], after):
            return before, "", after
        words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\{[^}]*\}", " ", before))
        if len(words) >= 3:
            return before, after, ""
    return head, "", ""


# --- The page ---

HEAD = """# What the program refuses, and the way out

A command that can not do what it is asked says so in one line, `kvpo COMMAND: message`, and ends
with exit code 1; a function of the API raises the same message as `ValueError`, `OSError` (also
`FileNotFoundError`, `PermissionError`, `ConnectionError`) or `FloatingPointError`. Words in {braces}
stand for values of yours, words in [brackets] are not always said, and *or* stands between ways out
of which a message names the one that fits. A message is the row read from left to right. To find
one, search for a few of its words that are no value: on the site, or by `grep -r "WORDS" docs/errors`.

Made from the code by `python docs/make_errors.py --write`; a test compares.

| Page | Messages | Of |
|---|---|---|
"""


def section_of(file: str) -> str:
    """ValueError where a file has none."""
    found = [
        (len(place), section)
        for section, places in SECTIONS.items()
        for place in places
        if file == place or file.startswith(place + "/")
    ]
    if not found:
        raise ValueError(
            f"kvpo/{file} has messages for users and no section; add it to SECTIONS in docs/make_errors.py"
        )
    return max(found)[1]


def pages() -> dict[Path, str]:
    """File -> text of the index and of a page for each section."""
    by_section: dict[str, dict[str, list[Message]]] = {name: {} for name in SECTIONS}
    for message in messages():
        files = by_section[section_of(message.file)]
        files.setdefault(message.file, []).append(message)
    by_section = {name: files for name, files in by_section.items() if files}
    rows = "".join(_row(name, files) for name, files in by_section.items())
    return {PAGE: HEAD + rows} | {
        PAGE.with_suffix("") / f"{_slug(name)}.md": _section(name, files)
        for name, files in by_section.items()
    }


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def _row(name: str, files: dict[str, list[Message]]) -> str:
    """The section's line in the index."""
    number = sum(map(len, files.values()))
    places = ", ".join(f"`{file}`" for file in files)
    return f"| [{name}](errors/{_slug(name)}.md) | {number} | {places} |\n"


def _section(name: str, files: dict[str, list[Message]]) -> str:
    lines = [f"# {name}", "", f"What is refused, and the way out. [All rooms](../{PAGE.name})", ""]
    for file, found in files.items():
        lines += [f"## `kvpo/{file}`", "", "| It says | because | way out |", "|---|---|---|"]
        lines += [
            f"| {_cell(m.text)} | {_cell(m.reason)} | {_cell(' *or* '.join(m.ways)) or '-'} |"
            for m in found
        ]
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text.replace(" *or* ", "\0").replace("*", "\\*").replace("\0", " *or* ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="write the pages; else only print them"
    )
    write = parser.parse_args().write
    for path, text in pages().items():
        if write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        else:
            print(text)
