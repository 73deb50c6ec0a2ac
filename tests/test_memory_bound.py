from dataclasses import fields, replace

from gramophone_server.config import Limits, Settings
from gramophone_server.memory_bound import comments, decoding_bytes, memory_bytes, memory_terms, request_memory_bytes


def test_a_request_takes_bounded_memory():
    limits = Limits(max_styles=2, max_image_pixels=1_000_000, max_message_bytes=5 * 2**20)
    assert request_memory_bytes(limits) == 25 * 2**20 + decoding_bytes(limits) + 4 * 3_000_000
    assert decoding_bytes(limits) == 2 * (2**29 + 24_000_000 + 2 * limits.max_image_bytes + 2**26)
    assert request_memory_bytes(Limits()) < 3.5e9


def test_the_memory_of_the_server_is_bounded_by_its_settings():
    """The sum of its terms. Each limit that lets clients take memory has a part in it, in the right proportion."""
    settings = Settings(engine="fake")
    terms = memory_terms(settings)
    assert memory_bytes(settings) == sum(term.bytes for term in terms) < 19 * 2**30
    assert len({term.name for term in terms}) == len(terms) and all(term.reason for term in terms)
    for name, factor in {
        "max_receiving_bytes": 2,
        "max_decoded_bytes": 1,
        "max_uploads_bytes": 1,
        "max_kept_bytes": 1,
        "max_sending_bytes": 1,
        "max_message_bytes": 3 + 32 + 16 + 32,
        "max_image_pixels": 2 * 24,
        "max_image_bytes": 2 * 2,
        "max_parked_bytes": 1,
        "max_decoders": 2**29 + 24 * settings.max_image_pixels + 2 * settings.max_image_bytes,
        "max_checkpoint_bytes": 2 * 16 + 32 + 2 * 4,
        "max_connections": 2**16 + 4 * (65535 + 40960),  # each with a call, a query, and two health checks
    }.items():
        more = replace(settings, **{name: getattr(settings, name) + 1000})
        assert memory_bytes(more) - memory_bytes(settings) == 1000 * factor, name


def test_an_operator_can_lower_every_term_but_that_of_the_process():
    lowest = Settings(**{f.name: f.metadata["range"].low for f in fields(Limits)})
    smallest = {term.name: term.bytes for term in memory_terms(lowest)}
    for term in memory_terms(Settings()):
        assert term.name == "process" or smallest[term.name] <= term.bytes * 2 / 3, term.name
    assert memory_bytes(lowest) < 2.5 * 2**30


def test_the_reason_of_a_term_names_settings_that_lower_it():
    settings = Settings()
    names = {f.name for f in fields(Limits)}
    for before in memory_terms(settings):
        for name in names & set(before.reason.replace(":", " ").replace(",", " ").split()):
            less = replace(settings, **{name: getattr(settings, name) // 2})
            (after,) = (term for term in memory_terms(less) if term.name == before.name)
            assert after.bytes < before.bytes, (before.name, name)


def test_the_comments_are_the_bound_and_its_terms():
    settings = Settings(max_parked_bytes=3 * 2**20)
    first, *rest = comments(settings)
    total = memory_bytes(settings) / 2**20
    assert first == f"# Resident memory without that of the device: at most {total:.0f} MiB, the sum of"
    assert rest[-1] == "#       3 MiB parked jobs: max_parked_bytes"
    assert len(rest) == len(memory_terms(settings))
