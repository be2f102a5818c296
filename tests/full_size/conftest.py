"""Full-size comparisons take minutes and gigabytes: they run only where `-m` names them, whatever else it says."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full_size" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("full_size")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full_size")]
