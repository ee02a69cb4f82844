import os

import pytest

from lightning_optim.files import replace_files, written_aside


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
