"""What docs/adding.md shows works, in a copy of the project, and touches the files it names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text()
# A paragraph that names the file and the line before, and the code.
STEP = re.compile(r"\n\n((?:[^\n]+\n)+)\n```python\n(.*?)```", re.DOTALL)

USE = """
import numpy as np
from logit_reg import Objective, ThreatModel, evaluate
from logit_reg.attacks import Fog
from logit_reg.experiments.building import build_model
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.commands import train
from madry_compat.networks import mnist_cnn

assert float(Objective("spread", beta=2.0)(np.array([[3.0, 1.0]]), np.array([0])).penalty) == 1.0

threat = ThreatModel("linf", 0.3, 0.0, 1.0)
images = np.random.default_rng(0).random((3, 28, 28, 1)).astype("float32")
network = mnist_cnn()
labels = network.predict(images, verbose=0).argmax(1)
found = evaluate(network, {"fog": Fog(threat)}, images, labels)
assert np.abs(found.adversarial - images).max() > 0.29

given = {"dataset": "kmnist", "adversary": "fog", "reg": "spread", "beta": 1.0}
settings = resolve_settings(given | {"epsilon": 0.2, "max_num_training_steps": 1})
assert settings.name.startswith("kmnist-spread-beta1-fog"), settings.name
model = build_model(settings, mnist_cnn())
assert np.isfinite(float(model.update(images, labels)["total"]))
for flag, value in given.items():
    if flag != "beta":
        assert value in train.FLAGS[flag].parser.enum_values
"""


def steps(title):
    """The (file, line that the code comes after, code) of a section; no line for a new file."""
    section = "\n" + PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    for words, code in STEP.findall(section):
        (path,) = re.findall(r"`(\w[\w/]*\.py)`", words)
        marker = re.search(r"after\s+`([^`]+)`", words)
        yield path, marker and " ".join(marker[1].split()), code


def table():
    rows = re.findall(r"^\| (an? [\w ]+) \| (.*) \|$", PAGE, re.MULTILINE)
    return {title: set(re.findall(r"`([^`]+)`", files)) for title, files in rows}


@pytest.mark.slow
def test_what_the_page_adds_works_and_touches_the_files_it_names(tmp_path):
    for package in ("logit_reg", "madry_compat"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for title, files in table().items():
        touched = set()
        for name, marker, code in steps(title[0].upper() + title[1:]):
            path = tmp_path / name
            touched.add(name.replace("fog.py", "NAME.py"))
            if marker is None:
                assert not path.exists()
                path.write_text(code)
                continue
            lines = path.read_text().splitlines(keepends=True)
            (place,) = (i for i, line in enumerate(lines) if line.strip() == marker)
            lines.insert(place + 1, code)
            path.write_text("".join(lines))
        assert title == "a protocol" or touched == files, title

    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
