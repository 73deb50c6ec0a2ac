"""Mix files, and the random choice of jobs."""

from itertools import islice

import pytest

from gramophone.recipe import LayerWeight, Recipe
from gramophone_client.bench.pictures import synthetic
from gramophone_client.bench.workload import InvalidWorkload, JobKind, planned_jobs, read_workload
from gramophone_client.types.picture import Picture

MIX = """
[[job]]
name = "thumbnail"
weight = 3
size = 128
cancel = 0.25

[[job]]
preset = "quality"
style_layers = { relu1_1 = 1, relu3_1 = 0.5 }
pooling = "average"
frames = false
deadline_s = 300
"""


@pytest.fixture
def mix_file(tmp_path):
    def write(text: str):
        path = tmp_path / "mix.toml"
        path.write_text(text)
        return path

    return write


def test_a_mix_file_has_kinds_of_jobs(mix_file):
    thumbnail, other = read_workload(mix_file(MIX))
    assert (thumbnail.name, thumbnail.weight, thumbnail.cancel, thumbnail.frames) == ("thumbnail", 3, 0.25, True)
    assert thumbnail.recipe() == Recipe(size=128)
    assert (other.name, other.preset, other.frames, other.deadline_s) == ("job 2", "quality", False, 300)
    assert other.recipe().style_layers == (LayerWeight("relu1_1", 1), LayerWeight("relu3_1", 0.5))
    assert other.recipe().pooling == "average"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[job]\n", "mix.toml: not TOML: "),
        ("jobs = 3\n", "mix.toml: 'jobs' is not a key of a mix file; allowed is [[job]], one for each kind of job"),
        ("", "mix.toml: a mix file needs at least one [[job]]"),
        ("job = 3\n", "mix.toml: a mix file needs at least one [[job]]"),
        ("[[job]]\nwieght = 3\n", "mix.toml: job 1: 'wieght' is not a key of a job; allowed are name, weight, preset,"),
        ("[[job]]\nwieght = 3\n", "and the fields of a recipe: content_layers,"),
        ("[[job]]\nweight = 0\n", "mix.toml: job 1: weight must be a number above 0, got 0"),
        ("[[job]]\nweight = inf\n", "weight must be a number above 0, got inf"),
        ("[[job]]\n[[job]]\ncancel = 1.5\n", "mix.toml: job 2: cancel must be a number from 0 to 1, got 1.5"),
        ("[[job]]\nframes = 1\n", "job 1: frames must be true or false, got 1"),
        ("[[job]]\nframe_every = -1\n", "frame_every must be a whole number of iterations, 0 or more, got -1"),
        ("[[job]]\npreset = 'slow'\n", "job 1: preset must be one of fast, quality, textbook, got 'slow'"),
        ("[[job]]\nsize = 64.5\n", "job 1: size must be a whole number, got 64.5"),
        ("[[job]]\nsize = 5\n", "job 1: size must be between 16 and 16384, got 5"),
        ("[[job]]\nbeta = 'much'\n", "job 1: beta must be a number, got 'much'"),
        ("[[job]]\noptimiser = 'sgd'\n", "optimiser must be one of gradient-descent, normalised-descent, adam, lbfgs,"),
        (
            "[[job]]\nstyle_layers = ['relu1_1']\n",
            "style_layers must be a table of layers and weights like { relu1_1 =",
        ),
        ("[[job]]\nname = 'a'\n[[job]]\nname = 'a'\n", "two jobs have the name 'a'; names must be unique"),
    ],
)
def test_an_invalid_mix_file_fails_with_a_clear_message(mix_file, text, message):
    with pytest.raises(InvalidWorkload) as caught:
        read_workload(mix_file(text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(mix_file(text)))


def test_jobs_are_chosen_by_weight_and_cancelled_by_share():
    workload = [JobKind(name="often", weight=3, cancel=0.25), JobKind(name="seldom")]
    jobs = list(islice(planned_jobs(workload, 5), 8000))
    assert jobs == list(islice(planned_jobs(workload, 5), 8000)) != list(islice(planned_jobs(workload, 6), 8000))
    often = [job for job in jobs if job.kind.name == "often"]
    assert len(often) / len(jobs) == pytest.approx(0.75, abs=0.02)
    cancelled = [job.cancel_at for job in often if job.cancel_at is not None]
    assert len(cancelled) / len(often) == pytest.approx(0.25, abs=0.02)
    assert min(cancelled) < 0.05 and max(cancelled) > 0.95
    assert not any(job.cancel_at is not None for job in jobs if job.kind.name == "seldom")


def test_synthetic_pictures_depend_on_the_seed():
    assert synthetic(1, 64) == synthetic(1, 64) != synthetic(2, 64)
    assert Picture("png", 64, 48, synthetic(1, 64)).image().size == (64, 48)
