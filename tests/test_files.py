"""What exists is complete: folders and files appear by rename or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from resafe.errors import ResafeError
from resafe.files import check_free, digest, new_folder, scratch, write_json, write_text


def test_a_failing_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ResafeError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_text(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(file, {"new": 1})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_a_link_to_an_empty_folder_is_filled_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "a").read_text() == "x"


def test_outputs_that_cannot_be_put_in_place_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ResafeError, match="link to nowhere"):
        check_free(tmp_path / "dangling")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "disk")
    with pytest.raises(ResafeError, match="mount point.*folder inside it"):
        check_free(tmp_path / "disk")
    check_free(tmp_path / "disk" / "inside")


def test_scratch_is_gone_afterwards_and_what_killed_runs_left_goes_with_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".out.tries-killed"
    left.mkdir()
    with scratch(tmp_path / "out", "tries") as one, scratch(tmp_path / "out", "tries") as two:
        assert not left.exists() and one.is_dir() and two.is_dir(), "those of living runs stay"
    assert list(tmp_path.iterdir()) == []
