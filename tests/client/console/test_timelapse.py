import re

from gramophone_client.console.timelapse import Timelapse
from gramophone_client.types.picture import Picture
from tests.support.fake_service import encoded


def test_a_timelapse_is_bounded_and_keeps_its_start_and_rhythm():
    timelapse = Timelapse((800, 600), max_side=40, max_frames=8)
    assert timelapse.size == (40, 30)
    for grey in range(100):
        data = encoded((grey, grey, grey), size=(16, 12))
        timelapse.add(Picture("png", 16, 12, data))
        assert len(timelapse.frames) <= 8
    shades = [image.getpixel((0, 0))[0] for image in timelapse.frames]
    assert shades == list(range(0, 100, 16))
    assert {image.size for image in timelapse.frames} == {(40, 30)}


def test_a_gif_has_one_palette_for_all_its_frames(folder):
    timelapse = Timelapse((40, 30))
    for colour in ("red", "green", "blue", "white"):
        timelapse.add(Picture("png", 40, 30, encoded(colour, size=(40, 30))))
    timelapse.save("film.gif", last=Picture("png", 40, 30, encoded("orange", size=(40, 30))))
    data = (folder / "film.gif").read_bytes()
    # Image descriptors (0x2C, then position and size) with bit 7 of the last byte set would bring their own palette.
    descriptors = re.findall(rb"\x00\x2c.{4}\x28\x00\x1e\x00(.)", data, re.DOTALL)
    assert len(descriptors) == 5
    assert not any(flags[0] & 0x80 for flags in descriptors)
