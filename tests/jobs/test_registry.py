"""The registry: how long jobs are kept, and how they are found."""

import pytest

from gramophone_server.domain.picture_size import most_encoded_bytes
from gramophone_server.errors import Cancelled, EngineFailed, JobNotFound
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs.job import JobPhase
from tests.support.jobs import create, finished, kinds

# How long a job is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "phase"),
    [
        (lambda job: job.publish(finished()), JobPhase.SUCCEEDED),
        (lambda job: job.fail(EngineFailed()), JobPhase.FAILED),
        (lambda job: job.cancel(), JobPhase.CANCELLED),
    ],
    ids=["succeeded", "failed", "cancelled"],
)
def test_a_job_that_ended_is_kept_for_a_while(registry, loop, end, phase):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs)
    loop.advance(1000)
    end(job)
    loop.advance()
    assert (job.phase, job.ended_at, job.expires_at) == (phase, 5000 + loop.time(), 5000 + loop.time() + 60)
    loop.advance(59)
    assert jobs.find(job.id) is job
    loop.advance(1.5)
    assert len(jobs) == 0 and loop.timers == []


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_set_changes_no_time_of_a_job(registry, loop, hours):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs)
    loop.advance(1)
    job.started()
    loop.clock.epoch_s += hours * 3600
    loop.advance(2)
    job.publish(finished())
    loop.advance()
    assert (job.created_at, job.started_at, job.ended_at, job.expires_at) == (6000, 6001, 6003, 6063)
    loop.advance(59)
    assert jobs.find(job.id) is job
    assert create(jobs)[0].created_at == 5000 + hours * 3600 + loop.time()  # the next job uses the new time


def test_the_job_that_ended_first_is_forgotten_first(registry, loop):
    jobs = registry(max_kept=2)
    made = [create(jobs)[0] for _ in range(4)]
    running, *others = made
    for job in reversed(others):
        job.publish(finished())
        loop.advance()
    assert list(jobs.newest_first()) == [others[1], others[0], running]
    running.publish(finished())
    loop.advance()
    assert list(jobs.newest_first()) == [others[0], running]
    assert len(loop.timers) == 2


@pytest.mark.parametrize("limit", [{"max_kept": 4}, {"max_kept_bytes": 4 * most_encoded_bytes(64, 32)}])
def test_an_owner_of_many_jobs_does_not_remove_those_of_others(registry, loop, limit):
    jobs = registry(**limit)

    def end(owner):
        job, _ = create(jobs, owner=owner)
        job.publish(finished())
        loop.advance()
        return job

    few = [end("few") for _ in range(2)]
    many = [end("many") for _ in range(10)]
    assert list(jobs.newest_first()) == [*reversed(many[-2:]), *reversed(few)]
    few.append(end("few"))
    assert set(jobs.newest_first()) == {*few[1:], *many[-2:]}


@pytest.mark.parametrize("limit", [{"max_kept": 3}, {"max_kept_bytes": 3 * most_encoded_bytes(64, 32)}])
def test_of_owners_with_as_many_jobs_the_one_whose_job_ended_first_loses_it(registry, loop, limit):
    jobs = registry(**limit)

    def end(owner):
        job, _ = create(jobs, owner=owner)
        job.publish(finished())
        loop.advance(1)
        return job

    _, b, second, c = (end(owner) for owner in "abac")
    assert list(jobs.newest_first()) == [c, second, b]
    d = end("d")
    assert list(jobs.newest_first()) == [d, c, second]
    assert (jobs.ended, jobs.kept_bytes) == (3, 3 * most_encoded_bytes(64, 32))


@pytest.mark.parametrize("limit", [{"max_kept": 4}, {"max_kept_bytes": 4 * most_encoded_bytes(64, 32)}])
def test_a_host_of_many_connections_does_not_remove_the_jobs_of_another_one(registry, loop, limit):
    jobs = registry(**limit)
    made = {}
    for owner in ("ipv4:10.0.0.1:1", "ipv4:10.0.0.1:1", *(f"ipv4:10.0.0.2:{port}" for port in range(9))):
        job, _ = create(jobs, owner=owner)
        job.publish(finished())
        loop.advance(1)
        made.setdefault(owner, []).append(job)
    assert list(jobs.newest_first()) == [
        *made["ipv4:10.0.0.2:8"], *made["ipv4:10.0.0.2:7"], *reversed(made["ipv4:10.0.0.1:1"])
    ]  # fmt: skip


def test_the_bytes_of_kept_results_are_bounded(registry, loop):
    jobs = registry(max_kept_bytes=2 * most_encoded_bytes(64, 32))
    failed, _ = create(jobs)
    failed.fail(EngineFailed())  # has no picture, so it takes no bytes
    loop.advance()
    first, second, third = (create(jobs)[0] for _ in range(3))
    for job in (first, second):
        job.publish(finished())
        loop.advance()
    assert len(jobs) == 4
    third.publish(finished())
    loop.advance()
    assert set(jobs.newest_first()) == {second, third}


def test_a_result_larger_than_the_bound_is_not_kept(registry, loop):
    jobs = registry(max_kept_bytes=100)
    job, watcher = create(jobs)
    job.publish(finished())
    loop.advance()
    assert len(jobs) == 0 and loop.timers == []
    assert kinds(watcher) == ["Accepted", "Finished"]  # its watcher has received it


def test_a_bound_of_0_keeps_no_job(registry, loop):
    jobs = registry(max_kept=0)
    job, _ = create(jobs, request_id="r")
    job.publish(finished())
    loop.advance()
    assert len(jobs) == 0 and jobs.find_by_request("r") is None


def test_a_job_that_was_refused_is_not_kept(registry, loop):
    jobs = registry()
    job = jobs.create("r", 0.0, Encoding(Format.PNG, 0))
    job.watch()
    job.fail(EngineFailed())
    loop.advance()
    assert len(jobs) == 0 and jobs.find_by_request("r") is None and loop.timers == []


def test_a_closed_registry_has_no_job_and_no_timer(registry, loop):
    jobs = registry()
    ended, left, running = (create(jobs, grace_s=10.0) for _ in range(3))
    ended[0].publish(finished())
    left[0].leave(left[1])
    loop.advance()
    assert len(loop.timers) == 2
    jobs.close()
    running[0].publish(finished())  # by the compute thread, a little late
    loop.advance(10_000)
    assert len(jobs) == 0 and loop.timers == []


# Request ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [True, False], ids=["failed", "cancelled"])
def test_a_job_without_a_result_releases_its_request_id(registry, loop, failed):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs, request_id="r")
    assert jobs.find_by_request("r") is job
    job.fail(EngineFailed() if failed else Cancelled())
    assert jobs.find_by_request("r") is None  # at once, before the loop runs
    loop.advance(30)
    again, _ = create(jobs, request_id="r")
    assert jobs.find_by_request("r") is again and jobs.find(job.id) is job
    loop.advance(31)  # the first job is forgotten, and the second is not
    with pytest.raises(JobNotFound):
        jobs.find(job.id)
    assert jobs.find_by_request("r") is again


def test_a_request_id_finds_the_result_of_its_job_while_it_is_kept(registry, loop):
    jobs = registry(max_kept_s=60)
    job, _ = create(jobs, request_id="r")
    job.publish(finished())
    loop.advance(59)
    assert jobs.find_by_request("r") is job
    loop.advance(2)
    assert jobs.find_by_request("r") is None


def test_a_job_without_a_request_id_is_found_by_none(registry):
    jobs = registry()
    create(jobs)
    assert jobs.find_by_request("") is None


def test_jobs_are_listed_from_the_newest_to_the_oldest(registry):
    jobs = registry()
    made = [create(jobs)[0] for _ in range(4)]
    assert list(jobs.newest_first()) == made[::-1]
    assert list(jobs.newest_first(before=made[2].ordinal)) == [made[1], made[0]]
