"""Runs the fast tests with the lowest versions that pyproject.toml allows.

    python -m tests.lowest_versions [--torch VERSION] [--venv FOLDER] [TESTS ...]

It makes a virtual environment, installs every dependency at the lower end of its range, and runs pytest there. torch is
installed at its lowest version too, unless `--torch` names another: older CPU builds are on PyTorch's own index alone.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What leans on the libraries most, in a few minutes. Tests of texts are left out: the tokenizers that they build in
# memory need transformers 5.
TESTS = ("tests/test_diffusers_contract.py", "tests/test_architecture.py", "tests/backbones", "tests/controls",
         "tests/layers", "tests/paths", "tests/schedulers", "tests/pipelines/test_class_to_image.py",
         "tests/pipelines/test_unconditional.py")  # fmt: skip


def lowest(requirements: Sequence[str]) -> dict[str, str]:
    """The lower end of each requirement of the form `name>=version,...`; requirements on extras are left out."""
    found = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match:
            found[match[1]] = match[2]
        elif "[" not in requirement:
            raise ValueError(f"pyproject.toml: got the requirement {requirement!r}, expected a lower bound.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="version of torch in the place of the lowest one")
    parser.add_argument("--venv", type=Path, help="folder of the virtual environment, kept (default: a temporary one)")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    versions = lowest([*project["dependencies"], *extras["train"], *extras["minilm"], *extras["test"]])
    if options.torch:
        versions["torch"] = options.torch
    pins = [f"{name}=={version}" for name, version in versions.items()]
    print("versions:", *pins)
    with tempfile.TemporaryDirectory() as folder:
        venv = options.venv or Path(folder) / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        python = str(venv / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", str(ROOT)], check=True)
        sys.exit(subprocess.run([python, "-m", "pytest", "-q", *options.tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
