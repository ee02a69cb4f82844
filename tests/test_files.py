import os

import pytest

from lightning_optim.files import folder_written_aside, pair_written_aside, replace_files, written_aside


def test_a_failed_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file"
    with written_aside(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(path) as temporary:
        temporary.write_text(1 / 0)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    with written_aside(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_files_are_replaced_in_order_and_only_when_all_are_written(tmp_path, monkeypatch):
    moved, paths = [], [tmp_path / name for name in ("first", "second")]
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda old, new: (moved.append(new.name), replace(old, new)))
    replace_files(dict(zip(paths, ["text", b"bytes"], strict=True)))
    assert moved == ["first", "second"]
    assert [path.read_bytes() for path in paths] == [b"text", b"bytes"]
    with pytest.raises(AttributeError):
        replace_files({paths[0]: None, paths[1]: "new"})
    assert [path.read_bytes() for path in paths] == [b"text", b"bytes"]
    assert sorted(tmp_path.iterdir()) == paths


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    with folder_written_aside(tmp_path / "new" / "folder") as temporary:
        (temporary / "a").write_text("1")
    with folder_written_aside(tmp_path / "new" / "folder") as temporary:
        assert not list(temporary.iterdir())
        (temporary / "b").write_text("2")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


@pytest.mark.parametrize("place", ["inside", "at the second move"])
def test_a_failure_leaves_the_old_folder(place, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    move = os.replace

    def replace(source, target):
        if str(source).endswith(".part"):
            raise OSError("no space")
        move(source, target)

    with pytest.raises(OSError, match="no space"), folder_written_aside(folder) as temporary:  # noqa: PT012
        (temporary / "b").write_text("2")
        if place == "inside":
            raise OSError("no space")
        monkeypatch.setattr(os, "replace", replace)
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_folder_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with folder_written_aside(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "1"


def written_pair(path, first, second):
    with pair_written_aside(path, ".data", is_pair=lambda old: old.exists() and "pair" in old.read_text()) as temporary:
        temporary.write_text(first)
        if second is not None:
            temporary.with_name(f"{temporary.name}.data").write_text(second)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_pair_is_replaced_by_a_pair_or_by_one_file(tmp_path):
    written_pair(tmp_path / "a", "pair 1", "data 1")
    written_pair(tmp_path / "a", "pair 2", "data 2")
    assert contents(tmp_path) == {"a": "pair 2", "a.data": "data 2"}
    written_pair(tmp_path / "a", "one", None)
    assert contents(tmp_path) == {"a": "one"}
    (tmp_path / "a.data").write_text("mine")
    written_pair(tmp_path / "a", "two", None)
    assert contents(tmp_path) == {"a": "two", "a.data": "mine"}


@pytest.mark.parametrize("fails", range(4))
def test_a_failed_move_of_a_pair_leaves_the_old_one(fails, tmp_path, monkeypatch):
    written_pair(tmp_path / "a", "pair 1", "data 1")
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == fails + 1:
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        written_pair(tmp_path / "a", "pair 2", "data 2")
    assert contents(tmp_path) == {"a": "pair 1", "a.data": "data 1"}


@pytest.mark.parametrize("name", ["a", "a.data"])
def test_a_folder_is_not_replaced_by_a_pair(name, tmp_path):
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        written_pair(tmp_path / "a", "pair", "data")
    assert (tmp_path / name / "inside").is_dir()
