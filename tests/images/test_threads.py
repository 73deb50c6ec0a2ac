import threading

from gramophone_server.images.shortages import shortage_behind
from gramophone_server.images.threads import started_threads


def test_all_threads_of_a_pool_are_started_with_it(monkeypatch):
    pool = started_threads(3, "early")
    monkeypatch.setattr(threading.Thread, "start", None)  # no more of them
    try:
        together = threading.Barrier(3)
        assert sorted(future.result(10) for future in [pool.submit(together.wait) for _ in range(3)]) == [0, 1, 2]
    finally:
        pool.shutdown()


def test_a_machine_without_threads_is_a_shortage():
    assert shortage_behind(RuntimeError("can't start new thread")) == "no thread could be started"
    assert shortage_behind(RuntimeError("something else")) is None
