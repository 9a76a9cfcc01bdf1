"""Named shapes: what is planned of one is what its Hugging Face config says."""

from __future__ import annotations

import pytest

from slideformer.graph.errors import ConfigError
from slideformer.models.families import decoder_config
from slideformer.models.shapes import SHAPE_NAMES, shape_config, shape_settings
from slideformer.models.units import model_spec


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_shape_reads_as_its_config(name: str) -> None:
    settings, config = shape_settings(name), shape_config(name)
    assert decoder_config(settings) == decoder_config(config)
    assert model_spec(settings) == model_spec(config)


def test_an_unknown_shape_is_named_with_the_nearest() -> None:
    for find in (shape_settings, shape_config):
        with pytest.raises(ConfigError, match="did you mean llama3-8b"):
            find("llama3-8")
