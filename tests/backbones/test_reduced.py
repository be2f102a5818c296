"""Published networks with fewer channels and layers: a checkpoint that diffusers wrote computes the same in hubgen.

The comparisons at full size are in tests/full_size.
"""

from pathlib import Path

import pytest
import torch

from tests.full_size.cases import CASES
from tests.full_size.sides import error, loaded, outputs, saved


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_diffusers_computes_the_same_in_hubgen(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = {**case.config, **case.reduced}
    inputs = case.inputs(config)
    theirs = saved(case, config, tmp_path)
    expected = outputs(theirs, inputs)
    ours = loaded(case, tmp_path)
    assert sum(parameter.numel() for parameter in ours.parameters()) < 20_000_000, "too large for every run"
    assert error(outputs(ours, inputs), expected) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_all_parameters_have_the_names_shapes_and_number_that_were_published(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        networks = [case.build(library, case.preset()) for library in ("hubgen", "diffusers")]
    ours, theirs = ({key: tensor.shape for key, tensor in network.state_dict().items()} for network in networks)
    assert ours == theirs
    assert sum(parameter.numel() for parameter in networks[0].parameters()) == case.parameters
