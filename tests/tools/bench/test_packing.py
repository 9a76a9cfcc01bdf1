"""The packing benchmark runs on the CPU and counts real tokens."""

from __future__ import annotations

import re

import pytest

from slideformer.measuring.trial import log_normal_stream
from slideformer.tools.bench import packing


def test_both_sides_run_and_their_ratio_is_that_of_the_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        packing.main(
            ["--shape=tiny", "--batch-size=2", "--seq-len=32", "--steps=2", "--device=cpu"]
        )
    assert not left.value.code
    out = capsys.readouterr().out
    speeds = {
        name: [
            int(each.replace(",", ""))
            for each in re.findall(rf"^{name}: ([\d,]+) real tokens/s", out, re.MULTILINE)
        ]
        for name in ("padded", "packed")
    }
    assert [len(each) for each in speeds.values()] == [2, 2]
    ratio = float(re.findall(r"^packed rows train ([\d.]+) times", out, re.MULTILINE)[0])
    assert ratio == pytest.approx(max(speeds["packed"]) / max(speeds["padded"]), rel=0.02)


@pytest.mark.parametrize("packing", [False, True])
def test_the_mix_has_a_mean_of_a_third(packing: bool) -> None:
    stream = log_normal_stream(100, 300, 4, 3000, packing=packing)
    assert stream.padding_share == pytest.approx(0.0 if packing else 2 / 3, abs=0.005)
    real = sum(stream.batch(step).real_tokens for step in range(stream.steps_per_epoch))
    assert real / 3000 == pytest.approx(100, abs=0.5)
