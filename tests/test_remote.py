"""Models behind URLs: copied once, brought up to date, whole or not at all; code and pickles stay where they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from resafe import lab, models, remote
from resafe.cli import cli, main
from resafe.errors import ResafeError
from resafe.remote import fetch
from tests.weights.models import rewrite, tensors

URL = "memory://bucket/tuned"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESAFE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(aligned: Path) -> Iterator[Any]:
    """The lab model in a file system that is not local, beside a script and a pickle."""
    system = fsspec.filesystem("memory")
    system.makedirs("/bucket/tuned", exist_ok=True)
    for file in aligned.iterdir():
        system.pipe_file(f"/bucket/tuned/{file.name}", file.read_bytes())
    system.pipe_file("/bucket/tuned/modeling_x.py", b"raise SystemExit")
    system.pipe_file("/bucket/tuned/training_args.bin", b"pickle")
    yield system
    system.rm("/bucket", recursive=True)


def test_a_model_behind_a_url_is_the_same_model(bucket: Any, aligned: Path) -> None:
    folder = lab.resolve(URL)
    assert models.vet(folder) == folder
    there, here = load_file(aligned / "model.safetensors"), load_file(folder / "model.safetensors")
    assert there.keys() == here.keys() and all((there[k] == here[k]).all() for k in there)
    assert not {"modeling_x.py", "training_args.bin"} & {f.name for f in folder.iterdir()}


def test_only_what_changed_there_is_copied_again_and_what_is_gone_goes(bucket: Any) -> None:
    bucket.pipe_file("/bucket/tuned/extra.json", b"{}")
    lines: list[str] = []
    folder = fetch(URL, lines.append)
    assert any("model.safetensors" in line for line in lines) and (folder / "extra.json").is_file()
    lines.clear()
    bucket.rm("/bucket/tuned/extra.json")
    bucket.pipe_file("/bucket/tuned/generation_config.json", b'{"max_length": 7}')
    assert fetch(URL, lines.append) == folder
    assert len(lines) == 1 and "generation_config.json" in lines[0] and not (folder / "extra.json").exists()
    assert (folder / "generation_config.json").read_text() == '{"max_length": 7}'


def test_a_copy_that_breaks_off_leaves_no_file_and_goes_on(bucket: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(bucket).get_file

    def breaks(self: Any, there: str, here: str, **more: Any) -> None:
        whole(self, there, here)
        if there.endswith(".safetensors"):
            Path(here).write_bytes(Path(here).read_bytes()[:100])

    monkeypatch.setattr(type(bucket), "get_file", breaks)
    with pytest.raises(ResafeError, match=r"model\.safetensors from memory://bucket/tuned broke off at 100 of \d+ bytes"):
        fetch(URL)
    monkeypatch.undo()
    left = [f for f in cache.rglob("*") if f.name == "model.safetensors" or f.name.startswith(".part-")]
    assert not left
    assert (fetch(URL) / "model.safetensors").stat().st_size > 100


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://bucket/none", "there is no folder at memory://bucket/none"),
        ("nosuch://user:secret@place/x", r"nosuch://place/x cannot be read .*nosuch"),
        ("memory://empty", "holds no model"),
    ],
)
def test_what_cannot_be_read_is_one_line_without_passwords(url: str, said: str) -> None:
    fsspec.filesystem("memory").makedirs("/empty", exist_ok=True)
    with pytest.raises(ResafeError, match=said) as found:
        fetch(url)
    assert "secret" not in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(("model", "url"), [("s3://b/m", True), ("hf://u/m", True), ("C:/m", False), ("a/b", False), ("lab:base", False)])
def test_urls_are_told_from_folders(model: str, url: bool) -> None:
    assert remote.is_url(model) is url


@pytest.mark.parametrize(
    ("told", "again"),
    [({"modify": "20260101"}, "20260102"), ({"sha": "a"}, "b"), ({"modificationTime": 1}, 2), ({}, None), ({"time": 5.0, "mtime": 1}, None)],
)
def test_whatever_a_file_system_tells_of_a_change_counts_and_where_it_tells_nothing_all_is_copied(
    told: dict[str, Any], again: Any, bucket: Any, request: pytest.FixtureRequest
) -> None:
    def listed(self: Any, path: str, detail: bool = True, **_: Any) -> Any:
        return [{"name": "/bucket/tuned/config.json", "size": 2, "type": "file", **told}]

    bucket.pipe_file("/bucket/tuned/config.json", b"{}")
    lines: list[str] = []
    patch = request.getfixturevalue("monkeypatch")
    patch.setattr(type(bucket), "ls", listed)
    request.addfinalizer(patch.undo)
    fetch(URL, lines.append)
    fetch(URL, lines.append)
    assert len(lines) == (1 if told else 2)
    if "time" in told:  # when it was last read
        told["time"] = 6.0
        fetch(URL, lines.append)
        assert len(lines) == 1
    elif told:
        told[next(iter(told))] = again
        bucket.pipe_file("/bucket/tuned/config.json", b"[]")
        assert (fetch(URL, lines.append) / "config.json").read_text() == "[]" and len(lines) == 2


@pytest.mark.parametrize("url", ["s3://KEY:SECRET@b/m", "sftp://u:p@SECRET@host/m", "s3://AKIA:a/SECRET@b/m", "https://b/m?sig=SECRET", "hf://SECRET@u/m"])
def test_nothing_secret_in_a_url_is_shown(url: str) -> None:
    said = remote.shown(f"no such model: {url}, look again")
    assert "SECRET" not in said and said.startswith("no such model: ") and said.endswith("look again")


def test_the_command_line_shows_no_secret_wherever_the_url_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], aligned: Path) -> None:
    for more in (["-o", "s3://KEY:SECRET@b/out"], ["-o", "out", "-m", "resta:unaligned=s3://KEY:SECRET@b/m"]):
        monkeypatch.setattr("sys.argv", ["resafe", "repair", str(aligned), "--aligned", str(aligned), "-m", "restore_weights", *more])
        with pytest.raises(SystemExit) as stop:
            main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "SECRET" not in err and err.startswith("resafe: ")


def test_repair_reads_urls_and_writes_folders(bucket: Any, aligned: Path, tmp_path: Path) -> None:
    before = tmp_path / "before"
    shutil.copytree(aligned, before)
    rewrite(before, {name: 1.01 * tensor for name, tensor in tensors(aligned).items()})
    for file in before.iterdir():
        bucket.pipe_file(f"/bucket/aligned/{file.name}", file.read_bytes())
    how = ["repair", URL, "--aligned", "memory://bucket/aligned", "-m", "restore_weights:strength=0.5", "-o"]
    done = CliRunner().invoke(cli, [*how, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    made, one, other = (tensors(folder) for folder in (models.vet(tmp_path / "out"), before, aligned))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)
    refused = CliRunner().invoke(cli, [*how, "s3://bucket/out"])
    assert refused.exit_code != 0 and "--output is a local folder" in str(refused.exception or refused.output)
