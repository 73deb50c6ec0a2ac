"""A bounded sample of `make fuzz`."""

import random
import time

import grpc
import pytest

from gramophone_server.config import Limits
from gramophone_server.errors import InvalidRequest
from gramophone_server.images import decode, size
from tests.bad_input import pictures
from tests.bad_input.campaign import Campaign, Outcome, corpus, wrong
from tests.bad_input.messages import METHODS, Input, nonsense

PATIENT_S = 15.0  # on a machine that does other things; `make fuzz` allows 2
FIELD = "spec.content.data"


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_picture_is_decoded_or_refused_and_never_anything_else(seed):
    chance = random.Random(seed)
    decoded = refused = 0
    for _ in range(500):
        name, data = pictures.damaged(chance)
        limits, needed = Limits(max_image_pixels=pictures.LIMIT), chance.choice((16, 64))
        try:
            picture = decode(data, FIELD, limits, needed)
            decoded += 1
            assert picture.shape[0] == 3 and min(picture.shape[1:]) >= 16, name
            assert size(data, FIELD, limits), name
        except InvalidRequest as error:
            refused += 1
            (violation,) = error.violations
            assert violation.field == FIELD and len(violation.description) < 400, name
    assert decoded > 20 and refused > 200  # so the damage is neither none nor all


async def test_a_sample_of_bad_inputs_does_no_harm():
    campaign = Campaign(seed=7, longest_s=PATIENT_S)
    await campaign.run(600, corpus())
    assert not campaign.failures
    assert campaign.sent == 600 and len(campaign.checks) > 2
    assert {method for method, _ in campaign.outcomes} == set(METHODS)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= {code for _, code in campaign.outcomes}
    assert campaign.peak_bytes > 30 * 2**20  # so the bombs were bombs


def test_the_same_seed_makes_the_same_inputs_and_files_hold_them():
    inputs = [
        [nonsense(chance, b"checkpoint" * 300, ["id"]) for _ in range(50)] for chance in map(random.Random, (3, 3, 4))
    ]
    assert inputs[0] == inputs[1] != inputs[2]
    assert [Input.from_bytes(one.to_bytes()) for one in inputs[0]] == inputs[0]


OK, INVALID, INTERNAL = grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome(OK, "", (), "", 0.1), ""),
        (Outcome(INVALID, "spec.seed: no", ("spec.seed",), "INVALID_REQUEST", 0.1), ""),
        (Outcome(INTERNAL, "the server failed", (), "INTERNAL", 0.1), "ended in INTERNAL: the server failed"),
        (Outcome(OK, "", (), "", 2.5), "was answered after 2.5 s"),
        (Outcome(INVALID, "no", (), "", 0.1), "ended in INVALID_ARGUMENT without a reason: no"),
        (Outcome(INVALID, "no", ("",), "INVALID_REQUEST", 0.1), "was refused without saying what is wrong: no"),
        (Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)", (), "", 0.1), ""),
    ],
)
def test_the_rules_are_what_they_say(outcome, told):
    assert wrong(outcome) == told


def test_a_jpeg_of_very_many_scans_costs_nothing():
    began = time.process_time()
    with pytest.raises(InvalidRequest):
        decode(pictures.jpeg_of_scans(1992, 100_000), FIELD, Limits(), 64)
    assert time.process_time() - began < 5  # 20 s when it was decoded; CPU time, so not the neighbours'
