"""The simulated engine: a schedule by hand, that nothing is lost, and a quick run of the bench."""

import dataclasses
import json
import math
import random

import jax.numpy as jnp
import pytest

from bench import simulate, simulate_machine, simulate_times
from bench.simulate_engine import Asked, SimulatedCore
from bench.simulate_times import Assumptions, Linear, Times
from flexijax.config import CacheConfig
from flexijax.engine.plan_engine import sized_program
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import from_config
from flexijax.pallas_kernels import platform
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.any_jax

# A step takes a second, and so does a piece of a prompt through one of the two layers.
SECONDS = Times(
    step=Linear(once=1.0),
    rerank=Linear(),
    piece_once=1.0,
    layer_flops=0.0,
    key_flops=0.0,
    flops_per_second=1.0,
    commit=Linear(),
)


def core_of(times=SECONDS, *, policy="full", prefill_first=False, boundary=0.0, **sizes):
    config = tiny_config("llama", max_context=4096)
    params = Decoder(config).abstract(dtype=jnp.float32)
    lm = from_config(config, params, name="tiny", dtype=jnp.dtype("float32"), tokenizer=None)
    cache = CacheConfig(policy=policy, budget_tokens=64)
    usual = {"max_requests": 4, "max_context": 512, "usual_context": None, "device_bytes": None}
    program, _ = sized_program(lm, cache, host_bytes=None, boundary_steps=4, **(usual | sizes))
    return SimulatedCore(lm, program, cache, times, boundary=boundary, prefill_first=prefill_first)


@pytest.fixture(autouse=True)
def on_a_gpu():
    with platform.compiling_for("gpu"):
        yield


def test_two_requests_by_hand():
    """A is read in 2 s, then decodes its last 4 tokens in 4, and B is read for as long at most.

    A: 0 - 2 read, 2 - 6 decodes. B: 6 - 8 read, 8 - 12 decodes.
    """
    found = core_of().run([Asked(0.0, 100, 5), Asked(0.0, 100, 5)])
    assert (found["seconds"], found["reading_s"], found["decoding_s"]) == (12.0, 4.0, 8.0)
    assert found["ttft_s"] == (2 + 8) / 2
    assert found["tpot_ms"] == 1000.0
    assert found["tokens_per_s"] == 210 / 12
    assert found["peak_blocks"] == 14  # 105 tokens in blocks of 16, twice


def test_prompts_first_then_all_decode_together():
    """0 - 2 and 2 - 4 are read, then 4 - 8 both decode; Python takes half a second before."""
    core = core_of(prefill_first=True, boundary=0.5)
    found = core.run([Asked(0.0, 100, 5), Asked(0.0, 100, 5)])
    assert found["seconds"] == 8.5
    assert found["tpot_ms"] == pytest.approx(1000 * (6.5 + 4.5) / 2 / 4)


def test_a_request_that_comes_later_is_waited_for():
    found = core_of().run([Asked(100.0, 100, 1)])
    assert found["seconds"] == 102.0 and found["ttft_s"] == 2.0 and found["tpot_ms"] == 0.0


def test_steps_are_dispatched_before_the_last_ones_are_fetched():
    """What Python takes at a boundary is hidden behind the steps, but for the first."""
    found = core_of(boundary=0.5).run([Asked(0.0, 100, 1 + 4 * 10)])
    # Two boundaries without a step in flight: the first, and the last, whose end was known.
    assert found["decoding_s"] == 40.0
    assert 42.5 <= found["seconds"] <= 43.5


def test_a_chunk_ends_every_sixteen_steps_of_a_row():
    times = dataclasses.replace(SECONDS, rerank=Linear(row=10.0))
    found = core_of(times).run([Asked(0.0, 100, 1 + 32)])
    assert found["decoding_s"] == 32 + 2 * 10


@pytest.mark.parametrize("policy", ["full", "quest"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_request_ends_within_the_memory(policy, seed):
    draw = random.Random(seed)
    asked = [
        Asked(draw.uniform(0, 200), draw.randint(1, 300), draw.randint(1, 200)) for _ in range(40)
    ]
    sizes = {"policy": policy, "device_bytes": 500_000, "usual_context": 128}
    core = core_of(**sizes)
    found = core.run(asked)
    assert found["requests"] == 40 and found["running"] <= found["rows"]
    # With blocks of their own, rows are short of them before they are short of rows.
    assert found["peak_blocks"] <= found["blocks"] and (found["pauses"] > 0) == (policy == "quest")
    assert core.pool.num_free == core.limits.blocks and not core.runner.running
    assert core_of(**sizes).run(list(reversed(asked))) == found


def test_too_long_a_request_is_an_error():
    with pytest.raises(ValueError, match="need .* blocks"):
        core_of(max_requests=1).run([Asked(0.0, 600, 200)])


def report(context, stages):
    return {"target": "h100", "model": "tiny", "batch": 2, "context": context, "stages": stages}


def stage(*, ours, others, nodes=0.0, outside=0.0, syncs=0.0):
    """Work as the report has it: over the efficiencies that it assumes."""
    by_bytes, by_issue = ours
    kernel = {"byte_seconds": by_bytes, "issue_seconds": by_issue}
    work = others / 0.875 + max(by_bytes / 0.875, by_issue / 0.7)
    launches = {"graph_nodes": nodes, "outside": outside, "host_syncs": syncs}
    return {"estimate": {"work": work, "kernels": [kernel], **launches}}


def test_times_are_linear_in_rows_and_tokens():
    """7 s for 2 rows of 100 tokens, 11 s of 200: 0.02 a token, 1.5 a row; 3 + 2 are there once."""
    of = Assumptions(bandwidth=1.0, issue=0.5)
    pair = (
        report(100, {"decode": stage(ours=(7.0, 1.0), others=3.0, nodes=2.0)}),
        report(200, {"decode": stage(ours=(11.0, 1.0), others=3.0, nodes=2.0)}),
    )
    found = simulate_times._linear("decode", pair, of)
    assert (found.once, found.row, found.token) == pytest.approx((5.0, 1.5, 0.02))
    assert found.seconds(2, 200) == pytest.approx(5 + 7) and found.seconds(0, 0) == 0
    slower = simulate_times._linear("decode", pair, of.changed("bandwidth", 0.5))
    assert (slower.once, slower.token) == pytest.approx((2 + 6, 0.04))
    # Where instructions are what takes longer, the bandwidth is of no use.
    bound = (
        report(100, {"decode": stage(ours=(1.0, 7.0), others=0.0)}),
        report(200, {"decode": stage(ours=(1.0, 11.0), others=0.0)}),
    )
    assert simulate_times._linear("decode", bound, of) == simulate_times._linear(
        "decode", bound, of.changed("bandwidth", 2)
    )
    fast = simulate_times._linear("decode", bound, of.changed("issue", 2))
    assert fast.token == pytest.approx(0.02)
    assert of.changed("issue", 3).issue == 1.0
    halved = simulate_times._linear("decode", pair, of.changed("graph_node", 0.5))
    assert halved.once == pytest.approx(4.0)


def written(folder, *reports):
    paths = []
    for at, one in enumerate(reports):
        paths.append(folder / f"{at}.json")
        paths[-1].write_text(json.dumps({"report": one}))
    return paths


def test_reports_of_a_policy_are_two(tmp_path):
    cache = {"policy": "quest", "budget_tokens": 512}
    short, long = (report(context, {}) | {"cache": cache} for context in (100, 200))
    [found] = simulate_machine.counted(written(tmp_path, short, long))
    assert (found.name, found.cache.budget_tokens) == ("quest:512", 512)
    assert [one["context"] for one in found.reports] == [100, 200]
    both = tmp_path / "both.json"
    both.write_text(json.dumps({"compiled": [short, long]}))
    assert simulate_machine.counted([both]) == [found]
    for wrong in ([short], [short, short], [short, long | {"batch": 3}], [short, long, long]):
        with pytest.raises(ValueError, match="there must be two"):
            simulate_machine.counted(written(tmp_path, *wrong))
    with pytest.raises(ValueError, match="several models: other, tiny"):
        simulate_machine.counted(written(tmp_path, short, long | {"model": "other"}))
    both.write_text("{}")
    with pytest.raises(ValueError, match="holds nothing that"):
        simulate_machine.counted([both])


def test_a_quick_run_with_the_shipped_counts(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "a.png"
    assert simulate.main(["--quick", "--json", str(out), "--plot", str(picture)]) == 0
    found = json.loads(out.read_text())
    assert {row["config"] for row in found["rows"]} == {"full", "flexi:1024"}
    assert {row["workload"] for row in found["rows"]} == {"offline", "online"}
    assert all(math.isfinite(row["predicted_ratio"]) for row in found["rows"])
    fields = {field.name for field in dataclasses.fields(Assumptions)}
    assert {row["assumption"] for row in found["sensitivity"]} == fields | {"as they are"}
    assert "Prediction" in found["caption"] and "Prediction" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_shipped_counts_say_what_they_came_from():
    for path in simulate.COUNTS.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["command"].startswith("flexijax compile-report --model llama-3.1-8b")
        assert content["report"]["target"] == "h100" and content["environment"]["jax"]
