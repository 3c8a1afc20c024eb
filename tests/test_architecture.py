"""The rooms of the house and the one direction of its arrows (docs/architecture.md)."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; rooms on one floor do not know each other.
FLOORS = (
    (
        "version",
        "files",
        "durations",
        "progress",
        "text_columns",
        "messages",
        "regularizers",
    ),
    ("array_files",),
    ("threat", "objectives", "adapters"),
    ("attacks.engine",),
    ("attacks",),
    ("evaluation", "training"),
    ("analysis",),
    ("audit",),
    ("report",),
    ("experiments",),
    ("commands",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path, known):
    """The modules of this project that a file imports, wherever in it, but not for types only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in names if name in known]
            yield from modules
            if len(modules) < len(names) and node.module in known:
                yield node.module


def graph():
    known = dict(modules("logit_reg")) | dict(modules("madry_compat"))
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def room(module):
    inside = module.removeprefix("logit_reg.")
    return max((r for r in FLOOR_OF if f"{inside}.".startswith(f"{r}.")), key=len, default=None)


def test_every_module_has_a_room():
    homeless = [name for name, _ in modules("logit_reg") if name != "logit_reg" and not room(name)]
    assert not homeless


def test_arrows_between_rooms_only_point_down():
    upwards = [
        f"{importer} -> {imported}"
        for importer, targets in graph().items()
        for imported in targets
        if (here := room(importer)) and (there := room(imported))
        if here != there and FLOOR_OF[there] >= FLOOR_OF[here]
    ]
    assert not upwards


def test_modules_import_each_other_in_no_circle():
    # A package's face imports what it shows; its own modules do not import the face.
    faces = {name for name, path in modules("logit_reg") if path.name == "__init__.py"}
    bare = {name: targets - faces for name, targets in graph().items() if name not in faces}
    assert list(graphlib.TopologicalSorter(bare).static_order())


def test_only_experiments_and_commands_know_both_packages():
    for importer, targets in graph().items():
        joined = importer.startswith(("logit_reg.experiments", "logit_reg.commands"))
        others = {name.partition(".")[0] for name in targets} - {importer.partition(".")[0]}
        assert joined or not others, importer


@pytest.mark.parametrize(
    "script", sorted((ROOT / "scripts").glob("[a-z]*.py")), ids=lambda p: p.stem
)
def test_a_script_only_starts_its_command(script):
    assert (ROOT / "logit_reg" / "commands" / script.name).exists()
    assert f'start("{script.stem}")' in script.read_text()
    assert len(script.read_text().splitlines()) < 10
