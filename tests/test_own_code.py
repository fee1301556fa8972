"""minESD used from another project, which has a unet.py of its own."""

import os
import subprocess
import sys

import pytest

from test_seams import RECIPES, ROOT, code_after

USE = """
import functools

assert unet.UNet == "a U-Net of another project"
sd = sample.load(sys.argv[1])
x_t = functools.partial(erase.x_t_from_model, steps=2)
theta = erase.erase(sd, ["star"], iterations=1, data=x_t)
print(len(theta), type(sd.unet).__module__)
"""


@pytest.fixture
def project(tmp_path):
    """Runs a script in the folder of a project that has a unet.py."""
    (tmp_path / "unet.py").write_text('UNet = "a U-Net of another project"\n')

    def run(code, *arguments, **environment):
        (tmp_path / "main.py").write_text(code)
        return subprocess.run(
            [sys.executable, "main.py", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.robustness
def test_the_recipe_keeps_both_apart(project, folder):
    recipe = code_after(RECIPES, "## In your own code")
    assert "/path/to/minESD" in recipe
    done = project(recipe.replace("/path/to/minESD", str(ROOT)) + USE, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80", "unet"]


@pytest.mark.robustness
def test_the_path_alone_is_not_enough(project):
    """Without the recipe, minESD finds the project's unet.py."""
    done = project("import sample", PYTHONPATH=str(ROOT))
    assert "AttributeError" in done.stderr or "ImportError" in done.stderr, done.stderr
