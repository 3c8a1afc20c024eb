"""What is imported and what is shipped: the public face, the wheel, the scripts of a clone."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import keras
import pytest
from commands import ENVIRONMENT, ROOT

import logit_reg

LISTED = [
    alias.asname
    for node in ast.parse((ROOT / "logit_reg" / "__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]
SCRIPTS = sorted((ROOT / "scripts").glob("[a-z]*.py"))
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def python(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | ENVIRONMENT | environment
    )


def test_importing_the_package_starts_no_tensorflow():
    code = "import sys, logit_reg; print(*{'tensorflow', 'keras', 'numpy'} & set(sys.modules))"
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_is_there_when_it_is_first_used(name):
    assert getattr(logit_reg, name) is not None
    assert name in dir(logit_reg)


def test_the_public_names_are_those_that_were_promised():
    promised = "Objective RegularizedModel ThreatModel PGD AutoAttack evaluate load_model load_run"
    assert set(promised.split()) <= set(LISTED)
    packages = {path.parent.name for path in (ROOT / "logit_reg").glob("*/__init__.py")}
    assert packages and not packages & set(LISTED)
    from logit_reg.audit import audit

    assert callable(audit)


def test_the_network_of_a_file_of_a_run_and_of_a_bundle_is_loaded(tmp_path):
    network = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()])
    network.add(keras.layers.Dense(3))
    (tmp_path / "run").mkdir()
    network.save(tmp_path / "run" / "model.keras")
    for path in (tmp_path / "run", str(tmp_path / "run" / "model.keras")):
        found = logit_reg.load_model(path)
        assert isinstance(found, keras.Model)
        for ours, theirs in zip(found.get_weights(), network.get_weights(), strict=True):
            assert (ours == theirs).all()
    bundle = next((ROOT / "checkpoints").glob("*/checkpoint-*.index"))
    for path in (bundle.parent, bundle.with_suffix("")):
        assert logit_reg.load_model(path).output_shape == (None, 10)


@pytest.mark.parametrize("kind", ["nothing", "a folder", "text.keras"])
@pytest.mark.parametrize("load", [logit_reg.load_model, logit_reg.load_run])
def test_what_is_no_model_and_no_run_is_told_in_one_line(load, kind, tmp_path):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "text.keras").write_text("text")
    with pytest.raises(ValueError, match=kind) as caught:
        load(tmp_path / kind)
    message = str(caught.value)
    # A function has no flags to name.
    assert "\n" not in message and "--" not in message


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What setuptools puts into a wheel."""
    folder = tmp_path_factory.mktemp("built")
    base = f"--build-base={folder}", f"--build-lib={folder / 'lib'}"
    done = python("setup.py", "-q", "egg_info", f"--egg-base={folder}", "build", *base)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_everything_in_the_packages_is_shipped(built):
    def files(root):
        return {
            path.relative_to(root)
            for package in ("logit_reg", "madry_compat")
            for path in (root / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(built) == files(ROOT)
    assert Path("logit_reg", "py.typed") in files(built)


def test_every_script_has_its_entry_point():
    modules = [target.removesuffix(":run") for target in ENTRY_POINTS.values()]
    assert sorted(modules) == [f"logit_reg.commands.{path.stem}" for path in SCRIPTS]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_what_is_shipped_starts(name, built, tmp_path):
    module, _, function = ENTRY_POINTS[name].partition(":")
    # As the file that pip writes for an entry point.
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    # -P: the clone is not looked at.
    done = python("-P", "-c", code, "--help", cwd=tmp_path, PYTHONPATH=str(built))
    assert done.returncode == 0 and "Flags:" in done.stdout, done.stderr


@each_script
def test_a_script_without_its_requirements_says_what_to_install(script, tmp_path):
    done = python("-S", script, "--help", cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "is not installed here" in lines[0] and f"pip install -e {ROOT}" in lines[0]


def test_without_tensorflow_the_message_names_it(tmp_path):
    missing = "raise ModuleNotFoundError('No module named tensorflow', name='tensorflow')"
    (tmp_path / "tensorflow.py").write_text(missing)
    script = ROOT / "scripts" / "train.py"
    done = python(script, "--reg=squeeze", "--beta=2", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert re.fullmatch(r"error: the Python package tensorflow is .*\n", done.stderr)


@pytest.mark.parametrize("module", ["train", "sweep_checks"])
def test_what_a_script_starts_finds_the_clone(module, tmp_path):
    """Sweeps, workers and supervisors start the interpreter again, with -m."""
    code = (
        f"import sys, subprocess; sys.path[0] = {str(ROOT / 'scripts')!r}; import _start\n"
        "try: _start.start('demo')\n"
        "except SystemExit: pass\n"
        f"words = [sys.executable, '-P', '-m', 'logit_reg.commands.{module}', '--help']\n"
        "sys.exit(subprocess.call(words))"
    )
    # -S hides an installed project; what is required stays in reach.
    path = os.pathsep.join(entry for entry in sys.path if "site-packages" in entry)
    done = python("-S", "-c", code, "--help", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
