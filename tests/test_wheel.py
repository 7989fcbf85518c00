"""A wheel holds everything that the packages need, and works where the checkout is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "pangu", "recsys", "data_tools")


def run(*words: str | Path, cwd: Path, **more) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True,
                          check=False, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tracked() -> list[str]:
    """Files of the packages that git knows."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is written into the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    for name in [*tracked(), "setup.py", "README.md", "LICENSE"]:
        (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, place / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
        place, cwd=place / "source")
    return next(place.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert set(tracked()) <= set(archive.namelist())


CHECK = """
import json, sys
from pathlib import Path
import mindspore, numpy, pangu, parallel, recsys, data_tools
home = Path(sys.prefix)
assert all(home in Path(package.__file__).parents for package in (pangu, parallel, recsys, data_tools))
from mindspore import dtype
from parallel.layers.fused import FusedAdd, library
kernels = library(dtype.float32)
one = mindspore.Tensor(numpy.ones((2, 3, 4), numpy.float32))
assert kernels is not None and (FusedAdd(kernels)(one, one).asnumpy() == 2).all()
from pangu.generation.prompts import RECIPES, read_prompts
print(json.dumps(sorted(path.name for path in RECIPES.glob("*.yaml"))))
"""


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    """An environment of its own, in which the packages that we depend on are found, but not this checkout."""
    home = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    recipes = json.loads(run(python, "-c", CHECK, cwd=tmp_path).splitlines()[-1])
    assert {"couplet.yaml", "poem.yaml"} <= set(recipes)
    config = shutil.copyfile(ROOT / "configs" / "pangu" / "tiny.yaml", tmp_path / "tiny.yaml")
    figures = json.loads(run(python, "-m", "pangu", "count", "--config", config, cwd=tmp_path).splitlines()[-1])
    assert figures["parameters"] > 100_000
    config = shutil.copyfile(ROOT / "configs" / "recsys" / "rankmixer.yaml", tmp_path / "rankmixer.yaml")
    assert json.loads(run(python, "-m", "recsys", "count", "--config", config, cwd=tmp_path).splitlines()[-1])["tokens"]


def test_a_python_that_does_not_fit_is_one_line(tmp_path):
    """Only Python 3.12 is there: the scripts name the one that is needed and how to get it."""
    (tmp_path / "python3").write_text("#!/bin/bash\n[ \"$1\" = --version ] && echo Python 3.12.1 && exit 0\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    for tool in ("bash", "dirname", "head", "grep", "cat", "cksum", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    script = f"source {ROOT}/scripts/environment.sh; find_python"
    done = subprocess.run(["bash", "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "3.10 or 3.11" in done.stderr and "Python 3.12.1" in done.stderr
