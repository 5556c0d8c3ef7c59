"""The benches of serving: what they time, and that wrong answers have no numbers."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import serving as bench
from bench import serving_overhead as overhead
from bench.harness import data
from bench.harness.tasks import scores
from bench.step_turns import ORDERS, Turns, ratio
from tests.server_kit import SIMPLE, engine_of, served_model, serving

PROMPTS = [[7, 20, 31, at] for at in range(6)]


@pytest.fixture(scope="module")
def url():
    lm = served_model()
    with serving(lm, engine_of(lm, cache=SIMPLE), names=("served",)) as running:
        yield running.url


def test_arrivals_are_a_poisson_process():
    found = bench.arrivals(4000, 5.0, seed=1)
    gaps = np.diff([0.0, *found])
    assert found == sorted(found) == bench.arrivals(4000, 5.0, seed=1)
    assert found != bench.arrivals(4000, 5.0, seed=2)
    # Mean and deviation of an exponential are one.
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_percentiles_are_numpys(count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    for percent in (0, 50, 95, 99, 100):
        expected = np.percentile(values, percent)
        assert bench.percentile(values, percent) == pytest.approx(expected)
    with pytest.raises(ValueError, match="empty"):
        bench.percentile([], 50)


def test_times_of_requests_that_came_over_http(url):
    moments = bench.arrivals(len(PROMPTS), 50.0, seed=0)
    timed = asyncio.run(bench.run(url, PROMPTS, 12, moments))
    assert [one.due for one in timed] == moments
    assert all(one.due <= one.first <= one.last and one.tokens == 12 for one in timed)
    [alone] = asyncio.run(bench.run(url, PROMPTS[:1], 12, [0.0]))
    assert bench.faults(timed, alone, 12) is None
    row = bench.summary([timed, timed])
    assert row["requests"] == 12
    seconds = max(one.last for one in timed) - moments[0]
    assert row["tokens_per_s"] == pytest.approx(12 * len(PROMPTS) / seconds)
    assert row["ttft_p50_s"] == pytest.approx(np.median([one.first - one.due for one in timed]))
    assert 0 < row["tpot_p50_ms"] <= row["tpot_p95_ms"] <= row["tpot_p99_ms"]


def test_the_whole_bench(url, monkeypatch, tmp_path, capsys):
    started = []

    @contextlib.contextmanager
    def served(options, *, threads):
        started.append(options)
        yield SimpleNamespace(url=url)

    monkeypatch.setattr(bench, "served", served)
    monkeypatch.setattr(bench, "prompts_of", lambda *_, count, **__: PROMPTS[:count])
    path = tmp_path / "rows.json"
    arguments = ["--data", "none", "--json", str(path), "--requests", "3", "--new-tokens", "5"]
    assert bench.main([*arguments, "--rates", "20", "90"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["policy"], row["rate"]) for row in rows] == [
        (policy, rate) for rate in (20, 90) for policy in ("full", "flexi")
    ]
    same = {option: [of[of.index(option) + 1] for of in started] for option in ("--device-bytes",)}
    assert same == {"--device-bytes": ["1GiB", "1GiB"]}
    assert "ttft_p99_s" in capsys.readouterr().out
    monkeypatch.setattr(bench, "faults", lambda *_: "something is wrong")
    assert bench.main([*arguments, "--rates", "20"]) == 1
    assert capsys.readouterr().out == ""


def test_wrong_answers_are_faults():
    right = bench.Timed(0.0, 1.0, 2.0, 5, "text")
    short, other = bench.Timed(0.0, 1.0, 2.0, 4, "text"), bench.Timed(0.0, 1.0, 2.0, 5, "other")
    assert bench.faults([right, short], right, 5) == "1 requests got fewer tokens than 5"
    assert bench.faults([other, right], right, 5) is not None
    assert right.tpot_s == 0.25


def test_chunks_take_turns_while_all_rows_run(monkeypatch):
    """Boundaries of 4 steps for 2 rows; the clock says how long each took, in seconds."""

    class Fake:
        boundary_steps = 4
        totals = SimpleNamespace(new_tokens=0)

        def step(self):
            took, made = left.pop(0)
            clock[0] += took
            self.totals.new_tokens += made
            return bool(left)

    # Read, one row alone, a boundary after which all run, three chunks and what is none, two
    # chunks that one row breaks off, the same again, the end of both.
    whole = [(seconds, 8) for seconds in (0.1, 0.2, 0.4) for _ in range(4)]
    left = [(9, 1), (5, 4), (3, 8), *whole, (0.7, 8), (7, 4), (3, 8), *whole[:9], (7, 4)]
    left += [(3, 8), *whole, (0.3, 8), (3, 8)]
    clock, engine, kinds = [0.0], Fake(), []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    turns = Turns(engine, 2, kinds.append)
    while engine.step():
        pass
    turns.close()
    first, second, third = ORDERS[:2], ORDERS[0], ORDERS[1]
    assert turns.found == [
        pytest.approx(dict(zip(order, (25.0, 50.0, 100.0), strict=True))) for order in first
    ]

    def told(order):
        return [kind for kind in order for _ in range(4)]

    assert kinds == [
        *("", ""),
        *told(second),
        *(third[0], third[0], ""),
        *told(third)[:10],
        "",
        *told(third),
        *(ORDERS[2][0], ORDERS[2][0], ""),
    ]
    assert engine.step.__self__ is engine


def test_the_interval_of_a_median():
    """Of 64 ratios: 8 away from the middle, where a binomial of 64 has 1.96 deviations."""
    turns = [{"served": 100 + at, "held": 100.0, "beside": 200.0} for at in range(64)]
    np.random.default_rng(0).shuffle(turns)
    expected = {"to_held": 1.315, "to_held_from": 1.23, "to_held_to": 1.40}
    assert ratio(turns, "held") == pytest.approx(expected)
    assert ratio(turns[:1], "beside")["to_beside_from"] == turns[0]["served"] / 200


def test_a_client_gets_all_that_was_held_back():
    lm = served_model()
    engine = engine_of(lm, cache=SIMPLE)
    new = 12 + 3 * overhead.CHUNK
    expected = overhead.alone(engine, PROMPTS[0], 2, new)
    assert len(expected) == 2 and len(expected[0]) == new
    near = []
    with contextlib.closing(overhead.Served(lm, engine)) as served:
        found = served.measure(PROMPTS[0], 2, new, client_s=1.5, near=near.append)
    assert found["tokens"] == expected
    assert near == [1.5] * (overhead.CHUNK // engine.boundary_steps)
    [turn] = found["turns"]
    assert sorted(turn) == ["beside", "held", "served"] and min(turn.values()) > 0
    assert 0 < found["loop_ms"] and 0 < found["client_s"]


def test_a_needle_is_in_its_haystack_once(tmp_path):
    path = tmp_path / "needle.jsonl"
    assert data.write(path, data.needles(5, 300, seed=1)) == 5
    made = [json.loads(line) for line in path.read_text().splitlines()]
    for one in made:
        assert one["input"].count(one["answer"]) == 1
        assert one["input"].count(f"{one['begin']} {one['answer']}.") == 1
        assert 200 < len(one["input"].split()) < 300
        assert sum(choice in one["input"] for choice in one["choices"]) == 1
        assert one["answer"] in one["choices"] and len(set(one["choices"])) == 4
    assert len({one["choices"].index(one["answer"]) for one in made}) > 1
    depths = [one["input"].index(one["answer"]) / len(one["input"]) for one in made]
    assert depths == sorted(depths) and depths[0] < 0.1 and depths[-1] > 0.9
    assert scores.holds_answer(made[0], [f"It is {made[0]['answer']}."]) == {"found": 1.0}
    assert scores.holds_answer(made[0], ["I do not know."]) == {"found": 0.0}


def test_leval_gives_its_first_questions(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"input": "a", "instructions": ["q", "r"], "outputs": ["x", "y"]}))
    assert list(data.leval(path)) == [{"input": "a", "question": "q", "answer": "x"}]
    path.write_text(json.dumps({"input": "a"}))
    with pytest.raises(ValueError, match="some.jsonl:1"):
        list(data.leval(path))
    assert scores.word_overlap({"answer": "the red fox"}, ["The fox!"]) == {"f1": 0.8}
    assert scores.word_overlap({"answer": ""}, [""]) == {"f1": 0.0}
    assert scores.nats_a_letter({"answer": "four"}, [(-6.0, False)]) == {"nats_a_letter": 1.5}
