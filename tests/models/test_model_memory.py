"""The memory of a run as bindings see it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

from slideformer.graph.plan import Compute
from slideformer.models.families import decoder_config
from slideformer.models.model_memory import ModelMemory
from slideformer.models.units import model_spec
from tests.models.tiny import tiny_config
from tests.support.specs import small_plan


@pytest.mark.parametrize("compute", Compute)
def test_looked_up_rows_are_scaled_as_in_transformers(compute: Compute) -> None:
    """The factor, √60, is rounded to the compute dtype before it is multiplied."""
    config = tiny_config("gemma2", hidden_size=60, head_dim=16)
    spec, decoder = model_spec(config), decoder_config(config)
    memory = ModelMemory(spec, decoder, small_plan(compute=compute), {})
    embedding = Gemma2TextScaledWordEmbedding(301, 60, None, embed_scale=60**0.5)
    embedding = embedding.to(memory.dtype)
    ids = torch.arange(301)
    rows = embedding.weight.detach()[ids].clone()
    memory.scale_embedding_(rows)
    assert torch.equal(rows, embedding(ids).detach())
    bare = embedding.weight.detach()
    assert not torch.equal(rows, (bare.double() * 60**0.5).to(memory.dtype))


def test_other_families_scale_nothing() -> None:
    config = tiny_config("llama")
    memory = ModelMemory(model_spec(config), decoder_config(config), small_plan(), {})
    rows = torch.randn(5, 64)
    scaled = rows.clone()
    memory.scale_embedding_(scaled)
    assert torch.equal(scaled, rows)
