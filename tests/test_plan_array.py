"""A plan as an array: of one size, and the same plan again in a process with the same requests."""

import dataclasses

import numpy as np
import pytest

from flexijax.engine.boundary import Admission, BoundaryPlan, Limits, Reason, RequestState, Stage
from flexijax.engine.plan_array import array_size, from_array, short_enough, to_array

pytestmark = pytest.mark.any_jax

LIMITS = Limits(blocks=64, rows=4, page_size=16)
REQUESTS = {
    key: RequestState(
        key=key,
        arrival=key,
        prompt_tokens=32,
        max_new_tokens=16,
        stage=Stage.RUNNING if key < 4 else Stage.WAITING,
        cached=(7, 8, 9) if key == 5 else (),
    )
    for key in range(60)
}
TOO_LONG = dataclasses.replace(REQUESTS[9], prompt_tokens=5000)
NOTHING = BoundaryPlan(
    release={},
    refuse={},
    admit=(),
    grow={},
    pause=(),
    resume=(),
    decode=(),
    passed={},
    prefill_share=0.0,
)


def test_a_plan_comes_back_as_it_was():
    requests = {**REQUESTS, 9: TOO_LONG}
    plan = BoundaryPlan(
        release={0: Reason.ENDED, 30: Reason.CANCELLED, 31: Reason.DEADLINE},
        refuse={
            9: "5000 tokens and max_new_tokens=16 more need 314 blocks of 16 tokens, and there "
            "are 64: shorten either, or raise device_bytes and host_bytes"
        },
        admit=(Admission(5, 0, (7, 8, 9), 12),),
        grow={1: 1, 2: 3},
        pause=(3,),
        resume=(1,),
        decode=(1, 2),
        passed={3: 1, 6: 2},
        prefill_share=0.5,
    )
    array = to_array(plan, 17, LIMITS)
    assert array.dtype == np.int32 and from_array(array, requests, LIMITS) == (plan, 17)
    assert to_array(NOTHING, 1, LIMITS).shape == array.shape == (array_size(LIMITS),)
    assert from_array(to_array(NOTHING, 1, LIMITS), {}, LIMITS) == (NOTHING, 1)


def test_what_waits_is_let_go_of_later_where_there_is_no_room():
    every = dict.fromkeys(range(60), Reason.CANCELLED)
    plan = short_enough(dataclasses.replace(NOTHING, release=every), REQUESTS.values())
    assert set(range(4)) < set(plan.release) and len(plan.release) == 20
    assert from_array(to_array(plan, 1, LIMITS), REQUESTS, LIMITS)[0] == plan


def test_a_plan_for_other_requests_is_refused():
    array = to_array(dataclasses.replace(NOTHING, decode=(1, 2)), 1, LIMITS)
    with pytest.raises(ValueError, match=r"requests \[2\], which were not submitted here"):
        from_array(array, {1: REQUESTS[1]}, LIMITS)
    plan = dataclasses.replace(NOTHING, admit=(Admission(5, 0, (1, 2), 2),))
    with pytest.raises(ValueError, match="request 5 begins like another prompt in process 0"):
        from_array(to_array(plan, 1, LIMITS), REQUESTS, LIMITS)
