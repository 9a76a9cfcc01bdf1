"""Places never overlap, and an arena is no larger than its places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideformer.graph.buffers import PAGE, Tier
from slideformer.graph.builder import GraphBuilder
from slideformer.graph.errors import GraphError
from slideformer.graph.graph import TaskGraph
from slideformer.memory.layout import aligned, lay_out, places
from tests.support.graphs import bytes_of, task_graphs

wanted = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(st.sampled_from(Tier), st.integers(0, 20_000)),
    max_size=12,
)


@given(wanted)
def test_places_never_overlap(places: dict[str, tuple[Tier, int]]) -> None:
    layout = lay_out(places)
    assert layout.offsets.keys() == places.keys()
    for tier in Tier:
        reached = 0
        of_tier = [n for n, (t, _) in places.items() if t is tier]
        for name in sorted(of_tier, key=lambda n: (layout.offsets[n], places[n][1])):
            assert layout.offsets[name] >= reached
            assert layout.offsets[name] % PAGE == 0
            reached = layout.offsets[name] + places[name][1]
        assert reached <= layout.sizes.get(tier, 0)
        waste = layout.sizes.get(tier, 0) - sum(places[n][1] for n in of_tier)
        assert 0 <= waste <= len(of_tier) * (PAGE - 1)
        assert layout.sizes.get(tier, 0) == sum(aligned(places[n][1]) for n in of_tier)


@given(st.integers(0, 10**6))
def test_aligned_rounds_up_to_the_next_multiple(nbytes: int) -> None:
    assert aligned(nbytes) % PAGE == 0
    assert 0 <= aligned(nbytes) - nbytes < PAGE


@given(st.lists(task_graphs(), max_size=3))
def test_every_buffer_of_every_graph_has_its_bytes(graphs: list[TaskGraph]) -> None:
    found = places(graphs)
    for graph in graphs:
        for buffer in graph.buffers.values():
            tier, nbytes = found[buffer.place]
            assert tier is buffer.tier
            assert all(position < nbytes for _, position in bytes_of(buffer))


def one_buffer(nbytes: int, tier: Tier) -> TaskGraph:
    """A graph with the buffer ``x``."""
    builder = GraphBuilder(f"{tier}{nbytes}")
    builder.buffer("x", nbytes, tier)
    return builder.build()


def test_a_shared_place_is_as_large_as_any_graph_needs() -> None:
    graphs = [one_buffer(n, Tier.CPU) for n in (4, 9, 2)]
    assert places(graphs) == {"x": (Tier.CPU, 9)}


def test_a_place_in_two_tiers_is_refused() -> None:
    with pytest.raises(GraphError, match="x is in cpu in one graph and in gpu in gpu4"):
        places([one_buffer(4, Tier.CPU), one_buffer(4, Tier.GPU)])
