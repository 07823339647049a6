"""Which files of a folder are its images, in which order, and in which shard."""

import os

import pytest

from fastvlm_mlx.errors import ImageError, OptionError
from fastvlm_mlx.mapping import Job, images
from fastvlm_mlx.mapping.images import Shard, find


@pytest.fixture
def folder(tmp_path):
    names = "b.png a.JPG notes.txt .hidden.png ._a.png no-suffix é/z.webp é/x.png é.png .git/c.png"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "linked.png").symlink_to("b.png")
    (tmp_path / "again").symlink_to(".")
    return str(tmp_path)


def test_images_by_name_in_the_order_of_their_bytes(folder):
    found = find(folder, (), Shard())
    assert found.names == [
        "a.JPG",
        "b.png",
        "dangling.png",
        "linked.png",
        "é.png",
        "é/x.png",
        "é/z.webp",
    ]
    assert (found.others, found.links, found.unreadable) == (2, 1, [])


def test_patterns_and_what_is_our_own(folder):
    assert find(folder, ("*.jpg", "Z*"), Shard()).names == ["a.JPG", "é/z.webp"]
    own = [os.path.join(folder, "notes.txt")]
    names = find(folder, images.check_patterns("*"), Shard(), own).names
    assert "no-suffix" in names
    assert "notes.txt" not in names
    for pattern in ("", "é/*.png", 3):
        with pytest.raises(OptionError, match="--pattern"):
            images.check_patterns([pattern])


def test_our_own_by_another_way(folder, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "to"
    link.symlink_to(folder)
    own = [os.path.join(folder, "notes.txt")]
    assert "notes.txt" not in find(str(link), ("*",), Shard(), own).names
    assert "notes.txt" in find(folder, ("*",), Shard(), [str(link)]).names


def test_the_home_of_nobody():
    with pytest.raises(ImageError, match="can't be read"):
        Job("bundle", "~nobody-has-this-name/images", "What is it?")


@pytest.mark.linux
def test_a_name_that_is_not_utf_8(folder):
    with open(os.path.join(os.fsencode(folder), b"caf\xe9\n.png"), "wb"):
        pass
    assert "caf\udce9\n.png" in find(folder, (), Shard()).names


def test_a_folder_inside_that_cannot_be_read_is_told(folder, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if path.endswith("é/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find(folder, (), Shard())
    assert "b.png" in found.names
    assert found.unreadable == [
        f"{folder}/é/ can't be read (Permission denied): check its permissions"
    ]


def test_what_is_no_folder(folder):
    with pytest.raises(ImageError, match=r"is a file: expected a folder"):
        find(os.path.join(folder, "b.png"), (), Shard())
    with pytest.raises(ImageError, match=r"can't be read \(No such file"):
        find(os.path.join(folder, "nowhere"), (), Shard())


def test_each_image_is_in_one_shard_whatever_else_there_is():
    names = [f"part{number % 7}/{number}.png" for number in range(3000)]
    parts = [[name for name in names if Shard(index, 4).holds(name)] for index in range(1, 5)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(650 < len(part) < 850 for part in parts)
    # Another machine, another year.
    assert [n for n in range(20) if Shard(1, 4).holds(names[n])] == [5, 11, 12, 13, 19]
    assert all(map(Shard.parse("1/1").holds, names))


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/²"])
def test_what_is_no_shard(text):
    with pytest.raises(OptionError, match="--shard"):
        Shard.parse(text)
