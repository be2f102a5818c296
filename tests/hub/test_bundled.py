"""The model that comes with the package."""

from pathlib import Path

import pytest

from hubgen.hub import bundled


def test_an_installation_without_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "NAME", "no-such-model")
    with pytest.raises(FileNotFoundError, match="no-such-model.*model_index.json"):
        bundled.bundled_model()


def test_the_model_is_looked_for_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import hubgen

    try:
        folder = bundled.bundled_model()
    except FileNotFoundError:
        pytest.skip("the bundled model is not there yet")
    assert folder.parent == Path(hubgen.__file__).parent / "bundled"
